"""nnU-Net trains with our deformation, weights and loss, in 2D and 3D."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from peers import EXAMPLES, needs, run_page
from PIL import Image

from unet_fast import Augmentation, BorderWeights
from unet_fast.cli import main
from unet_fast.demo import SAMPLE

needs("nnunetv2")
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: E402
from nnunetv2.run.run_training import get_trainer_from_args, run_training  # noqa: E402
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # noqa: E402

from unet_fast.integrations import nnunet  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.xdist_group("nnunet"),  # its tests share a folder
]
CPU = torch.device("cpu")
CONFIGURATION = {2: "2d", 3: "3d_fullres"}
NAMES = {2: "Dataset002_cells", 3: "Dataset003_cells"}
SHORT = """
from unet_fast.integrations.nnunet import nnUNetTrainerUNetFast


class Short(nnUNetTrainerUNetFast):
    def initialize(self):
        super().initialize()
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 2, 1

    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, *others, **named):
        widths = configuration_manager.network_arch_init_kwargs["features_per_stage"]
        widths[:] = [4] * len(widths)  # narrow
        return nnUNetTrainerUNetFast.build_network_architecture(
            plans_manager, configuration_manager, *others, **named
        )
"""


def cells(dims, generator):
    """Touching boxes, each with a number of its own."""
    shape = (40, 48) if dims == 2 else (10, 40, 48)
    ids = np.zeros(shape, np.uint8)
    for i, y in enumerate(range(2, 34, 9)):
        for j, x in enumerate(range(3, 40, 8)):
            ids[..., y : y + 9, x : x + 8] = 1 + 5 * i + j
    if dims == 3:
        ids[[0, -1]] = 0
    image = 40 + 100 * (ids > 0) + generator.normal(0, 10, shape)
    return image.clip(1, 255).astype(np.uint8), ids


def write(file, array, spacing):
    if array.ndim == 2:
        Image.fromarray(array).save(f"{file}.png")
    else:
        tifffile.imwrite(f"{file}.tif", array)
        named = Path(str(file).removesuffix("_0000"))
        named.with_suffix(".json").write_text(json.dumps({"spacing": spacing}))


def raw_data(root, dims):
    """Five cases; the first has an empty margin, and of volumes the second has larger voxels."""
    folder = root / "raw" / NAMES[dims]
    generator = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr", "instancesTr"):
        (folder / kind).mkdir(parents=True)
    for case in range(5):
        image, ids = cells(dims, generator)
        if case == 0:
            image[..., :7], ids[..., :7] = 0, 0
        spacing = [2.0, 1.25, 1.25] if case == 1 else [2.0, 1.0, 1.0]
        write(folder / "imagesTr" / f"c{case}_0000", image, spacing)
        write(folder / "labelsTr" / f"c{case}", (ids > 0).astype(np.uint8), spacing)
        write(folder / "instancesTr" / f"c{case}", ids, spacing)
    described = {
        "channel_names": {"0": "grey"},
        "labels": {"background": 0, "cell": 1},
        "numTraining": 5,
        "file_ending": ".png" if dims == 2 else ".tif",
    }
    if dims == 3:
        described["overwrite_image_reader_writer"] = "Tiff3DIO"
    (folder / "dataset.json").write_text(json.dumps(described))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Folders of nnU-Net with two data sets, planned and preprocessed as nnU-Net does."""
    root = tmp_path_factory.mktemp("nnunet")
    trainers = root / "trainers"
    trainers.mkdir()
    (trainers / "short.py").write_text(SHORT)
    places = {f"nnUNet_{x}": str(root / x) for x in ("raw", "preprocessed", "results")}
    places |= {
        "nnUNet_extTrainer": os.pathsep.join(map(str, (nnunet.TRAINERS, trainers))),
        "nnUNet_def_n_proc": "1",
        "nnUNet_n_proc_DA": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in places.items():
            patch.setenv(name, value)
        for dims in (2, 3):
            raw_data(root, dims)
            command = f"nnUNetv2_plan_and_preprocess -d {dims} -c {CONFIGURATION[dims]} -np 1"
            subprocess.run([*command.split(), "-npfp", "1"], check=True, capture_output=True)
        patch.setenv("nnUNet_n_proc_DA", "0")  # augmentation in this process
        for dims in (2, 3):
            assert main(["nnunet", str(dims), CONFIGURATION[dims], "-np", "1"]) == 0
        yield root


@pytest.fixture
def trainer(project):
    """Makes a trainer of a data set, not initialised."""

    def make(dims, name="Short", plans=nnunet.PLANS):
        return get_trainer_from_args(str(dims), CONFIGURATION[dims], 0, name, plans, device=CPU)

    return make


@pytest.mark.parametrize("dims", [2, 3])
def test_training(project, dims, capsys):
    """It trains, validates, continues from a checkpoint, and predicts."""
    arguments = str(dims), CONFIGURATION[dims], 0, "Short", nnunet.PLANS
    run_training(*arguments, device=CPU)
    folder = project / "results" / NAMES[dims] / f"Short__{nnunet.PLANS}__{CONFIGURATION[dims]}"
    fold = folder / "fold_0"
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert 0 < summary["foreground_mean"]["Dice"] <= 1
    assert {"checkpoint_best.pth", "checkpoint_final.pth"} <= {x.name for x in fold.iterdir()}
    run_training(*arguments, continue_training=True, device=CPU)
    predictor = nnUNetPredictor(device=CPU, use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    image, _ = cells(dims, np.random.default_rng(1))
    image = image.astype(np.float32).reshape(1, -1, *image.shape[-2:])
    properties = {"spacing": (999, 1, 1) if dims == 2 else (2, 1, 1)}
    found = predictor.predict_single_npy_array(image, properties)
    assert found.shape == image.shape[1:]
    assert set(np.unique(found)) <= {0, 1}


@pytest.mark.parametrize("dims", [2, 3])
def test_instances_survive_cropping_and_resampling(project, dims):
    folder = project / "preprocessed" / NAMES[dims]
    plans = PlansManager(str(folder / f"{nnunet.PLANS}.json"))
    configuration = plans.get_configuration(CONFIGURATION[dims])
    described = json.loads((folder / "dataset.json").read_text())
    end = described["file_ending"]
    whole = cells(dims, np.random.default_rng(0))[1]
    for case in (0, 1, 2):
        raw = project / "raw" / NAMES[dims]
        files = (
            [str(raw / "imagesTr" / f"c{case}_0000{end}")],
            str(raw / "labelsTr" / f"c{case}{end}"),
        )
        data, seg, _ = nnunet.InstancePreprocessor().run_case(
            *files, plans, configuration, described
        )
        assert seg.shape == (2, *data.shape[1:])
        assert seg.dtype == np.int16
        assert ((seg[0] > 0) == (seg[1] > 0)).all()
        expected = whole.reshape(-1, *whole.shape[-2:]).copy()
        if case == 0:
            expected = expected[..., 7:]
            assert seg.shape[1:] == expected.shape  # cropped
        if (dims, case) == (3, 1):
            assert seg.shape[1:] == (10, 50, 60)  # resampled
            sides = zip(seg.shape[1:], expected.shape, strict=True)
            at = [((np.arange(n) + 0.5) * m / n).astype(int) for n, m in sides]
            expected = expected[np.ix_(*at)]
            assert (seg[1] == expected).mean() > 0.98  # outlines are smoothed with the classes
            assert set(np.unique(seg[1])) == set(np.unique(expected))
        else:
            np.testing.assert_array_equal(seg[1], expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_weights_of_one_give_the_loss_of_nnunet(trainer, dims):
    """Dice and cross-entropy, at each resolution of deep supervision."""
    ours, theirs = trainer(dims), trainer(dims, nnUNetTrainer.__name__, "nnUNetPlans")
    ours.border_weights = BorderWeights(w0=0, class_weight=None, ridge="none")
    ours.initialize()
    theirs.initialize()
    torch.manual_seed(0)
    sides = ours.configuration_manager.patch_size
    labels = torch.randint(-1, 2, (2, 2, *sides), dtype=torch.int16)
    labels[:, 1] = labels[:, 0]
    targets = ours._targets(labels)
    assert len(targets) == len(ours._get_deep_supervision_scales()) > 1
    expected = labels[:, :1].clamp(min=0).float()
    for x in targets:
        plain = torch.nn.functional.interpolate(expected, x.shape[2:], mode="nearest-exact")
        torch.testing.assert_close(x.float(), plain, rtol=0, atol=0)
    scores = [torch.randn(2, 2, *x.shape[2:], requires_grad=True) for x in targets]
    losses = [t.loss(scores, targets) for t in (ours, theirs)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, scores[:-1]) for loss in losses]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dims", [2, 3])
def test_borders_weigh_more(trainer, dims):
    """The weights of the loss are those of the objects of the deformed labels."""
    ours = trainer(dims)
    ours.initialize()
    ids = torch.from_numpy(cells(dims, np.random.default_rng(0))[1]).short()[None]
    labels = torch.stack([(ids > 0).short(), ids], 1)
    ours._targets(labels)
    weights = ours.cross_entropy.weights[ids.shape[1:]]
    spacing = None if dims == 2 else (2.0, 1.0, 1.0)
    weigh = replace(BorderWeights.paper_2015(), class_weight=None, spacing=spacing)
    target, expected = weigh(ids.int(), dims=dims)
    torch.testing.assert_close(weights[:, 0], expected)
    assert weights.max() > 5
    assert (target == 0).sum() > (ids == 0).sum()  # the ridge


def test_components_of_each_class():
    """Without instances the parts of each class are its objects; negative labels are background."""
    labels = torch.zeros(1, 1, 30, 40, dtype=torch.int16)
    labels[0, 0, 5:15, 4:12], labels[0, 0, 5:15, 14:24], labels[0, 0, 5:15, 24:34] = 1, 1, 2
    labels[0, 0, 20:25, :10], labels[0, 0, 27:] = 3, -1
    weigh = BorderWeights(class_weight=None)
    target, weights = nnunet.targets_of(labels, weigh, num_classes=3, ignore_label=3)
    ids = torch.zeros(1, 30, 40, dtype=torch.int32)
    ids[0, 5:15, 4:12], ids[0, 5:15, 14:24], ids[0, 5:15, 24:34] = 1, 2, 3
    classes = labels[:, 0].clamp(min=0).int()
    classes[classes == 3] = 255
    expected, others = weigh(ids, classes, num_classes=3)
    expected[expected == 255] = 3
    torch.testing.assert_close(target[:, 0], expected)
    torch.testing.assert_close(weights[:, 0], others)
    assert (target[0, 0, 27:] == 0).all()
    assert (weights[0, 0, 20:25, :10] == 0).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_no_deformation_takes_the_middle(dims):
    still = nnunet.recipe((1.0,) * dims, 0.0, False)
    still = replace(still, sigma=0.0, scale=(1.0, 1.0))
    shape = (8, 20, 24)[-dims:]
    image, labels = 5 * torch.randn(2, 3, *shape), torch.randint(-1, 9, (2, 2, *shape)).short()
    inner = tuple(n - 2 * k for n, k in zip(shape, range(1, dims + 1), strict=True))
    found = nnunet.deformed(still, image, labels, inner)
    middle = (..., *(slice(k, n - k) for n, k in zip(shape, range(1, dims + 1), strict=True)))
    torch.testing.assert_close(found[0], image[middle])
    torch.testing.assert_close(found[1], labels[middle], rtol=0, atol=0)


def test_flat_voxels_stay_in_their_planes():
    """Whatever the augmentation, a slice is made of itself."""
    planes = torch.arange(8.0)[:, None, None].expand(2, 1, 8, 20, 24)
    for augmentation in (nnunet.recipe((4.0, 1.0, 1.0), 180.0, True), Augmentation.cicek_2016()):
        image, labels = nnunet.deformed(
            augmentation, planes, planes.short(), (8, 12, 16), in_planes=True
        )
        torch.testing.assert_close(image, planes[..., :12, :16])
        torch.testing.assert_close(labels, planes[..., :12, :16].short())


def test_a_class_without_instances():
    """Its components are its objects, beside the instances of the other class."""
    labels = torch.zeros(1, 2, 30, 60, dtype=torch.int16)
    labels[0, :, 5:15, 5:15] = torch.tensor([1, 7]).view(2, 1, 1)
    labels[0, :, 5:15, 15:25] = torch.tensor([1, 9]).view(2, 1, 1)
    labels[0, 0, 2:28, 30:40] = labels[0, 0, 2:28, 44:58] = 2
    weigh = BorderWeights(class_weight=None)
    target, weights = nnunet.targets_of(labels, weigh, num_classes=3)
    ids = labels[:, 1].int()
    ids[0, 2:28, 30:40], ids[0, 2:28, 44:58] = 10, 11
    expected = weigh(ids, labels[:, 0], num_classes=3)
    torch.testing.assert_close(target[:, 0], expected[0])
    torch.testing.assert_close(weights[:, 0], expected[1])
    assert (target[0, 0, 2:28, 30:40] == 2).all()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("9 2d", "Could not find a dataset with the ID 9"),
        ("2", "nnunet: configurations must be given: unet-fast nnunet 001 2d"),
        ("2 4d", "configuration must be one of 2d, got 4d"),
        ("2 2d --plans Others", "Others.json: must hold plans: run nnUNetv2_plan_and_preprocess"),
    ],
)
def test_bad_words(project, capsys, words, error):
    assert main(["nnunet", *shlex.split(words)]) == 2
    told = capsys.readouterr().err
    assert error in told
    assert told.count("\n") == 1


