"""Segmentation metrics against scikit-image, a loop over objects and a plain pass over the pixels.

2048 x 2048 pixels with 2,000 reference and as many predicted objects. A pass counts the pixels that
differ between the two maps.
"""

import functools

import numpy as np
from scipy import ndimage

from unet_fast import metrics

from .interleave import Case, Rival, optional

SIDE, OBJECTS = 2048, 2000


def cases(device, peers):
    """On the CPU, whatever the device."""
    if device.type != "cpu":
        return
    truth, found = maps()
    one_pass = Rival("one pass", lambda: np.count_nonzero(truth != found))
    assert abs(loop_seg(truth[:512, :512], found[:512, :512]) - seg_of_part(truth, found)) < 1e-12
    theirs = {
        "v_rand": "adapted_rand_error",
        "v_info": "variation_of_information",
        "seg": None,
        "average_precision": None,
    }
    skimage = optional("skimage.metrics")
    if peers and skimage is not None:
        # scikit-image leaves out pairs of a pixel with itself, and takes what is predicted
        # background for one object: numbered for this check, not where it is timed.
        v_rand = 1 - skimage.adapted_rand_error(truth, alone(found, truth))[0]
        assert abs(v_rand - metrics.v_rand(truth, found)) < 1e-4
    for name, other in theirs.items():
        rivals = [one_pass]
        if name == "seg":
            rivals.append(Rival("loop over objects", lambda: loop_seg(truth, found), "numpy"))
        if peers and other is not None:
            function = None
            if skimage is not None:
                function = functools.partial(getattr(skimage, other), truth, found)
            rivals.append(Rival(f"scikit-image {other}", function, "scikit-image"))
        run = functools.partial(getattr(metrics, name), truth, found)
        yield Case(f"{SIDE} x {SIDE}, {OBJECTS} objects", name, run, rivals)


def seg_of_part(truth, found):
    return metrics.seg(truth[:512, :512], found[:512, :512])


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
