"""What an evaluation found: in a table, in a file, in words, in a picture."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .._files import make_folder, replace_file
from ..plots import Example, draw_evaluation

Row = dict[str, Any]
Kind = Literal["objects", "masks", "probabilities"]
CSV, JSON, PICTURE = "evaluation.csv", "evaluation.json", "evaluation.png"
_OBJECTS = {
    "ap_50": ("AP 0.5", "found / (found + missed + excess); found: a pair of IoU above 0.5"),
    "pq_50": ("PQ 0.5", "F1 times the mean IoU of the pairs"),
    "f1_50": ("F1 0.5", "2 found / (2 found + missed + excess)"),
    "seg": ("SEG", "mean IoU of true objects; does not see excess: {objects}"),
    "iou": ("pixel IoU", "foreground pixels in both / in either"),
}
_MASKS = {
    "v_rand": ("V_rand", "pairs of pixels: {parts}"),
    "v_info": ("V_info", "information: {parts}"),
    "iou": ("pixel IoU", "foreground pixels in both / in either"),
}
_PROBABILITIES = {
    "v_rand_thinned": ("V_rand thinned", "pairs of pixels, borders 1 wide: {parts}"),
    "v_info_thinned": ("V_info thinned", "information, borders 1 wide: {parts}"),
    "v_rand": ("V_rand", "pairs of pixels: {parts}"),
    "v_info": ("V_info", "information: {parts}"),
    "rand_error": ("Rand error", "1 - V_rand"),
    "pixel_error": ("pixel error", "1 - F-score of the foreground pixels"),
    "warping_error": ("warping error", "splits and mergers that moving borders leaves, per pixel"),
}
_SHOWN = {"objects": _OBJECTS, "masks": _MASKS, "probabilities": _PROBABILITIES}
"""Of each kind the scores that are printed: what they are called and what they mean."""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate_files` found."""

    rows: list[Row]
    """The name and the scores of each image; None where there is no reference object."""
    summary: Row
    """The scores of all images together."""
    kind: Kind
    """What was scored: objects; masks of mostly foreground, whose thin borders part objects, as of
    membranes in EM; probabilities."""
    examples: list[Example] = field(compare=False)
    """The best, the median and the worst image, each once."""

    def write(self, out: Path) -> None:
        """Writes rows as CSV, all as JSON and a picture of the examples into a folder.

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
        """The scores of all images that fit what was scored, a line each with what it means."""
        left_out = self.summary["labels_without_prediction"]
        more = f", {left_out} labels without prediction left out" if left_out else ""
        lines = [("images", f"{self.summary['images']}{more}")]
        objects = ""
        if "reference_objects" in self.summary:
            objects = _counted(self.summary)
            lines.append(("objects", objects))
        for key, (name, meaning) in _SHOWN[self.kind].items():
            meaning = meaning.format(objects=objects, parts=_parts(self.summary, key))
            lines.append((name, f"{short(self.summary[key]):<8}  {meaning}"))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    """The content of a file; what a row lacks is empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def _counted(summary: Row) -> str:
    return f"{summary['predicted_objects']} predicted, {summary['reference_objects']} true"


def _parts(summary: Row, key: str) -> str:
    """The two scores that an F-score is made of."""
    split, merge = (short(summary.get(f"{key}_{part}")) for part in ("split", "merge"))
    return f"split {split} (low: torn), merge {merge} (low: joined)"


def short(value: float | None) -> str:
    """A score with four digits."""
    if value is None:
        return "none"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.3g}"