def test_a_data_set_without_instances(project, capsys):
    folder = project / "raw" / NAMES[2] / nnunet.INSTANCES
    away = folder.rename(folder.with_name("elsewhere"))
    try:
        assert main(["nnunet", "2", "2d"]) == 2
    finally:
        away.rename(folder)
    assert capsys.readouterr().err == (
        f"unet-fast: {folder}: must hold the instances of {NAMES[2]}, but is missing\n"
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x: None, "must hold the instances of .*, but is missing"),
        (lambda x: x[:-1], r"must be of shape \(1, 40, 48\) as its image, got \(1, 39, 48\)"),
        (lambda x: x.astype(np.uint16) + 40000, r"must hold whole numbers in \[0, 32767\]"),
    ],
)
def test_bad_instances(project, tmp_path, change, error):
    folder = project / "preprocessed" / NAMES[2]
    plans = PlansManager(str(folder / f"{nnunet.PLANS}.json"))
    described = json.loads((folder / "dataset.json").read_text())
    image, ids = cells(2, np.random.default_rng(0))
    for kind, array in (
        ("imagesTr/c_0000", image),
        ("labelsTr/c", ids),
        ("instancesTr/c", change(ids)),
    ):
        (tmp_path / kind).parent.mkdir()
        if array is not None:
            Image.fromarray(array).save(tmp_path / f"{kind}.png")
    files = [str(tmp_path / "imagesTr/c_0000.png")], str(tmp_path / "labelsTr/c.png")
    with pytest.raises(ValueError, match=error):
        nnunet.InstancePreprocessor().run_case(
            *files, plans, plans.get_configuration("2d"), described
        )


