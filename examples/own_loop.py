"""Trains a plain network on bundled nuclei in a loop of your own: `python examples/own_loop.py`."""

import argparse

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from unet_fast import Augmentation, BorderWeights, label_components, weighted_ce
from unet_fast.demo import SAMPLE


def read(part, kind):
    """Grey values, or the number of the cell of each pixel, of the images of a folder."""
    return [np.int32(Image.open(file)) for file in sorted((SAMPLE / part / kind).glob("*.png"))]


class Cells(Dataset):
    """Deformed samples with target classes and weights, made in the workers of a DataLoader."""

    def __init__(self, part, side=196):
        self.images, self.labels, self.side = read(part, "images"), read(part, "labels"), side
        self.augment = Augmentation.paper_2015()  # draws from torch's numbers, which workers seed
        self.weigh = BorderWeights.paper_2015().balanced(self.labels)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, labels = np.float32(self.images[i] / 255), self.labels[i]
        top, left = (int(torch.randint(n - self.side + 1, ())) for n in image.shape)
        tile = np.s_[top : top + self.side, left : left + self.side]
        image, labels = self.augment(image[tile], labels[tile])
        return image[None], *self.weigh(labels)  # one channel, classes, weights


def main(steps, start):
    network = nn.Sequential(nn.Conv2d(1, 8, 9, padding=4), nn.ReLU(), nn.Conv2d(8, 2, 9, padding=4))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    workers = {"num_workers": 2, "multiprocessing_context": start}
    loader = DataLoader(Cells("train"), batch_size=4, shuffle=True, **workers)
    for epoch in range(-(-steps // len(loader))):
        for image, target, weights in loader:
            loss = weighted_ce(network(image), target, weights, ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    image = torch.from_numpy(read("test", "images")[0])[None, None] / 255
    probability = network(image).softmax(1)[0, 1]
    print(f"{label_components(probability > 0.9).max()} objects")


if __name__ == "__main__":  # with spawn the workers import this file
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--start", choices=["fork", "spawn"], default="spawn")
    main(**vars(parser.parse_args()))
