"""Loops of others: DataLoader, Lightning, torchvision, albumentations."""

import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from peers import EXAMPLES, needs, run_page

from unet_fast import Augmentation, BorderWeights

pytestmark = pytest.mark.filterwarnings("default")


def test_examples_are_short():
    lengths = {file.name: len(file.read_text().splitlines()) for file in EXAMPLES.glob("*.py")}
    assert len(lengths) == 5
    assert max(lengths.values()) <= 60, lengths


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers(tmp_path, start):
    """They are processes of their own, however started."""
    words = ["--steps", "5", "--start", start]
    command = [sys.executable, EXAMPLES / "own_loop.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("epoch 0: loss ")
    assert done.stdout.endswith(" objects\n")


def test_lightning(tmp_path, monkeypatch, capsys):
    """The example trains, and its checkpoint keeps the settings."""
    needs("lightning")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_training.py", "--steps", "2"])
    names = runpy.run_path(str(EXAMPLES / "lightning_training.py"), run_name="__main__")
    assert capsys.readouterr().out.endswith(" objects\n")
    assert names["model"].hparams.weights == names["weights"]
    plain = torch.load(tmp_path / "lightning.ckpt", weights_only=True)
    assert plain["hyper_parameters"]["augmentation"] == Augmentation.paper_2015()


def test_torchvision():
    """Image and masks move as Augmentation moves them."""
    needs("torchvision")
    from torchvision import tv_tensors

    from unet_fast.integrations.torchvision import ElasticDeform

    image, ids = torch.rand(3, 40, 50), torch.randint(0, 9, (40, 50))
    masks = torch.stack([ids == k for k in range(1, 9)])
    augmentation = Augmentation(sigma=3.0)
    sample = tv_tensors.Image(image), {"ids": tv_tensors.Mask(ids)}, tv_tensors.Mask(masks), "name"
    torch.manual_seed(0)
    moved, named, apart, name = ElasticDeform(augmentation)(*sample)
    torch.manual_seed(0)
    expected = augmentation(image, ids)
    assert [type(x) for x in (moved, named["ids"])] == [tv_tensors.Image, tv_tensors.Mask]
    assert (named["ids"].dtype, apart.dtype, name) == (torch.int64, torch.bool, "name")
    for found, wanted in zip((moved, named["ids"]), expected, strict=True):
        torch.testing.assert_close(found.as_subclass(torch.Tensor), wanted)
    for k in range(1, 9):
        assert torch.equal(apart[k - 1].as_subclass(torch.Tensor), expected[1] == k)


def test_what_torchvision_cannot_move():
    needs("torchvision")
    from torchvision import tv_tensors

    from unet_fast.integrations.torchvision import ElasticDeform

    image = tv_tensors.Image(torch.rand(1, 9, 8))
    box = tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format="XYXY", canvas_size=(9, 8))
    with pytest.raises(TypeError, match=r"^ElasticDeform: sample must hold no BoundingBoxes"):
        ElasticDeform()(image, box)
    with pytest.raises(
        ValueError, match=r"masks must be of size \(9, 8\) as the image, got \(8, 8"
    ):
        ElasticDeform()(image, tv_tensors.Mask(torch.ones(8, 8)))
    with pytest.raises(ValueError, match=r"sample must hold one Image \(C, H, W\), got \[\]"):
        ElasticDeform()(torch.rand(1, 9, 8))


def test_the_page(tmp_path, monkeypatch):
    for name in ("lightning", "torchvision", "albumentations"):
        needs(name)
    monkeypatch.chdir(tmp_path)
    names = run_page("loaders.md")
    assert names["image"].shape == (3, 1, 64, 64)
    assert set(np.unique(names["found"]["mask"])) <= {0, 1, 2}
    assert names["found"]["image"].dtype == np.uint8
    assert isinstance(names["module"].hparams.weights, BorderWeights)