def test_plans_and_data_that_do_not_fit(trainer):
    """Plans that promise instances, and data without; and the other way round."""
    batch = {"data": torch.zeros(1, 1, 8, 8), "target": torch.zeros(1, 1, 8, 8).short()}
    with pytest.raises(
        ValueError, match="data must hold 2 maps of labels with plans nnUNetPlansIn"
    ):
        trainer(2)._loaded(batch)
    batch["target"] = torch.zeros(1, 2, 8, 8).short()
    with pytest.raises(
        ValueError, match="data must hold 1 map of labels with plans nnUNetPlans, g"
    ):
        trainer(2, plans="nnUNetPlans")._loaded(batch)


def test_regions_are_refused(trainer):
    ours = trainer(2)
    ours.label_manager._has_regions = True
    with pytest.raises(ValueError, match=r"^Short: labels must be classes, got regions$"):
        ours.initialize()


def test_the_folder_of_the_trainer(capsys):
    assert main(["nnunet"]) == 0
    assert capsys.readouterr().out == f"{nnunet.TRAINERS}\n"
    assert [x.name for x in nnunet.TRAINERS.glob("[!_]*.py")] == ["unet_fast_trainer.py"]


@pytest.mark.thorough
@pytest.mark.skipif(torch.version.cuda is None, reason="nnU-Net's programs import torchvision")
def test_the_example(project, tmp_path):
    """It writes the data set, preprocesses, trains and predicts."""
    command = [sys.executable, EXAMPLES / "nnunet_training.py", "--trainer", "Short"]
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    settings = os.environ | path | {"nnUNet_n_proc_DA": "1"}
    subprocess.run(command, cwd=tmp_path, env=settings, check=True)
    found = sorted((tmp_path / "nnunet" / "found").glob("*.png"))
    assert len(found) == len(list((SAMPLE / "test" / "images").glob("*.png")))


def test_the_page(project):
    assert run_page("nnunet.md")["objects"].max() == 2


def test_folders_that_are_not_set(project, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_raw")
    assert main(["nnunet", "2", "2d"]) == 2
    told = capsys.readouterr().err
    assert told == "unet-fast: nnUNet_raw must name a folder, but is not set\n"
