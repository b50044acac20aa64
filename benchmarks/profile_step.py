"""Where the time of a training step goes, by torch.profiler: the paper's net, 572 -> 388.

python -m benchmarks.profile_step [--base-channels 16] [--device cuda]
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from unet_fast import TrainConfig, train
from unet_fast._device import find_device
from unet_fast.demo import SAMPLE
from unet_fast.training.step import SPAN

from .interleave import COLUMNS, header

PARTS = "tiles", "weights", "network", "loss", "backward", "optimizer"
CONVOLUTIONS = "aten::convolution", "aten::convolution_backward"
CONVOLUTION_PART = "convolutions among them"


def profiled(base_channels, tile, batch_size, steps, device):
    """Median milliseconds of each part, and the share of convolutions; two steps do not count."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with tempfile.TemporaryDirectory() as place, profile(activities=activities) as recorded:
        config = TrainConfig(
            SAMPLE / "train" / "images",
            SAMPLE / "train" / "labels",
            out=Path(place) / "run",
            steps=steps,
            base_channels=base_channels,
            tile=tile,
            batch_size=batch_size,
            device=str(device),
            validation=0,
            previews=0,
        )
        train(config)

    # On a GPU a span has a copy there, of the same name; the time of its kernels is that of all
    # that was launched meanwhile, by any thread: backward runs in one of its own.
    calls = [e for e in recorded.events() if e.device_type == DeviceType.CPU]

    def milliseconds(span):
        if not cuda:
            return span.cpu_time_total / 1000
        begin, end = span.time_range.start, span.time_range.end
        inside = (e for e in calls if begin <= e.time_range.start < end)
        return sum(kernel.duration for e in inside for kernel in e.kernels) / 1000

    spans = {p: [e for e in calls if e.name == f"{SPAN} {p}"] for p in PARTS}
    spans = {p: sorted(events, key=lambda e: e.time_range.start)[2:] for p, events in spans.items()}
    times = {p: [milliseconds(e) for e in events] for p, events in spans.items()}
    begin = spans["tiles"][0].time_range.start
    convolutions = sum(
        (e.device_time_total if cuda else e.cpu_time_total) / 1000
        for e in calls
        if e.name in CONVOLUTIONS and e.time_range.start >= begin
    )
    share = convolutions / sum(map(sum, times.values()))
    return {p: median(some) for p, some in times.items()}, share


def rows(device):
    """Of the suite: the paper's network and that of base 16."""
    steps = 20 if device.type == "cuda" else 5
    settings = [(64, 1), (64, 8)] if device.type == "cuda" else [(64, 1), (16, 1)]
    for base, batch in settings:
        parts, convolutions = profiled(base, 388, batch, steps, device)
        whole = sum(parts.values())
        times = parts | {CONVOLUTION_PART: convolutions * whole}
        for part, time in times.items():
            row = dict.fromkeys(COLUMNS, "") | {"suite": "breakdown", "ours": part}
            row |= {"case": f"base {base}, 572 -> 388, batch {batch}", "limit": "the step"}
            yield row | {
                "ours ms": f"{time:.4f}",
                "rounds": steps - 2,
                "share": f"{time / whole:.4f}",
                **header(device),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-channels", type=int, default=64)
    parser.add_argument("--tile", type=int, default=388)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="the first two do not count")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"argument --steps: must be >= 3, got {options.steps}")
    try:
        options.device = find_device(options.device)
        parts, convolutions = profiled(**vars(options))
    except ValueError as error:
        parser.error(str(error))
    whole = sum(parts.values())
    for part, time in parts.items():
        print(f"{part:<10} {time:9.2f} ms  {100 * time / whole:5.1f} %")
    print(f"convolutions: {100 * convolutions:.1f} % of {whole:.1f} ms a step")


if __name__ == "__main__":
    main()
