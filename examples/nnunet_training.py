"""Trains nnU-Net on bundled nuclei and their instances, for its 1,000 epochs."""

import argparse
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unet_fast.demo import SAMPLE

parser = argparse.ArgumentParser()
parser.add_argument("--work", type=Path, default=Path("nnunet"), help="folder for everything")
parser.add_argument("--trainer", default="nnUNetTrainerUNetFast")
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

raw = options.work / "raw" / "Dataset018_nuclei"
for folder in ("imagesTr", "labelsTr", "instancesTr", "imagesTs"):
    (raw / folder).mkdir(parents=True, exist_ok=True)
files = sorted((SAMPLE / "train" / "images").glob("*.png"))
for file in files:
    instances = np.asarray(Image.open(SAMPLE / "train" / "labels" / file.name))
    Image.open(file).save(raw / "imagesTr" / f"{file.stem}_0000.png")
    Image.fromarray(np.uint8(instances > 0)).save(raw / "labelsTr" / file.name)
    Image.fromarray(instances).save(raw / "instancesTr" / file.name)
for file in (SAMPLE / "test" / "images").glob("*.png"):
    Image.open(file).save(raw / "imagesTs" / f"{file.stem}_0000.png")
description = {
    "channel_names": {"0": "fluorescence"},
    "labels": {"background": 0, "nucleus": 1},
    "numTraining": len(files),
    "file_ending": ".png",
}
(raw / "dataset.json").write_text(json.dumps(description))

for name in ("raw", "preprocessed", "results"):
    os.environ[f"nnUNet_{name}"] = str(options.work / name)
trainers = subprocess.run(["unet-fast", "nnunet"], check=True, capture_output=True, text=True)
os.environ.setdefault("nnUNet_extTrainer", trainers.stdout.strip())
model = f"-p nnUNetPlansInstances -tr {options.trainer} -device {device}"
for command in (
    "nnUNetv2_plan_and_preprocess -d 18 -c 2d --verify_dataset_integrity",
    "unet-fast nnunet 18 2d",
    f"nnUNetv2_train 18 2d 0 {model}",
    f"nnUNetv2_predict -i {raw}/imagesTs -o {options.work}/found -d 18 -c 2d -f 0 {model}",
):
    print(command, flush=True)
    subprocess.run(command.split(), check=True)
