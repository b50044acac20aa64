"""Trains a U-Net with Lightning on bundled nuclei: `python examples/lightning_training.py`."""

import argparse

import lightning
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from unet_fast import Augmentation, BorderWeights, UNet, label_components, weighted_ce
from unet_fast.demo import SAMPLE


def read(part, kind, side=256):
    """The upper left corners of the images, or of the labels, of a folder."""
    files = sorted((SAMPLE / part / kind).glob("*.png"))
    return torch.stack([torch.from_numpy(np.int32(Image.open(f)))[:side, :side] for f in files])


class Segmentation(lightning.LightningModule):
    """Deforms batches and weighs their borders on the device."""

    def __init__(self, weights, augmentation, width=16):
        super().__init__()
        self.save_hyperparameters()  # checkpoints hold the settings of weights and augmentation
        self.network = UNet(base_channels=width, depth=3, padding="same", dropout=0.0)

    def training_step(self, batch, _):
        image, labels = self.hparams.augmentation(*batch)
        target, weights = self.hparams.weights(labels)
        loss = weighted_ce(self.network(image), target, weights, ignore_index=255)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)

    def predict_step(self, batch, _):
        probability = self.network(batch[0]).softmax(1)[:, 1]
        return label_components(probability > 0.9)  # high: borders are doubtful


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    labels = read("train", "labels")
    data = TensorDataset(read("train", "images")[:, None] / 255, labels)
    weights = BorderWeights.paper_2015().balanced(labels, dims=2)
    trainer = lightning.Trainer(max_steps=parser.parse_args().steps, logger=False)
    trainer.fit(Segmentation(weights, Augmentation.paper_2015()), DataLoader(data, 4, shuffle=True))
    trainer.save_checkpoint("lightning.ckpt")
    model = Segmentation.load_from_checkpoint("lightning.ckpt")
    new = DataLoader(TensorDataset(read("test", "images")[:, None] / 255), 4)
    print(f"{[int(x.max()) for batch in trainer.predict(model, new) for x in batch]} objects")
