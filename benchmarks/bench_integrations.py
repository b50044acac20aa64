"""Transforms and trainers of others with our operators in them, beside their own.

MONAI: a sample of image and labels through `ElasticDeformd`, and through its own elastic transform
with grids, magnitudes and interpolation as similar as can be. nnU-Net: a batch of patches through
what a trainer does with it, from patches as loaded to targets (and weights); and a whole step, from
data on disk to the optimiser's step, loaded in the same process. Its own trainer has no elastic
deformation and no weights, and rotates or scales a third of the samples; it is timed as it is, and
with elastic deformation, rotation and scale always, as ours has them.
"""

import os
import tempfile
from pathlib import Path

import torch

from unet_fast import Augmentation
from unet_fast.demo import SAMPLES

from .bench_elastic_deform import monai_rival, monai_volume_rival
from .interleave import Case, Rival, optional

MAGNITUDE = 10.0


def cases(device, peers):
    if not peers or device.type != "cpu":
        return
    yield from monai_cases()
    yield from nnunet_cases()


def monai_cases():
    transforms = optional("monai.transforms")
    if transforms is None:
        return
    from unet_fast.integrations.monai import ElasticDeformd

    for shape in ((512, 512), (64, 128, 128)):
        dims = len(shape)
        generator = torch.Generator().manual_seed(0)
        sample = {
            "image": torch.rand(1, *shape, generator=generator),
            "label": torch.randint(0, 50, (1, *shape), generator=generator, dtype=torch.int32),
        }
        still = {"rotation": 0.0, "gray_black": (0.0, 0.0), "gray_white": (1.0, 1.0)}
        elastic = Augmentation(sigma=MAGNITUDE, gray_slope=(1.0, 1.0), **still)
        ours = ElasticDeformd("image", "label", spatial_dims=dims, augmentation=elastic)
        rival = (monai_rival if dims == 2 else monai_volume_rival)(
            sample["image"][None], sample["label"]
        )
        found = ours(dict(sample))
        assert [found[key].shape for key in sample] == [x.shape for x in sample.values()]
        yield Case(
            f"MONAI, image and labels, {' x '.join(map(str, shape))}",
            "ElasticDeformd",
            lambda ours=ours, sample=sample: ours(dict(sample)),
            [rival],
        )


def nnunet_cases():
    if optional("nnunetv2") is None:
        return
    from .nnunet import prepare, trainer_in

    os.environ |= {"nnUNet_n_proc_DA": "0"}  # loads in this process
    with tempfile.TemporaryDirectory() as place:
        for dims in (2, 3):
            files = [
                sorted(SAMPLES[dims].glob(f"*/{kind}/*"), key=lambda file: (file.name, file))
                for kind in ("images", "labels")
            ]
            work = Path(place) / str(dims)
            prepare(*files, work, dims)
            trainers = [trainer_in(work, x, 0, dims, "all") for x in ("border", "stock", "stock")]
            for trainer in trainers:
                trainer.on_train_start()
            yield from of_trainers(*trainers)


def of_trainers(ours, stock, always):
    """Of a trainer of ours, nnU-Net's, and one of nnU-Net's that always deforms."""
    spatial = transforms_of(always).transforms[0]
    spatial.p_elastic_deform = spatial.p_rotation = spatial.p_scaling = 1
    raw = next(ours.dataloader_train)
    n = len(raw["data"])
    sides = " x ".join(map(str, ours.configuration_manager.patch_size))
    found = [ours.augmented(dict(raw)), augmented(stock, raw), augmented(always, raw)]
    for x in found:
        assert [t.shape for t in x["target"]] == [t.shape for t in found[0]["target"]]
        assert x["data"].shape == found[0]["data"].shape
    names = "nnU-Net, its transforms", "nnU-Net, elastic deformation always"
    both = list(zip(names, (stock, always), strict=True))
    yield Case(
        f"nnU-Net, patches to targets, {n} of {sides}",
        "nnUNetTrainerUNetFast",
        lambda: ours.augmented(dict(raw)),
        [Rival(name, lambda t=t: augmented(t, raw), "nnunetv2") for name, t in both],
        images=n,
    )

    def step(trainer):
        trainer.train_step(next(trainer.dataloader_train))

    yield Case(
        f"nnU-Net, training step with loading, {n} of {sides}",
        "nnUNetTrainerUNetFast",
        lambda: step(ours),
        [Rival(name, lambda t=t: step(t), "nnunetv2") for name, t in both],
        images=n,
    )


def transforms_of(trainer):
    return trainer.dataloader_train.data_loader.transforms


def augmented(trainer, batch):
    """What nnU-Net's loader makes of patches in its workers."""
    transforms = transforms_of(trainer)
    rows = [
        transforms(image=x.clone(), segmentation=y[:1].clone())
        for x, y in zip(batch["data"], batch["target"], strict=True)
    ]
    targets = zip(*(row["segmentation"] for row in rows), strict=True)
    return {
        "data": torch.stack([row["image"] for row in rows]),
        "target": [torch.stack(x) for x in targets],
    }
