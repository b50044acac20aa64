"""Tiled prediction against MONAI's sliding window and against the bare network.

The sliding window averages overlapping tiles, and hides its seams as well as the overlap allows.
First it is found out which of several overlaps hides them best: where the largest difference of a
probability to that of the whole image, away from its border, is least. Ours, which has no seams, is
timed against that and against the usual overlap of a quarter, with the same network, precision and
layout of memory; and against the bare network on as many pixels as ours computes.

    python -m benchmarks.bench_predict --model RUN --csv benchmarks/results/predict_cpu.csv

RUN is a trained padded network: the sliding window cannot serve an unpadded one. Needs the package
monai. The suite (`python -m benchmarks.run`) times the same on a smaller image with a network that
nobody trained, which takes as long.
"""

import argparse
import contextlib
import functools
from pathlib import Path

import numpy as np
import torch

from unet_fast import UNet, load_model, predict
from unet_fast._device import find_device, precision_of
from unet_fast.images.files import read_image
from unet_fast.images.intensity import normalise
from unet_fast.images.source import list_sources
from unet_fast.prediction.options import Options
from unet_fast.prediction.predictor import Predictor

from .bench_step import Setting, forward_operations
from .interleave import (
    COLUMNS,
    Case,
    Rival,
    compare,
    header,
    name_of,
    optional,
    peak_resident_megabytes,
    print_table,
    write_csv,
)

SETTINGS = [
    (window, overlap, mode)
    for window in (512, 1024)
    for overlap in (0.25, 0.375, 0.5, 0.625)
    for mode in ("constant", "gaussian")
]
"""Of the sliding window."""
USUAL = (512, 0.25, "gaussian")
BORDER = 112
"""Pixels at the border of the image on which mirroring, which MONAI does not do, has a say."""


