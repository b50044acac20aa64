"""Segmentation metrics against scikit-image, against a loop over objects, and against plain passes.

    python benchmarks/bench_metrics.py --csv benchmarks/results/metrics_cpu.csv

2048 x 2048 pixels with 2,000 reference and as many predicted objects. A pass counts the pixels that
differ between the two maps. Needs scikit-image.
"""

import numpy as np
import torch
from interleave import arguments_of, compare, header, print_table, write_csv
from scipy import ndimage
from skimage.metrics import adapted_rand_error, variation_of_information

from unet_fast import metrics

SIDE, OBJECTS = 2048, 2000


def main():
    options = arguments_of(__doc__.splitlines()[0])
    truth, found = maps()

    def one_pass():
        return np.count_nonzero(truth != found)

    # Timed on the maps as they are: the numbering below, without which scikit-image takes what is
    # predicted background for one object, is not its own.
    def skimage_rand():
        return adapted_rand_error(truth, found)

    def skimage_information():
        return variation_of_information(truth, found)

    # The results first. scikit-image leaves out pairs of a pixel with itself.
    numbered = alone(found, truth)
    assert abs(1 - adapted_rand_error(truth, numbered)[0] - metrics.v_rand(truth, found)) < 1e-4
    assert abs(loop_seg(truth, found) - metrics.seg(truth, found)) < 1e-12
    rivals = [
        ("v_rand", metrics.v_rand, "scikit-image, adapted_rand_error", skimage_rand),
        ("v_info", metrics.v_info, "scikit-image, variation_of_information", skimage_information),
        ("seg", metrics.seg, "loop over objects", lambda: loop_seg(truth, found)),
        ("v_rand", metrics.v_rand, "one pass", one_pass),
        ("v_info", metrics.v_info, "one pass", one_pass),
        ("seg", metrics.seg, "one pass", one_pass),
        ("average_precision", metrics.average_precision, "one pass", one_pass),
    ]
    rows = []
    for name, metric, rival, function in rivals:
        repeats = (2, 0) if "loop" in rival else (options.rounds, 3)
        times = compare(lambda m=metric: m(truth, found), function, torch.device("cpu"), *repeats)
        rows.append(
            {"metric": name, "rival": rival, "pixels": SIDE**2, "objects": OBJECTS}
            | times
            | header("metrics", torch.device("cpu"))
        )
    print_table(rows, [k for k in rows[0] if k in ("metric", "rival") or "ms" in k or "ratio" in k])
    if options.csv:
        write_csv(options.csv, rows)


def maps():
    """Cells that fill the image but for their borders, and the same moved and partly missing."""
    generator = np.random.default_rng(0)
    seeds = np.zeros((SIDE, SIDE), np.int32)
    places = generator.choice(seeds.size, OBJECTS, replace=False)
    seeds.flat[places] = np.arange(1, OBJECTS + 1)
    nearest = ndimage.distance_transform_edt(
        seeds == 0, return_distances=False, return_indices=True
    )
    cells = seeds[tuple(nearest)]
    edge = ndimage.maximum_filter(cells, 3) != ndimage.minimum_filter(cells, 3)
    truth = np.where(edge, 0, cells)
    found = np.roll(truth, (3, 2), (0, 1))
    return truth, np.where(found % 20 == 0, 0, found)


def alone(found, truth):
    """Pixels of reference objects that are predicted background as objects of their own."""
    result = found.astype(np.int64)
    missed = (truth > 0) & (found == 0)
    result[missed] = found.max() + 1 + np.arange(np.count_nonzero(missed))
    return result


def loop_seg(truth, found):
    """SEG as it is written down: object by object."""
    scores = []
    for r in np.unique(truth[truth > 0]):
        mask = truth == r
        ids, counts = np.unique(found[mask], return_counts=True)
        match = ids[(counts > 0.5 * mask.sum()) & (ids > 0)]
        other = found == match[0] if len(match) else np.zeros_like(mask)
        scores.append((mask & other).sum() / (mask | other).sum() if len(match) else 0.0)
    return np.mean(scores)


if __name__ == "__main__":
    main()
