"""The program `unet-fast`: how it parses its arguments, and how it ends."""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from .._files import reason_of
from .._library import HAS_CUDA, build_info

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
) -> int | None:
    """Reads settings from a file first.

    Parameters
    ----------
    config:
        TOML file of settings, for `train`.
    """
    app.config = []
    if words[:1] == ("train",):
        app.config = _sources(words, config)
    elif config is not None:
        raise ValueError(f"--config must go with train, got {' '.join(words[:1]) or 'nothing'}")
    code: int | None = app(
        words, exit_on_error=False, print_error=False, result_action="return_value"
    )
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
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _main(arguments)


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
        if "can't allocate memory" in message:
            message = f"not enough memory{message[message.rindex(':') :]}"
    except KeyboardInterrupt as error:
        print(f"unet-fast: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    else:
        return code or 0
    print(f"unet-fast: {message}", file=sys.stderr)
    return 2