def mosaic(side):
    """Real nuclei, turned, tile by tile, until the side is filled."""
    folder = Path(__file__).parents[1] / "unet_fast" / "sample" / "test" / "images"
    images = [normalise(read_image(file)[:1])[0, :256, :256] for file in list_sources(folder)]
    count = -(-side // 256)
    rows = [
        np.concatenate(
            [np.rot90(images[(7 * r + c) % len(images)], r + c) for c in range(count)], 1
        )
        for r in range(count)
    ]
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(rows)[:side, :side]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--side", default=4096, type=int)
    names = ["float32", "bfloat16"]
    parser.add_argument("--precision", nargs="*", default=names, choices=names)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    for name in ("side", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"argument --{name}: must be >= 1, got {getattr(arguments, name)}")
    try:
        arguments.device = find_device(arguments.device)
        net = load_model(arguments.model, device=arguments.device)
        net.to(memory_format=torch.channels_last)  # so that rivals, too, get the faster layout
    except (OSError, ValueError) as error:
        parser.error(str(error))
    net.normalisation = None  # the mosaic is normalised
    monai = optional("monai.inferers")
    settings = [] if monai is None else [USUAL, best_hidden(net, monai, arguments.device)]
    for name in arguments.precision:
        rows = list(timed(net, settings, getattr(torch, name), arguments))
        if arguments.csv is not None:
            write_csv(arguments.csv, rows)


def windows(device):
    """Of the sliding window at once: a GPU has room for several."""
    return 16 if device.type == "cuda" else 1


def windowed(net, monai, image, setting, dtype, device):
    """MONAI's probabilities, (K, H, W)."""
    window, overlap, mode = setting
    inputs = image[None, None].to(device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), precision(device, dtype):
        scores = monai.sliding_window_inference(
            inputs, window, windows(device), net, overlap=overlap, mode=mode
        )
    return scores[0].float().softmax(0).cpu()


def best_hidden(net, monai, device):
    """The setting of the sliding window that differs least from the whole image, in float32."""
    image = mosaic(1536)
    inside = (slice(None), slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    whole = predict(net, image, tile=1536)[inside]
    print("largest difference of a probability to that of the whole image, float32")
    print(
        f"  ours, tiles of 512: {(predict(net, image, tile=512)[inside] - whole).abs().max():.2g}"
    )
    errors = {}
    for setting in SETTINGS:
        found = windowed(net, monai, image, setting, torch.float32, device)[inside]
        errors[setting] = float((found - whole).abs().max())
        print("  MONAI, window {}, overlap {}, {}:".format(*setting), f"{errors[setting]:.2g}")
    return min(SETTINGS, key=errors.get)


def functions(net, image, settings, dtype, device):
    """Ours; the rivals by name: the bare network, sliding windows; what the network computes."""
    side = image.shape[-1]
    tiling = Predictor(net, Options(precision=name_of(dtype))).plan((side, side))
    inputs = torch.rand(tiling.batch, 1, *tiling.input, device=device)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    tiles = len(tiling.origins)
    monai = optional("monai.inferers")

    def ours():
        return predict(net, image, precision=dtype)

    def bare():
        with torch.inference_mode(), precision(device, dtype):
            for _ in range(tiles // tiling.batch):
                net(inputs)

    rivals = {f"bare network, {tiles} x {tiling.input[0]} x {tiling.input[1]}": bare}
    for setting in settings:
        rival = functools.partial(windowed, net, monai, image, setting, dtype, device)
        rivals["MONAI, window {}, overlap {}, {}".format(*setting)] = (
            None if monai is None else rival
        )
    return ours, rivals, (tiles, 1, *tiling.input)


def timed(net, settings, dtype, arguments):
    """A row for each rival."""
    device, side = arguments.device, arguments.side
    image = mosaic(side)
    ours, rivals, _ = functions(net, image, settings, dtype, device)
    case = f"base {net.head.in_channels}, padded, {side} x {side}, {name_of(dtype)}"
    for name, rival in rivals.items():
        row = dict.fromkeys(COLUMNS, "") | {"suite": "predict", "case": case, "ours": "predict"}
        row |= {"rival": name, **header(device)}
        row |= compare(ours, rival, device, budget=0, least=arguments.rounds)
        if device.type == "cpu":
            row["ours MB"] = f"{peak_resident_megabytes(ours):.0f}"
            row["rival MB"] = f"{peak_resident_megabytes(rival):.0f}"
        print_table(
            [row], ["case", "rival", "ours ms", "rival ms", "ratio p50", "ours MB", "rival MB"]
        )
        yield row


def cases(device, peers):
    """Ours against the bare network and MONAI; the network alone, with the paper's shapes."""
    dtype = precision_of("auto", device)
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    net = UNet(base_channels=16, padding="same").eval()
    net.to(device, memory_format=torch.channels_last)  # so that rivals, too, get the faster layout
    check(net, device)
    side = 4096 if cuda else 2048
    settings = [USUAL, (512, 0.5, "gaussian")] if peers else []
    ours, rivals, shape = functions(net, mosaic(side), settings, dtype, device)
    rivals = [
        Rival(name, rival, "monai" if name.startswith("MONAI") else None)
        for name, rival in rivals.items()
    ]
    yield Case(
        f"base 16, padded, {side} x {side}",
        "predict",
        ours,
        rivals,
        operations=forward_operations(Setting(16, padding="same"), shape),
        precision=dtype,
        images=1,
    )
    for base, batch in [(64, 1), (64, 16), (16, 16)] if cuda else [(64, 1), (16, 1)]:
        setting = Setting(base, batch)
        net = setting.network().to(device, memory_format=torch.channels_last).eval()
        inputs = torch.rand(batch, 1, *setting.shapes[0], device=device)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        yield Case(
            setting.name,
            "network, inference",
            functools.partial(inferred, net, inputs, dtype, device),
            operations=forward_operations(setting, inputs.shape),
            precision=dtype,
            images=batch,
        )


def check(net, device):
    """Tiles are as the whole. Without TF32, whose sums differ from one convolution to another."""
    image = mosaic(384)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        whole, tiled = (predict(net, image, tile=tile, device=device) for tile in (384, 128))
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def inferred(net, inputs, dtype, device):
    with torch.inference_mode(), precision(device, dtype):
        return net(inputs)


def precision(device, dtype):
    """Autocast, if it is not float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


if __name__ == "__main__":
    main()
