"""The program `unet-fast`: how it parses its arguments, and how it ends."""

import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import cyclopts
from cyclopts import Parameter

from .._files import reason_of
from .._library import build_info
from ..images.limits import MOST_PIXELS
from ..images.pairing import Reading

HELP = """The U-Net recipe of 2015: train on annotated images, predict others.

```
unet-fast check images labels
unet-fast train images labels --out run
unet-fast predict run new_images --out results
unet-fast evaluate results labels
```

`unet-fast COMMAND --help` explains a command. All commands that read images also take
`--max-pixels N`, the pixels, times channels and planes, that a file may unpack to; without it they
are 64 for each byte of the file, or 67108864 if that is more.
"""

app = cyclopts.App(
    name="unet-fast",
    version=build_info()["version"],
    version_flags=["--version", "-V"],
    help=HELP,
    help_format="markdown",  # paragraphs are wrapped, examples are not
    suppress_keyboard_interrupt=False,  # main() says what was saved
    default_parameter=Parameter(negative_iterable=()),
)
SUFFIX = Parameter(allow_leading_hyphen=True)
"""How a suffix such as -labels is parsed."""
SEVERAL = Parameter(n_tokens=-1, consume_multiple=True)
"""How an option of several values is parsed: it takes all words up to the next option."""
ReadingOptions = Annotated[Reading, Parameter(name="*")]
"""The options by which images and labels are found and read."""
AS_FOUND = Reading()
"""Their defaults."""


def parse_as(settings: Any, name: str, parameter: Parameter) -> None:
    """Says how a setting of a dataclass is parsed, which need not know of the command line."""
    field = settings.__dataclass_fields__[name]
    field.type = settings.__annotations__[name] = Annotated[field.type, parameter]


parse_as(Reading, "label_suffix", SUFFIX)
parse_as(Reading, "voxel_size", SEVERAL)
app.register_install_completion_command(help="Complete commands and options with Tab.")


app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def _with_settings(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(show=False)] = None,
    max_pixels: Annotated[int | None, Parameter(show=False)] = None,
) -> int | None:
    """Takes what must be known before a command is parsed."""
    words = _spread(words)
    if max_pixels is not None:
        if max_pixels < 1:
            raise ValueError(f"--max-pixels must be >= 1, got {max_pixels}")
        os.environ[MOST_PIXELS] = str(max_pixels)
    app.config = [_check_words]
    if words[:1] == ("train",):
        app.config = [*_sources(words, config), _check_words]
    elif config is not None:
        said = " ".join(words[:1]) or "nothing"
        raise ValueError(f"--config must go with train, got {said}")
    code: int | None = app(
        words, exit_on_error=False, print_error=False, result_action="return_value"
    )
    return code


def _spread(words: Sequence[str]) -> tuple[str, ...]:
    """Takes `--voxel-size 2,1,1` for `--voxel-size 2 1 1`, and tiles of `train` alike."""
    joined = ("--voxel-size", "--tile") if words[:1] == ("train",) else ("--voxel-size",)
    result: list[str] = []
    option = ""
    for word in words:
        name, _, value = word.partition("=")
        if word.startswith("--"):
            option = name
        if option not in joined:
            result.append(word)
        elif word.startswith("--"):
            result += [option, *filter(None, value.split(","))]
        else:
            result += word.split(",")
    return tuple(result)


def _check_words(_: cyclopts.App, __: tuple[str, ...], found: cyclopts.ArgumentCollection) -> None:
    """Refuses words that the library would take for others: 1.5 for 2, nothing for this folder."""
    for argument in found:
        kinds = {argument.hint, *get_args(argument.hint)}
        for token in argument.tokens:
            name = token.keyword or argument.name
            if Path in kinds and token.value == "" and not token.keys:
                raise ValueError(f"{name} must be a file or a folder, got an empty word")
            if int in kinds and float not in kinds and "." in token.value:
                raise ValueError(f"{name} must be a whole number, got {token.value}")


def _sources(words: Sequence[str], file: Path | None) -> list[cyclopts.config.Dict]:
    """Returns where `train` finds settings that are not typed: file, resumed run, suggestion."""
    from ..augment import Augmentation
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
        app.config = [*sources, _check_words]
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        return bound.arguments

    if file is not None:
        add(read_toml(file), str(file))
    known = so_far()
    config = known["config"]
    begun = config.out / CONFIG
    if config.resume and begun.exists():
        places = ("images", "labels", "out")  # as they are given now
        add({k: v for k, v in read_toml(begun).items() if k not in places}, str(begun))
        config = so_far()["config"]
    # The file of a whole run has all settings; one it lacks has the default of TrainConfig.
    whole = {"base_channels", "optimizer"} <= said
    if known.get("preset") != "paper-2015" and not whole:
        from ..training.suggest import suggested_settings

        add(suggested_settings(config), "suggested")
    if config.dims == 3:  # where some of its settings are given, the others are those of volumes
        volumes = vars(Augmentation.volumes())
        plain = vars(Augmentation.paper_2015())
        add({"augmentation": {k: v for k, v in volumes.items() if v != plain[k]}}, "volumes")
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
        sys.stdout.flush()
    except BrokenPipeError:  # who reads this, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except cyclopts.MissingArgumentError as error:
        message = _missing(error)
    except cyclopts.UnusedCliTokensError as error:
        command = " ".join(error.command_chain or ())
        extra = " ".join(error.unused_tokens or ())
        message = f"{command}: arguments must be as in {example_of(command)}, got too many: {extra}"
    except cyclopts.CycloptsError as error:
        message = " ".join(str(error).split())
        # The library leaves out which setting has too few values or too many.
        if isinstance(error, cyclopts.CoercionError) and error.argument and error.argument.tokens:
            token = error.argument.tokens[0]
            if token.keyword and token.keyword not in message:
                message = f"{token.source}: {token.keyword}: {message}"
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


def example_of(command: str) -> str:
    """Returns the example in the help of a command."""
    found = re.search(r"unet-fast .*", app[command].help)
    assert found is not None
    return found[0]


def _missing(error: cyclopts.MissingArgumentError) -> str:
    """Says which argument is missing, or which option has no value."""
    argument, command = error.argument, " ".join(error.command_chain or ())
    assert argument is not None
    typed = error.keyword or next((t.keyword for t in argument.tokens if t.keyword), None)
    if error.tokens_so_far:
        got = " ".join(error.tokens_so_far)
        return f"{command}: {typed or argument.name} must be followed by more values, got {got}"
    if typed is not None:
        return f"{command}: {typed} must be followed by its value"
    name = argument.name
    if argument.field_info.is_positional:
        name = name.removeprefix("--").lower()
    return f"{command}: {name} must be given: {example_of(command)}"
