"""Whole steps of training: from images and labels in memory to the optimiser's step.

The same real nuclei, optimiser (SGD with momentum 0.99) and precision for all; the memory layout is
that of the trainer for each device, but MONAI's network has its faster one, contiguous:

- ours: tiles cut, deformed and weighed on the device, within the step;
- reference: the same tiles and weights by `unet_fast.reference`, in the workers of a DataLoader,
  with the same network, and cross-entropy in plain PyTorch;
- MONAI: `Rand2DElasticd` and flips in the workers of a DataLoader, `BasicUNet`, `DiceCELoss`. It
  has no unpadded network and no border weights, and is compared with our padded network.

A block of steps is timed. Before the clock starts the workers have filled their queue while some
steps are trained, and while it runs they load as many batches as are used; then they come to rest,
so that they take nothing from whoever is next.
"""

import functools
import os
import time
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from unet_fast import Augmentation, BorderWeights, UNet, reference, weighted_ce
from unet_fast._device import precision_of, training_layout
from unet_fast.demo import SAMPLE
from unet_fast.training.runtime import as_cuda_graph
from unet_fast.training.samples import load_samples, number_objects
from unet_fast.training.tiles import Dataset

from .interleave import Case, Rival, optional

IGNORED = 255
AUGMENTATION = Augmentation.paper_2015()


@dataclass(frozen=True)
class Setting:
    """Of a recipe."""

    base: int = 16
    batch: int = 1
    padding: str = "valid"
    steps: int = 8
    """Of a block."""

    @property
    def name(self):
        sides = "572 -> 388" if self.padding == "valid" else "384 -> 384, padded"
        return f"base {self.base}, {sides}, batch {self.batch}"

    @functools.cached_property
    def shapes(self):
        """Spatial shapes of the tiles of image and labels."""
        side = 388 if self.padding == "valid" else 384
        net = UNet(base_channels=1, padding=self.padding)
        return net.input_shape((side, side)), (side, side)

    def network(self):
        torch.manual_seed(0)
        return UNet(base_channels=self.base, padding=self.padding)


class Learner:
    """A network, and what trains it."""

    def __init__(self, net, loss, device, layout=None):
        layout = layout or training_layout(device)
        self.dtype = precision_of("auto", device)
        self.net = net.to(device, memory_format=layout).train()
        self.loss, self.device, self.layout = loss, device, layout
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-4, momentum=0.99, fused=True)

    def scores(self, tiles):
        tiles = tiles.contiguous(memory_format=self.layout)
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled):
            return self.net(tiles)

    def learn(self, tiles, *targets):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.scores(tiles), *targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def data_on(device):
    """The bundled images of nuclei."""
    samples = load_samples(SAMPLE / "train" / "images", SAMPLE / "train" / "labels")
    objects = number_objects(samples, "instances", None)
    data = Dataset(samples, objects, BorderWeights.paper_2015(), device, float("inf"))
    data.balanced()
    return data


def our_loss(scores, target, weights):
    return weighted_ce(scores, target, weights, ignore_index=IGNORED)


def plain_loss(scores, target, weights):
    ce = F.cross_entropy(scores, target.long(), reduction="none", ignore_index=IGNORED)
    return (ce * weights).sum() / weights.sum()


def learned(learner, data, tiles, labels):
    """A step from tiles to new weights; the loss, twice: `as_cuda_graph` is about two results."""
    loss = learner.learn(tiles, *data.targets(labels))
    return loss, loss


class Ours:
    """Our recipe, on a GPU as a CUDA graph."""

    def __init__(self, setting, device):
        self.setting, self.data, self.step = setting, data_on(device), 0
        self.learner = Learner(setting.network(), our_loss, device)
        learn = functools.partial(learned, self.learner, self.data)
        self.compute = as_cuda_graph(learn, device) if device.type == "cuda" else learn

    def tiles(self):
        """Of the next step."""
        self.step += 1
        shapes = self.setting.shapes
        drawn = self.data.draw(AUGMENTATION, self.setting.batch, *shapes, seed=0, step=self.step)
        return self.data.cut(AUGMENTATION, drawn, *shapes)

    def block(self):
        """The seconds of a step, the mean of some."""
        start = time.perf_counter()
        for _ in range(self.setting.steps):
            loss, _ = self.compute(*self.tiles())
        loss.item()
        return (time.perf_counter() - start) / self.setting.steps


