"""Predicts in tiles that equal the whole, with an exported network, NumPy and onnxruntime:
python onnx_tiles.py FOLDER IMAGE.npy PROBABILITIES.npy  (image: channels, rows, columns)"""

import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def load(folder):
    """Returns the network, and what its export says about it."""
    about = json.loads((folder / "model.json").read_text())
    if about.get("format") != 1:
        raise ValueError(f"model.json must be of format 1, got {about.get('format')}")
    network = (folder / "model.onnx").read_bytes()
    if hashlib.sha256(network).hexdigest() != about["sha256"]:
        raise ValueError("model.onnx must be the file that was exported with model.json")
    return onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"]), about


def normalised(pixels, percentiles):
    """Maps two percentiles of each channel to 0 and 1; equal ones give way to its range."""
    axes = tuple(range(1, pixels.ndim))
    low, high = np.percentile(pixels.astype(np.float64), percentiles, axes, keepdims=True)
    whole = pixels.min(axes, keepdims=True), pixels.max(axes, keepdims=True)
    low, high = np.where(low == high, whole, (low, high))
    return (pixels - np.float32(low)) / np.float32(np.where(low < high, high - low, 1))


def predict(network, about, image, tile=512):
    """Returns the probabilities, (classes, *sides), of an image, (channels, *sides)."""
    names = "alignment", "smallest_input", "halo", "border"
    step, smallest, halo, border = (np.array(about[name]) for name in names)
    size = np.array(image.shape[-len(step) :])
    pixels = image.astype(np.float32).reshape(about["channels"], *size)
    pixels = normalised(pixels, about["percentiles"]) if about["percentiles"] else pixels
    tile = np.minimum(-(-tile // step) * step, size) if about["tiles"] else size
    side = smallest - np.minimum((smallest - tile - 2 * border) // step, 0) * step
    behind = (size - 1) // tile * tile + side - border - size  # so far reaches the last tile
    pixels = np.pad(pixels, [(0, 0), *np.stack([border, behind], 1)], "reflect")
    result = np.empty((len(about["classes"]), *size), np.float32)
    for origin in itertools.product(*map(range, 0 * size, size, tile)):
        kept = np.minimum(tile, size - origin)
        found = network.run(None, {"image": pixels[None, :, *map(slice, origin, origin + side)]})[0]
        result[:, *map(slice, origin, origin + kept)] = found[0, :, *map(slice, halo, halo + kept)]
    return result


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        folder, image, out = map(Path, sys.argv[1:])
        np.save(out, predict(*load(folder), np.load(image)))
    except Exception as error:
        sys.exit(f"onnx_tiles.py: {error}".splitlines()[0])
