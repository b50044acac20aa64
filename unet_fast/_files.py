"""Files that are written whole or not at all, and one-line error messages."""

import contextlib
import os
import tempfile
from pathlib import Path


def make_folder(folder: Path) -> Path:
    """Makes a folder if it is missing, and checks that files can be written there.

    Raises:
        ValueError: If it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{folder}: must be a folder that can be written: {reason}") from None
    return folder


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: under another name, flushed to disk, then renamed.

    Raises:
        ValueError: If it cannot be written, say on a full disk; an earlier file is still there.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name must reach the disk, too
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ValueError(f"{path}: cannot be written: {error.strerror or error}") from None


def reason_of(error: Exception) -> str:
    """Returns the first line of an error's message or, without one, the name of its type."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