class PlainTiles(torch.utils.data.Dataset):
    """The tiles of our recipe, by the references: number i is one of step i + 1."""

    def __init__(self, setting):
        self.setting, self.data = setting, data_on(torch.device("cpu"))

    def __getitem__(self, i):
        shapes, data = self.setting.shapes, self.data
        drawn = data.draw(AUGMENTATION, 1, *shapes, seed=0, step=i + 1)
        image, labels = data.sample(drawn.files[0])
        parameters = drawn.parameters
        tile, ids = reference.elastic_deform(
            image[None],
            parameters.displacement,
            labels=labels[None],
            affine=parameters.affine,
            gray_curve=parameters.gray_curve,
            grid=AUGMENTATION.grid,
            grid_spacing=AUGMENTATION.spacing,
            output_shape=shapes[0],
            label_shape=shapes[1],
            offset=drawn.offset,
        )
        weights = data.weights
        target, weight = reference.border_weights(
            ids,
            ridge=weights.ridge,
            w0=weights.w0,
            sigma=weights.sigma,
            class_weight=weights.class_weight,
        )
        return tile[0], target[0], weight[0]


class Window(torch.utils.data.Sampler):
    """Numbers of the samples of the next block."""

    def __init__(self, count):
        self.count, self.first = count, 0

    def __iter__(self):
        self.first += self.count
        return iter(range(self.first - self.count, self.first))

    def __len__(self):
        return self.count


class Loaded:
    """A recipe whose tiles come from the workers of a DataLoader."""

    def __init__(self, setting, learner, tiles):
        self.learner, self.device = learner, learner.device
        self.workers = min(len(os.sched_getaffinity(0)), 16)
        # Where loading is what takes long, batches come in bursts of one from each worker.
        self.steps = -(-setting.steps // self.workers) * self.workers
        ahead = 2  # batches that each worker loads in advance, the default
        count = self.workers + self.steps + ahead * self.workers
        self.loader = DataLoader(
            tiles,
            batch_size=setting.batch,
            sampler=Window(count * setting.batch),
            num_workers=self.workers,
            prefetch_factor=ahead,
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
        )

    def learn(self, batches, steps):
        """Trains some steps."""
        for _ in range(steps):
            batch = (x.to(self.device, non_blocking=True) for x in next(batches))
            loss = self.learner.learn(*batch)
        loss.item()

    def block(self):
        """The seconds of a step, the mean of some."""
        batches = iter(self.loader)
        self.learn(batches, self.workers)
        start = time.perf_counter()
        self.learn(batches, self.steps)
        seconds = (time.perf_counter() - start) / self.steps
        for _ in batches:
            pass
        return seconds


def plain(setting, device):
    return Loaded(setting, Learner(setting.network(), plain_loss, device), PlainTiles(setting))


class MonaiTiles(torch.utils.data.Dataset):
    """Tiles and masks by MONAI's transforms."""

    def __init__(self, setting, transforms):
        data, side = data_on(torch.device("cpu")), setting.shapes[1]
        self.samples = [data.sample(i) for i in range(len(data))]
        keys = "image", "label"
        self.transform = transforms.Compose(
            [
                transforms.RandFlipd(keys, prob=0.5, spatial_axis=0),
                transforms.Rand2DElasticd(
                    keys,
                    spacing=(side[0] / 2, side[1] / 2),
                    magnitude_range=(10, 10),
                    prob=1,
                    rotate_range=3.14,
                    spatial_size=side,
                    mode=("bilinear", "nearest"),
                    padding_mode="reflection",
                ),
            ]
        )

    def __getitem__(self, i):
        image, labels = self.samples[i % len(self.samples)]
        found = self.transform({"image": image, "label": (labels > 0)[None].float()})
        return found["image"].as_tensor(), found["label"].as_tensor()


def monai_recipe(setting, device):
    """None where MONAI is not installed."""
    transforms, nets, losses = (
        optional(f"monai.{name}") for name in ("transforms", "networks.nets", "losses")
    )
    if transforms is None:
        return None
    features = [setting.base * k for k in (1, 2, 4, 8, 16, 1)]
    torch.manual_seed(0)
    net = nets.BasicUNet(2, 1, 2, features=features)
    loss = losses.DiceCELoss(to_onehot_y=True, softmax=True)
    learner = Learner(net, loss, device, torch.contiguous_format)
    return Loaded(setting, learner, MonaiTiles(setting, transforms))


class Plain(nn.Module):
    """A padded U-Net as most repositories have it: batch norm after each convolution, eager."""

    def __init__(self, base, num_classes=2):
        super().__init__()
        widths = [base * 2**k for k in range(5)]

        def block(before, after):
            layers = []
            for channels in (before, after):
                layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList(map(block, [1, *widths], widths))
        wide, narrow = widths[:0:-1], widths[-2::-1]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in zip(wide, narrow, strict=True)
        )
        self.merge = nn.ModuleList(map(block, wide, narrow))
        self.last = nn.Conv2d(base, num_classes, 1)

    def forward(self, x):
        kept = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        for up, merge, other in zip(self.up, self.merge, kept[-2::-1], strict=True):
            x = merge(torch.cat([other, up(x)], 1))
        return self.last(x)


