"""What border weights do in nnU-Net: trains it on nuclei, scores images it has not seen.

    UNET_FAST_DATA=... python -m benchmarks.nnunet border --seed 0 --work FOLDER

It needs the extra `nnunet` and adds a row to benchmarks/results/nnunet.csv; `report.py` makes a
table of them. Training and test images are those of splits.json; of the training images nnU-Net
takes four fifths (its fold 0). All variants have the same plans, with half the width that nnU-Net
would choose, the same number of steps and the same random numbers.
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
import tifffile
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
SET = "dsb2018_fluo"
DATASETS = {2: "Dataset018_nuclei", 3: "Dataset019_ovule"}
PLANNED = {2: "2d", 3: "3d_fullres"}
VARIANTS = ("border", "w0=0", "stock")
EPOCHS, STEPS = 40, 50
SCORES = ("ap_50", "ap_75", "f1_50", "pq_50", "seg", "iou")


def prepare(images, labels, work, dims):
    """Writes a raw data set, then lets nnU-Net plan and preprocess it, with instances.

    Args:
        images: Files of images, PNG or, of volumes, TIFF.
        labels: Files of their instance maps.
        work: Folder of everything.
        dims: Number of spatial axes.
    """
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(work / name)
        (work / name).mkdir(parents=True, exist_ok=True)
    raw = work / "raw" / DATASETS[dims]
    end, number, planned = images[0].suffix, DATASETS[dims][7:10], PLANNED[dims]
    for place in ("imagesTr", "labelsTr", "instancesTr"):
        (raw / place).mkdir(parents=True)
    for i, (image, instances) in enumerate(zip(images, labels, strict=True)):
        shutil.copy(image, raw / "imagesTr" / f"c{i:03d}_0000{end}")
        ids = np.int32(tifffile.imread(instances)) if dims == 3 else read_labels(instances)
        for place, array in (("labelsTr", (ids > 0).astype(np.uint8)), ("instancesTr", ids)):
            write = write_labels if dims == 2 else tifffile.imwrite
            write(raw / place / f"c{i:03d}{end}", array)
    described = {
        "channel_names": {"0": "grey"},
        "labels": {"background": 0, "cell": 1},
        "numTraining": len(images),
        "file_ending": end,
    }
    if dims == 3:
        described["overwrite_image_reader_writer"] = "Tiff3DIO"
    (raw / "dataset.json").write_text(json.dumps(described))
    for command in (
        f"nnUNetv2_plan_and_preprocess -d {number} -c {planned} -np 1 -npfp 1 --no_pbar",
        f"unet-fast nnunet {number} {planned} -np 1",
    ):
        few = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
        subprocess.run(command.split(), check=True, env=os.environ | few, stdout=subprocess.DEVNULL)
    for file in (work / "preprocessed" / raw.name).glob("nnUNetPlans*.json"):
        known = json.loads(file.read_text())
        known["configurations"]["small"] = small(known["configurations"][planned], dims)
        file.write_text(json.dumps(known))


def small(planned, dims):
    """The configuration that is trained: narrower stages, smaller patches and batches."""
    stages, side = (6, 192) if dims == 2 else (4, 64)
    network = json.loads(json.dumps(planned["architecture"]))
    network["arch_kwargs"] |= {
        "n_stages": stages,
        "features_per_stage": [min(16 * 2**i, 128) for i in range(stages)],
        "kernel_sizes": [[3] * dims] * stages,
        "strides": [[1] * dims] + [[2] * dims] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    patch = [side, side] if dims == 2 else [32, side, side]
    return {
        "inherits_from": PLANNED[dims],
        "batch_size": 4 if dims == 2 else 2,
        "patch_size": patch,
        "architecture": network,
    }


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


def trainer_in(work, variant, seed, dims=2, fold=0):
    """A trainer of a variant, of data that :func:`prepare` made; seeds random numbers."""
    from unet_fast.integrations.nnunet import PLANS

    folder = work / "preprocessed" / DATASETS[dims]
    plans = "nnUNetPlans" if variant == "stock" else PLANS
    described = json.loads((folder / f"{plans}.json").read_text()) | {"continue_training": False}
    described["plans_name"] += f"_{seed}"  # names its folder
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(seed)
    data = json.loads((folder / "dataset.json").read_text())
    return trainer_of(variant)(described, "small", fold, data, torch.device("cpu"))


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
    os.environ |= {"nnUNet_n_proc_DA": "0"}  # loads in this process, so that random numbers repeat
    if not (work / "ready").exists():
        files = [f"{name}.png" for name in split_of(data / SET)["train"]]
        images, labels = ([data / SET / x / name for name in files] for x in ("images", "labels"))
        prepare(images, labels, work, 2)
        (work / "ready").touch()
    trainer = trainer_in(work, variant, seed)
    start = time.process_time()
    trainer.run_training()
    seconds = time.process_time() - start
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
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder of nnU-Net's files")
    options = parser.parse_args()
    if "UNET_FAST_DATA" not in os.environ:
        parser.error("UNET_FAST_DATA must name the folder of the data sets")
    run(Path(os.environ["UNET_FAST_DATA"]), options.work, options.variant, options.seed)


if __name__ == "__main__":
    main()
