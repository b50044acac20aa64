"""Files: read if they are regular, written whole or not at all, by one process."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PART = ".unet_fast-{}.part"
"""Name of a file that is being written: one of its own, as several processes may write."""
_STALE = 3600
"""Seconds after which such a file is left over from a killed process."""


TEXT = 2**24
"""Bytes of the longest file of settings or names; nobody writes longer ones by hand."""


def read_file(path: Path, most: int | None = None) -> bytes:
    """Reads a regular file; a pipe or a device may never end.

    Args:
        path: The file.
        most: Bytes that it may have; None: any number.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not regular, or longer.
    """
    with open(path, "rb", opener=_opener) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it must be a regular file")
        if most is not None and status.st_size > most:
            raise ValueError(f"it must have at most {most} bytes, got {status.st_size}")
        return file.read()


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # does not wait for a pipe's writer


def parsed_json(text: str | bytes) -> Any:
    """Parses JSON; raises ValueError also where it is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class NotWritten(ValueError):
    """A file cannot be written, because the disk is full, say: others would fare no better."""


def make_folder(folder: Path) -> Path:
    """Makes a folder if it is missing, and checks that files can be written there.

    Files that killed processes were writing there are removed.

    Raises:
        NotWritten: If it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        remove_parts(folder, _STALE)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise NotWritten(f"{folder}: must be a folder that can be written: {reason}") from None
    return folder


def remove_parts(folder: Path, seconds: float = 0) -> None:
    """Removes files that a process began to write so many seconds ago, or earlier."""
    for part in folder.glob(_PART.format("*")):
        with contextlib.suppress(FileNotFoundError):  # it has been renamed
            if time.time() - part.lstat().st_mtime >= seconds:
                part.unlink()


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: under another name, flushed to disk, then renamed.

    Raises:
        NotWritten: If it cannot be written, say on a full disk; an earlier file is still there.
    """
    part = path.with_name(_PART.format(secrets.token_hex(8)))
    try:
        with part.open("xb") as file:  # x: a link that somebody put there is not followed
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name must reach the disk, too
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise NotWritten(f"{path}: cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Makes a folder whole or not at all: under another name, renamed when `with` ends.

    Args:
        folder: The folder; there must be none.

    Yields:
        The folder to write into.

    Raises:
        ValueError: If there is one.
        NotWritten: If it cannot be made or renamed.
    """
    if folder.exists():
        raise ValueError(f"out must be a new folder, got {folder}")
    prefix = _PART.partition("{")[0]
    with tempfile.TemporaryDirectory(prefix=prefix, dir=make_folder(folder.parent)) as place:
        part = Path(place) / folder.name  # of usual rights, which `place` lacks
        part.mkdir()
        yield part
        try:
            part.rename(folder)
        except OSError as error:
            raise NotWritten(f"{folder}: cannot be written: {error.strerror or error}") from None


_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of file systems without locks, as some clusters have."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from writing a file or folder, until the `with` statement ends.

    The lock is one of the operating system on a hidden file beside `path`, so it ends with this
    process, however that ends.

    Raises:
        ValueError: If another process holds the lock.
        NotWritten: If there can be no file beside `path`.
    """
    name = path.with_name(f".{path.name}.lock")
    while True:
        try:
            lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise NotWritten(f"{name}: cannot be written: {error.strerror or error}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(lock)
                raise ValueError(f"{path}: another process is writing it") from None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == name.lstat().st_ino:
                break
        os.close(lock)  # its owner removed the file before it could be locked
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        os.close(lock)


def check_apart(out: Path, *inputs: Path | None) -> None:
    """Raises ValueError if a folder for results is one of the folders of the input."""
    if any(x is not None and x.exists() and out.exists() and out.samefile(x) for x in inputs):
        raise ValueError(f"out must not be the folder of the input, got {out}")


def reason_of(error: Exception) -> str:
    """Returns the first line of an error's message or, without one, the name of its type."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