def operations(setting):
    """Of one step: forward, and twice as many backward."""
    return 3 * forward_operations(setting, (setting.batch, 1, *setting.shapes[0]))


def forward_operations(setting, shape):
    """Of a network and an input of some shape."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        setting.network()(torch.empty(shape))
    return counter.get_total_flops()


def check(setting):
    """That ours and the reference see the same tiles, targets and weights, and lose the same."""
    cpu = torch.device("cpu")
    ours, theirs = Ours(setting, cpu), PlainTiles(setting)
    tiles, labels = ours.tiles()
    found = tiles, *ours.data.targets(labels)
    expected = [x[None] for x in theirs[0]]
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4)
    assert (found[1] == expected[1]).double().mean() > 0.999
    assert (found[2] - expected[2]).abs().double().mean() < 1e-2
    scores = ours.learner.scores(tiles).float()
    losses = [f(scores, *found[1:]) for f in (our_loss, plain_loss)]
    torch.testing.assert_close(*losses)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["unet_fast", "reference"])
def bench_step(benchmark, device, timed, name):
    setting = Setting(steps=2)
    check(setting)
    recipe = Ours(setting, device) if name == "unet_fast" else plain(setting, device)
    recipe.block()
    benchmark.group = f"{setting.steps} steps, {setting.name}, {device}"
    timed(recipe.block, rounds=3)


def cases(device, peers):
    if device.type == "cuda":
        settings = [Setting(base, batch, steps=16) for base in (64, 16) for batch in (1, 8)]
        padded = [Setting(base, 8, "same", 16) for base in (64, 16)]
    else:
        settings = [Setting(16), Setting(64, steps=2)]
        padded = [Setting(16, 1, "same"), Setting(64, 1, "same", 2)]
    check(Setting())
    for setting in settings:
        ours = Ours(setting, device)
        yield case(setting, ours, [Rival("reference, DataLoader", plain(setting, device).block)])
    for setting in padded if peers else []:
        ours, recipe = Ours(setting, device), monai_recipe(setting, device)
        block = None if recipe is None else recipe.block
        rival = Rival("MONAI: transforms, BasicUNet, DiceCELoss", block, "monai")
        yield case(setting, ours, [rival])
    for setting in padded:
        yield network_case(setting, device)


def case(setting, ours, rivals):
    return Case(
        setting.name,
        "whole recipe",
        ours.block,
        rivals,
        operations=operations(setting),
        precision=ours.learner.dtype,
        images=setting.batch,
        timed=True,
    )


def network_case(setting, device):
    """The network alone, forward and backward, of the shape that most repositories have."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.rand(setting.batch, 1, *setting.shapes[0], generator=generator).to(device)
    target = torch.randint(0, 2, (setting.batch, *setting.shapes[1]), generator=generator)
    target, weights = target.to(device), torch.ones(target.shape, device=device)
    nets = (
        UNet(base_channels=setting.base, padding="same", norm="batch", dropout=0),
        Plain(setting.base),
    )
    ours, theirs = (
        Learner(net, loss, device) for net, loss in zip(nets, (our_loss, plain_loss), strict=True)
    )
    return Case(
        f"{setting.name}, batch norm",
        "network, loss, optimiser",
        lambda: ours.learn(tiles, target, weights),
        [Rival("plain U-Net, eager", lambda: theirs.learn(tiles, target, weights))],
        operations=operations(setting),
        precision=ours.dtype,
        images=setting.batch,
    )


def growth(device, peers):
    """The step of our recipe against batch."""
    for batch in (1, 2, 4):
        setting = Setting(batch=batch, steps=2)
        yield replace(case(setting, Ours(setting, device), []), axis="batch", x=batch)
