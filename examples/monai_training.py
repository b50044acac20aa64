"""Trains a U-Net of MONAI on bundled nuclei: `python examples/monai_training.py --steps 300`."""

import argparse
from itertools import chain, islice, repeat

import torch
from monai.data import CacheDataset, DataLoader, Dataset
from monai.inferers import sliding_window_inference
from monai.networks.nets import BasicUNet
from monai.transforms import Compose, LoadImaged, RandSpatialCropd, ScaleIntensityd
from monai.utils import set_determinism

from unet_fast import BorderWeights, label_components, metrics, weighted_ce
from unet_fast.demo import SAMPLE
from unet_fast.integrations.monai import BorderWeightsd, ElasticDeformd

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
steps = parser.parse_args().steps
set_determinism(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
both = ["image", "label"]
load = Compose(  # dtype=None keeps labels integer
    [LoadImaged(both, ensure_channel_first=True, dtype=None), ScaleIntensityd("image")]
)


def samples(part):
    """Images and labels of a folder, in memory."""
    images = sorted((SAMPLE / part / "images").glob("*.png"))
    pairs = [{"image": p, "label": SAMPLE / part / "labels" / p.name} for p in images]
    return CacheDataset(pairs, load, progress=False)


train = samples("train")
crop = RandSpatialCropd(both, 256, random_size=False)
loader = DataLoader(Dataset(train, crop), batch_size=4, shuffle=True)
weights = BorderWeights.paper_2015().balanced(sample["label"][0] for sample in train)
deform = ElasticDeformd("image", "label", spatial_dims=2)
weigh = BorderWeightsd("label", spatial_dims=2, weights=weights)
augment = Compose([deform, weigh])  # of whole batches, on the device
network = BasicUNet(2, 1, 2, features=(16, 16, 32, 64, 128, 16)).to(device)
optimizer = torch.optim.Adam(network.parameters(), 1e-3)
batches = chain.from_iterable(repeat(loader))
for step, batch in enumerate(islice(batches, steps), 1):
    batch = augment({key: batch[key].to(device) for key in both})
    scores = network(batch["image"])
    loss = weighted_ce(scores, batch["label_target"], batch["label_weights"], ignore_index=255)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 or step == steps:
        print(f"step {step}: loss {loss.item():.3f}")
network.eval().requires_grad_(False)
found = []
for sample in samples("test"):
    scores = sliding_window_inference(sample["image"][None].to(device), 256, 4, network)
    objects = label_components(scores.softmax(1)[:, 1] > 0.9)  # high: borders are doubtful
    found.append(metrics.detection(sample["label"].cpu(), objects.cpu()))
print(f"objects found: {sum(x.found for x in found)} of {sum(x.found + x.missed for x in found)}")
