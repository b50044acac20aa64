"""The program `unet-fast`: how it parses its arguments, and how it ends."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from .._files import reason_of
from .._library import HAS_CUDA, build_info
from ..images.limits import MOST_PIXELS

app = cyclopts.App(
    name="unet-fast",
    version=build_info()["version"],
    help="The U-Net recipe of 2015: train on annotated images, predict others.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # main() says what was saved
    default_parameter=Parameter(negative_iterable=()),
)


@app.command
def info() -> None:
    """Show versions, and what the kernels were built for."""
    import torch

    facts = build_info()
    facts["torch"] = torch.__version__
    facts["cuda_kernels"] = "loaded" if HAS_CUDA else "not loaded"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["cuda_devices"] = ", ".join(devices) or "none"
    for name, value in facts.items():
        print(f"{name:<20} {value}")


app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def _with_settings(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
    max_pixels: int | None = None,
) -> int | None:
    """Reads settings from a file first.

    Parameters
    ----------
    config:
        TOML file of settings, for `train`.
    max_pixels:
        Pixels, times channels and planes, that an image file may unpack to, >= 1; without it 64 for
        each byte of the file, or 67108864 if that is more.
    """
    if max_pixels is not None:
        if max_pixels < 1:
            raise ValueError(f"--max-pixels must be >= 1, got {max_pixels}")
        os.environ[MOST_PIXELS] = str(max_pixels)
    app.config = []
    try:
        if words[:1] == ("train",):
            app.config = _sources(words, config)
        elif config is not None:
            said = " ".join(words[:1]) or "nothing"
            raise ValueError(f"--config must go with train, got {said}")
        code: int | None = app(
            words, exit_on_error=False, print_error=False, result_action="return_value"
        )
    except cyclopts.CycloptsError as error:
        if config is None or str(config) in str(error):
            raise
        raise ValueError(f"{config}: {' '.join(str(error).split())}") from None
    return code


def _sources(words: Sequence[str], file: Path | None) -> list[cyclopts.config.Dict]:
    """Returns where `train` finds settings that are not typed: file, resumed run, suggestion."""
    from ..training.config import CONFIG, read_toml

    said = {word.split("=")[0].removeprefix("--") for word in words}
    sources = []

    def add(settings: dict[str, Any], name: str) -> None:
        for one, other in (("minutes", "steps"), ("steps", "minutes")):
            if one in said:
                settings.pop(other, None)
        said.update(settings)
        # Nested below the command's name, so that settings named like another command count, too.
        sources.append(cyclopts.config.Dict({"train": settings}, source=name))

    def so_far() -> dict[str, Any]:
        app.config = sources
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        return bound.arguments

    if file is not None:
        add(read_toml(file), str(file))
    known = so_far()
    config = known.get("config")
    if config is None:  # --help
        return sources
    begun = config.out / CONFIG
    if config.resume and begun.exists():
        places = ("images", "labels", "out")  # as they are given now
        add({k: v for k, v in read_toml(begun).items() if k not in places}, str(begun))
        config = so_far()["config"]
    # The file of a whole run has all settings; one it lacks has the default of TrainConfig.
    whole = {"base_channels", "optimizer"} <= said
    if known.get("preset") != "paper-2015" and not whole:
        from ..training.check import suggested_settings  # not for --help

        add(suggested_settings(config), "suggested")
    return sources


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit code, or 2 after a one-line message on wrong input."""
    logging.getLogger("asyncio").disabled = True  # zarr's other tasks would report an error again
    most = os.environ.get(MOST_PIXELS)
    try:
        with warnings.catch_warnings(), _terminable():
            warnings.showwarning = _show_warning
            return _main(arguments)
    finally:  # --max-pixels holds for this command
        os.environ.pop(MOST_PIXELS, None)
        if most is not None:
            os.environ[MOST_PIXELS] = most


@contextmanager
def _terminable() -> Iterator[None]:
    """Ends on SIGTERM as on Ctrl-C: locks are opened and half-written files removed."""
    if threading.current_thread() is not threading.main_thread():  # only that gets signals
        yield
        return

    def end(*_: object) -> None:
        raise KeyboardInterrupt("terminated")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"unet-fast: warning: {message}", file=sys.stderr)


def _main(arguments: Sequence[str] | None) -> int:
    try:
        code: int | None = app.meta(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )
    except cyclopts.CycloptsError as error:
        message = " ".join(str(error).split())
    except (ValueError, ArithmeticError, OSError, RuntimeError, MemoryError) as error:
        message = reason_of(error)  # torch's messages have several lines
        if isinstance(error, MemoryError) or "bad_alloc" in message:
            message = f"not enough memory: {message}"
        if "can't allocate memory" in message:
            message = f"not enough memory{message[message.rindex(':') :]}"
    except KeyboardInterrupt as error:
        print(f"unet-fast: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    else:
        return code or 0
    print(f"unet-fast: {message}", file=sys.stderr)
    return 2
