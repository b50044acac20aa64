"""Times border_weight_map and two_nearest against distance transforms of SciPy and of `edt`.

`pytest benchmarks` shows all with pytest-benchmark. `python benchmarks/bench_border_weight_map.py`
runs ours and each rival in turn (A B A B), prints a table of medians and medians of the ratios, and
with `--csv FILE` keeps it. The package edt (`pip install edt`) and, on CUDA, cupy are rivals where
they are installed. Rivals that make one distance transform per object compute the two distances
only; those of volumes are timed on a tenth of the objects, ten times over.
"""

import interleave
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial import cKDTree

from unet_fast import border_weight_map, reference, two_nearest

# name: sides and number of cells
CASES = {
    "200 cells": ((512, 512), 200),
    "2000 cells": ((512, 512), 2000),
    "3200 cells": ((2048, 2048), 3200),
}
VOLUME = ((128, 128, 128), 300)
BATCH = 16


def crowded(sides, cells):
    """Round cells around random points; a good part of them touch. int32."""
    generator = np.random.default_rng(0)
    centres = generator.random((cells, len(sides))) * sides
    grid = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), -1)
    distance, nearest = cKDTree(centres).query(grid)
    radius = 0.45 * (np.prod(sides) / cells) ** (1 / len(sides))
    return torch.from_numpy(np.where(distance < radius, nearest + 1, 0).astype(np.int32))


def per_object(transform, labels, share=1):
    """The two distances of every pixel by one transform per object, running minima."""
    ids = np.unique(labels[labels > 0])
    first, second = np.full((2, *labels.shape), np.inf, dtype=np.float32)
    for _ in range(share):
        for label in ids[::share]:
            distance = transform(labels != label)
            np.minimum(second, np.maximum(first, distance), out=second)
            np.minimum(first, distance, out=first)
    return first, second


def rivals(labels, share=1):
    """(name, function, rounds)."""
    array = labels.numpy()
    yield (
        "SciPy per object",
        lambda: per_object(ndimage.distance_transform_edt, array, share),
        5 if share == 1 else 3,
    )
    edt = interleave.optional("edt")
    if edt is None:
        return
    threads = torch.get_num_threads()
    yield (
        "edt per object",
        lambda: per_object(lambda x: edt.edt(x, parallel=threads), array, share),
        5,
    )
    background = array == 0
    yield "one edt", lambda: edt.edt(background, parallel=threads), 100


def check(labels):
    expected = reference.two_nearest(labels)
    for ours, theirs in zip(two_nearest(labels), expected, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(
        border_weight_map(labels), reference.border_weight_map(labels), rtol=1e-6, atol=1e-6
    )


FUNCTIONS = [border_weight_map, two_nearest]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def bench_border_weight_map(benchmark, device, case, function):
    check(crowded((128, 96), 12))
    labels = crowded(*CASES[case]).to(device)

    def run():
        function(labels)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"border weight map, {case}, {device}"
    benchmark(run)


def row(device, case, ours, rival, compared):
    start = {**interleave.header("border_weight_map", device), "case": case}
    return {**start, "ours": ours, "rival": rival, **compared}


def measure_cpu(rounds):
    cpu = torch.device("cpu")
    images = {case: crowded(*setting) for case, setting in CASES.items()}
    few = images["200 cells"]
    check(few)
    for function in FUNCTIONS:
        for name, rival, most in rivals(few):
            compared = interleave.compare(
                lambda f=function: f(few), rival, cpu, min(rounds, most), min(3, most // 2)
            )
            yield row(cpu, "512x512, 200 cells", function.__name__, name, compared)
        for case in ("2000 cells", "3200 cells"):
            compared = interleave.compare(
                lambda f=function: f(few), lambda f=function, c=case: f(images[c]), cpu, rounds
            )
            side = len(images[case])
            yield row(
                cpu,
                "512x512, 200 cells",
                function.__name__,
                f"same on {side}x{side}, {case}",
                compared,
            )
    volume = crowded(*VOLUME)[None]
    name, rival, most = next(rivals(volume[0], share=10))
    compared = interleave.compare(lambda: border_weight_map(volume), rival, cpu, most, 1)
    yield row(cpu, "128x128x128, 300 objects", "border_weight_map", name, compared)


def measure_cuda(device, rounds):
    cupyx = interleave.optional("cupyx.scipy.ndimage")
    labels = crowded(*CASES["200 cells"])
    batch = torch.stack([labels.roll(7 * i, -1) for i in range(BATCH)]).to(device)
    torch.testing.assert_close(border_weight_map(batch).cpu(), border_weight_map(batch.cpu()))
    copied = torch.empty_like(batch)
    for function in FUNCTIONS:
        compared = interleave.compare(
            lambda f=function: f(batch), lambda: copied.copy_(batch), device, rounds
        )
        yield row(
            device,
            f"{BATCH} of 512x512, 200 cells",
            function.__name__,
            "copy of the labels",
            compared,
        )
    if cupyx is not None:
        import cupy

        background = cupy.asarray(batch[0] == 0)
        compared = interleave.compare(
            lambda: border_weight_map(batch[0]),
            lambda: cupyx.distance_transform_edt(background),
            device,
            rounds,
        )
        yield row(device, "512x512, 200 cells", "border_weight_map", "one cupyx edt", compared)


def main():
    arguments = interleave.arguments_of(__doc__)
    device = arguments.device
    if device.type == "cpu":
        large = crowded(*CASES["3200 cells"])
        border_weight_map(large[:64, :64])
        extra = interleave.peak_resident_megabytes(lambda: border_weight_map(large))
        print(f"2048x2048: {1e6 * extra / large.numel():.1f} bytes a pixel with the result's 4")
        rows = list(measure_cpu(arguments.rounds))
    else:
        rows = list(measure_cuda(device, arguments.rounds))
    columns = ["case", "ours", "rival", "ours ms", "rival ms"]
    interleave.print_table(rows, [*columns, "ratio p20", "ratio p50", "ratio p80"])
    if arguments.csv:
        interleave.write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
