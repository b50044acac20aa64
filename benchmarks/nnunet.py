"""What border weights do in nnU-Net: trains it on nuclei, scores images it has not seen.

    UNET_FAST_DATA=... python -m benchmarks.nnunet run border --seed 0 --work FOLDER
    python -m benchmarks.nnunet report [--check]

`run` needs the extra `nnunet` and adds a row to benchmarks/results/nnunet.csv. Training and test
images are those of splits.json; of the training images nnU-Net takes four fifths (its fold 0). All
variants have the same plans, a quarter of the width that nnU-Net would choose for a GPU, the same
number of steps and the same random numbers.
"""

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from unet_fast._files import replace_file
from unet_fast.images.files import read_labels, write_labels
from unet_fast.objects import ObjectRule
from unet_fast.scores.evaluate import object_scores
from unet_fast.scores.report import as_csv
from unet_fast.training.samples import load_samples

from .interleave import header
from .segmentation import smallest, split_of

HERE = Path(__file__).parent
ROWS = HERE / "results" / "nnunet.csv"
SET, NUMBER = "dsb2018_fluo", 18
VARIANTS = ("border", "w0=0", "stock")
CONFIGURATION = {
    "inherits_from": "2d",
    "batch_size": 4,
    "patch_size": [192, 192],
    "stages": 6,
    "features": 16,
}
EPOCHS, STEPS = 40, 50
SCORES = ("ap_50", "ap_75", "f1_50", "pq_50", "seg", "iou")


