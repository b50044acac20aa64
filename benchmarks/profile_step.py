"""Where the time of a training step goes, by torch.profiler: the paper's net, 572 -> 388.

python benchmarks/profile_step.py [--base-channels 16] [--device cuda] [--csv FILE]
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import torch
from interleave import header, write_csv
from torch.profiler import ProfilerActivity, profile

from unet_fast import TrainConfig, train
from unet_fast.demo import SAMPLE
from unet_fast.train import SPAN

PARTS = "tiles", "weights", "network", "loss", "backward", "optimizer"
CONVOLUTIONS = "aten::convolution", "aten::convolution_backward"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-channels", type=int, default=64)
    parser.add_argument("--tile", type=int, default=388)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="the first two do not count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with tempfile.TemporaryDirectory() as place, profile(activities=activities) as recorded:
        config = TrainConfig(
            SAMPLE / "train" / "images",
            SAMPLE / "train" / "labels",
            out=Path(place) / "run",
            steps=options.steps,
            base_channels=options.base_channels,
            tile=options.tile,
            batch_size=options.batch_size,
            device=options.device,
            validation=0,
            previews=0,
        )
        train(config)

    def milliseconds(event: torch.autograd.profiler_util.FunctionEvent) -> float:
        return (event.device_time_total if cuda else event.cpu_time_total) / 1000

    spans = {p: [e for e in recorded.events() if e.name == f"{SPAN} {p}"] for p in PARTS}
    spans = {p: sorted(events, key=lambda e: e.time_range.start)[2:] for p, events in spans.items()}
    begin = spans["tiles"][0].time_range.start
    parts = {p: median(map(milliseconds, events)) for p, events in spans.items()}
    whole = sum(milliseconds(e) for events in spans.values() for e in events)
    convolutions = sum(
        milliseconds(e)
        for e in recorded.events()
        if e.name in CONVOLUTIONS and e.time_range.start >= begin
    )
    steps = len(spans["tiles"])
    for part, time in parts.items():
        print(f"{part:<10} {time:9.2f} ms  {100 * time / sum(parts.values()):5.1f} %")
    share = convolutions / whole
    print(f"convolutions: {100 * share:.1f} % of {whole / steps:.1f} ms a step, mean of {steps}")
    if options.csv is None:
        return
    row = header("step", torch.device(options.device)) | {
        "base_channels": options.base_channels,
        "tile": options.tile,
        "batch_size": options.batch_size,
        "step ms": f"{whole / steps:.2f}",
        "convolutions": f"{share:.4f}",
        **{f"{part} ms": f"{time:.2f}" for part, time in parts.items()},
    }
    write_csv(options.csv, [row])


if __name__ == "__main__":
    main()
