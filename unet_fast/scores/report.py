"""Results of an evaluation: as a table, a file, a text and a picture."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .._files import make_folder, replace_file
from .._progress import listed
from ..plots import Example, draw_evaluation

Row = dict[str, Any]
Kind = Literal["objects", "masks", "probabilities"]
CSV, JSON, PICTURE = "evaluation.csv", "evaluation.json", "evaluation.png"
_OBJECTS = {
    "ap_50": ("AP 0.5", "average precision: found / (found + missed + excess)"),
    "pq_50": ("PQ 0.5", "panoptic quality: F1 times the mean IoU of the found"),
    "f1_50": ("F1 0.5", "F-score: 2 found / (2 found + missed + excess)"),
    "seg": (
        "SEG",
        "segmentation accuracy: mean IoU of true objects; does not see excess: {objects}",
    ),
    "iou": ("pixel IoU", "intersection over union: foreground pixels in both / in either"),
}
_MASKS = {
    "v_rand": ("V_rand", "Rand F-score of pairs of pixels: {parts}"),
    "v_info": ("V_info", "F-score of information: {parts}"),
    "iou": ("pixel IoU", "intersection over union: foreground pixels in both / in either"),
}
_PROBABILITIES = {
    "v_rand_thinned": (
        "V_rand thinned",
        "Rand F-score of pairs of pixels, borders 1 wide: {parts}",
    ),
    "v_info_thinned": ("V_info thinned", "F-score of information, borders 1 wide: {parts}"),
    "v_rand": ("V_rand", "Rand F-score of pairs of pixels: {parts}"),
    "v_info": ("V_info", "F-score of information: {parts}"),
    "rand_error": ("Rand error", "1 - V_rand"),
    "pixel_error": ("pixel error", "1 - F-score of the foreground pixels"),
    "warping_error": ("warping error", "splits and mergers that moving borders leaves, per pixel"),
}
_SHOWN = {"objects": _OBJECTS, "masks": _MASKS, "probabilities": _PROBABILITIES}
"""For each kind the scores that are printed: names and meanings."""


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate_files`."""

    rows: list[Row]
    """The name and the scores of each image; None where there is no reference object."""
    summary: Row
    """The scores of all images together."""
    kind: Kind
    """What was scored: objects; masks, mostly foreground, with thin borders between objects, such
    as membranes in EM; or probabilities."""
    examples: list[Example] = field(compare=False)
    """The best, the median and the worst image, each once."""
    unpredicted: list[str] = field(default_factory=list)
    """Names of the labels without a prediction."""
    labels: str = ""
    """How the labels were read, for people."""

    def write(self, out: Path) -> None:
        """Writes rows as CSV, all scores as JSON and a picture of the examples into a folder.

        The folder is made if it is missing.
        """
        rows = [
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            for row in self.rows
        ]
        replace_file(make_folder(out) / CSV, as_csv(rows, list(rows[0])))
        content = {"summary": self.summary, "images": self.rows}
        replace_file(out / JSON, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        draw_evaluation(out / PICTURE, self.examples)

    def text(self) -> str:
        """Returns the scores of all images that suit the kind, each with its meaning on a line."""
        lines = [("images", str(self.summary["images"])), ("labels", self.labels)]
        if self.unpredicted:
            lines.append(("no result", f"{listed(self.unpredicted)}: {self._unpredicted()}"))
        objects = ""
        if "reference_objects" in self.summary:
            objects = _counted(self.summary)
            lines.append(("objects", objects))
        for key, (name, meaning) in _SHOWN[self.kind].items():
            meaning = meaning.format(objects=objects, parts=_parts(self.summary, key))
            lines.append((name, f"{short(self.summary[key]):<8}  {meaning}"))
        if self.kind == "objects":
            lines.append(("found", "a true and a predicted object of IoU above 0.5"))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)

    def _unpredicted(self) -> str:
        """Says how labels without a prediction count."""
        scored = {row["image"].split("[")[0] for row in self.rows}
        return "count as missed" if scored & {*self.unpredicted} else "left out"


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    """Formats rows as CSV; what a row lacks is empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def _counted(summary: Row) -> str:
    return f"{summary['predicted_objects']} predicted, {summary['reference_objects']} true"


def _parts(summary: Row, key: str) -> str:
    """Formats the two scores that an F-score is made of."""
    split, merge = (short(summary.get(f"{key}_{part}")) for part in ("split", "merge"))
    return f"split {split} (low: torn), merge {merge} (low: joined)"


def short(value: float | None) -> str:
    """Formats a score with four decimals, or three digits below 0.01."""
    if value is None:
        return "none"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.3g}"