def prepare(data, work):
    """Writes the raw data set, then lets nnU-Net plan and preprocess it, with instances."""
    raw = work / "raw" / f"Dataset{NUMBER:03d}_nuclei"
    if (work / "ready").exists():
        return
    shutil.rmtree(work / "raw", ignore_errors=True)
    names = split_of(data / SET)["train"]
    for name in names:
        labels = read_labels(data / SET / "labels" / f"{name}.png")
        for folder in ("imagesTr", "labelsTr", "instancesTr"):
            (raw / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(data / SET / "images" / f"{name}.png", raw / "imagesTr" / f"{name}_0000.png")
        write_labels(raw / "labelsTr" / f"{name}.png", (labels > 0).astype(np.uint8))
        write_labels(raw / "instancesTr" / f"{name}.png", labels)
    described = {
        "channel_names": {"0": "fluorescence"},
        "labels": {"background": 0, "nucleus": 1},
        "numTraining": len(names),
        "file_ending": ".png",
    }
    (raw / "dataset.json").write_text(json.dumps(described))
    for command in (
        f"nnUNetv2_plan_and_preprocess -d {NUMBER} -c 2d -np 1 -npfp 1 --no_pbar",
        f"unet-fast nnunet {NUMBER} 2d -np 1",
    ):
        subprocess.run(command.split(), check=True, env=os.environ | {"nnUNet_n_proc_DA": "1"})
    for file in (work / "preprocessed" / raw.name).glob("nnUNetPlans*.json"):
        known = json.loads(file.read_text())
        known["configurations"]["small"] = small(known["configurations"]["2d"])
        file.write_text(json.dumps(known))
    (work / "ready").touch()


def small(planned):
    """The configuration that is trained: fewer and narrower stages, smaller patches and batches."""
    settings = dict(CONFIGURATION)
    stages, features = settings.pop("stages"), settings.pop("features")
    network = json.loads(json.dumps(planned["architecture"]))
    network["arch_kwargs"] |= {
        "n_stages": stages,
        "features_per_stage": [min(features * 2**i, 8 * features) for i in range(stages)],
        "kernel_sizes": [[3, 3]] * stages,
        "strides": [[1, 1]] + [[2, 2]] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    return settings | {"architecture": network}


def trainer_of(variant):
    """The trainer of a variant, which ends after some steps."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from unet_fast import BorderWeights
    from unet_fast.integrations.nnunet import nnUNetTrainerUNetFast

    base = nnUNetTrainer if variant == "stock" else nnUNetTrainerUNetFast

    class Short(base):
        if variant == "w0=0":
            border_weights = BorderWeights(class_weight=None, w0=0.0)

        def initialize(self):
            super().initialize()
            self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = STEPS, 2

        def configure_optimizers(self):
            self.num_epochs = EPOCHS  # its schedule of learning rates needs it
            return super().configure_optimizers()

    Short.__name__ = f"{base.__name__}_{variant.replace('=', '')}"
    return Short


def trained(work, variant, seed):
    """A trainer at the end of its training, and the seconds that took."""
    from unet_fast.integrations.nnunet import PLANS

    folder = work / "preprocessed" / f"Dataset{NUMBER:03d}_nuclei"
    plans = "nnUNetPlans" if variant == "stock" else PLANS
    described = json.loads((folder / f"{plans}.json").read_text()) | {"continue_training": False}
    described["plans_name"] += f"_{seed}"  # names its folder
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(seed)
    start = time.process_time()
    trainer = trainer_of(variant)(
        described,
        "small",
        0,
        json.loads((folder / "dataset.json").read_text()),
        torch.device("cpu"),
    )
    trainer.run_training()
    return trainer, time.process_time() - start


def objects_of(trainer, images, area):
    """The objects, of at least `area` pixels, of the class maps that nnU-Net predicts of images."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    carved = getattr(trainer, "border_weights", None)
    rule = ObjectRule(min_area=area, grow=0 if carved is None else carved.ridge_width)
    for image in images:
        whole = image[None, None].astype(np.float32)
        classes = predictor.predict_single_npy_array(whole, {"spacing": (999, 1, 1)})[0]
        yield rule.of_mask(classes == 1)


def run(data, work, variant, seed):
    """Trains and scores; adds a row, or puts it in the place of the one of the same run."""
    for name, folder in (("raw", "raw"), ("preprocessed", "preprocessed"), ("results", "results")):
        os.environ[f"nnUNet_{name}"] = str(work / folder)
        (work / folder).mkdir(parents=True, exist_ok=True)
    os.environ |= {"nnUNet_n_proc_DA": "0"}  # loads in this process, so that random numbers repeat
    prepare(data, work)
    trainer, seconds = trained(work, variant, seed)
    by_name = {s.name: s for s in load_samples(data / SET / "images", data / SET / "labels")}
    seen, samples = ([by_name[n] for n in split_of(data / SET)[part]] for part in ("train", "test"))
    truth = [s.labels for s in samples]
    found = list(objects_of(trainer, [s.image[0] for s in samples], smallest(seen)))
    scores = object_scores(truth, found, [0] * len(truth))[1]
    row = {"set": SET, "variant": variant, "seed": str(seed)}
    row |= {k: f"{scores[k]:.6f}" for k in SCORES}
    there, made = scores["reference_objects"], scores["predicted_objects"]
    row |= {"objects": f"{there:.0f}", "found": f"{made:.0f}"}
    row |= {"false": f"{made - scores['f1_50'] * (there + made) / 2:.0f}"}
    row |= {"steps": str(EPOCHS * STEPS), "cpu seconds": f"{seconds:.0f}"}
    row |= {k: str(v) for k, v in header(torch.device("cpu")).items()}
    print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    rows = [r for r in known() if (r["variant"], r["seed"]) != (variant, str(seed))] + [row]
    rows.sort(key=lambda r: (VARIANTS.index(r["variant"]), int(r["seed"])))
    replace_file(ROWS, as_csv(rows, list(row)))


def known():
    """The rows there are."""
    return list(csv.DictReader(ROWS.read_text().splitlines())) if ROWS.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train, predict, score; add a row")
    one.add_argument("variant", choices=VARIANTS)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument(
        "--work", type=Path, required=True, help="folder of nnU-Net's data and results"
    )
    options = parser.parse_args()
    if "UNET_FAST_DATA" not in os.environ:
        parser.error("UNET_FAST_DATA must name the folder of the data sets")
    run(Path(os.environ["UNET_FAST_DATA"]), options.work, options.variant, options.seed)


if __name__ == "__main__":
    main()
