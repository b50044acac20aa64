"""What a check of the data found."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .._progress import listed
from .config import TrainConfig

Level = Literal["error", "warning", "note"]


@dataclass
class Report:
    """The findings of :func:`unet_fast.training.check.check_data`."""

    findings: list[tuple[Level, str]] = field(default_factory=list)
    """Errors, which training would refuse or learn nonsense from; warnings; notes."""
    suggestion: TrainConfig | None = None
    """Settings that fit; None where there are errors."""

    def add(self, level: Level, text: str, files: Iterable[Path | str] = ()) -> None:
        """Adds a finding, with the names of its files."""
        names = [f.name if isinstance(f, Path) else f for f in files]
        self.findings.append((level, text + (f": {listed(names)}" if names else "")))

    def exit_code(self, strict: bool) -> int:
        """Returns 0: fine; 1: warnings, if `strict`; 2: errors."""
        levels = {level for level, _ in self.findings}
        return 2 if "error" in levels else int(strict and "warning" in levels)
