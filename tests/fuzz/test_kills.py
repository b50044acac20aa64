"""Death at every point where files change, two writers, eight readers, full disks."""

import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import budget
import numpy as np
import pytest
import tifffile
import torch
from budget import first
from matplotlib.figure import Figure
from PIL import Image
from runs import discs_in, options
from safetensors.torch import load_file

from unet_fast import _progress
from unet_fast.cli import main
from unet_fast.images.files import read_image
from unet_fast.images.zarr import create
from unet_fast.prediction import files, out_of_core
from unet_fast.training import loop, previews
from unet_fast.training.journal import Journal

# Processes are forked from a server that has imported all, which takes seconds, but has computed
# nothing, because threads do not outlive a fork.
FORKS = multiprocessing.get_context("forkserver")
OURS = ["unet_fast.cli", "unet_fast.training.check", "unet_fast.prediction.files"]
OTHERS = ["zarr", "torch._dynamo", "matplotlib.backends.backend_agg", "scipy.sparse.csgraph"]
FORKS.set_forkserver_preload([*OURS, "unet_fast.training.loop", *OTHERS, "pytest", "hypothesis"])

LOST = 255
"""What multiprocessing says if the server of forks did not tell how a process ended."""

WATCHED = dict.fromkeys(("replace", "rename", "link", "unlink"), os)
WATCHED |= dict.fromkeys(("draw_curves", "draw_previews"), previews)
WATCHED |= {"draw_tiles": loop, "draw_overlay": files}


class Points:
    """Counts the points that this process passes, and kills it at one of them."""

    def __init__(self, die_at):
        self.die_at, self.passed, self.lock = die_at, [], threading.Lock()

    def reach(self, name, last_deed=lambda: None):
        with self.lock:  # several threads draw and write
            self.passed.append(name)
            if len(self.passed) == self.die_at:
                last_deed()
                Path(f"{os.getpid()}.dead").touch()
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner, name):
        """Makes a point before each call of a function and, but for removals, one after it."""
        function = getattr(owner, name)

        def watched(*args, **options):
            file = next((str(x) for x in reversed(args) if isinstance(x, Path | str)), "")
            if Path(file).is_absolute() and not Path(file).is_relative_to(Path.cwd()):
                return function(*args, **options)  # a file of tempfile or torch
            self.reach(f"before {name} {Path(file).name}")
            result = function(*args, **options)
            if name != "unlink":  # most are followed by another one at once
                self.reach(f"after {name} {Path(file).name}")
            return result

        setattr(owner, name, watched)

    def watch_log(self, add):
        def watched(journal, row, *args):
            self.reach(f"within line {row['step']}", lambda: journal.log.write(b'{"step": '))
            add(journal, row, *args)
            self.reach(f"after line {row['step']}")

        Journal.add = watched


def note(figure, png, **_):
    """Stands for matplotlib's drawing, which takes half a second: what the figure is made of."""
    axes = [(a.get_title(), [x.get_xydata().tolist() for x in a.lines]) for a in figure.axes]
    images = [np.asarray(x.get_array()).tolist() for a in figure.axes for x in a.images]
    Image.fromarray(np.frombuffer(repr((axes, images)).encode(), np.uint8)[None]).save(png, "png")


def meet(locked, name, meetings, path):
    """Locks a file; one of that name after a meeting with another process, or two."""
    for barrier in meetings if path.name == name else ():
        barrier.wait(60)
    return locked(path)


def work(folder, words, die_at, lock, meetings):
    """The command line, in a process and a folder of its own; meets others before a lock."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(f"{os.getpid()}.told", os.O_WRONLY | os.O_CREAT), 2)
    _progress.EVERY = float("inf")  # says nothing, however slow the machine is
    Figure.savefig = note
    points = Points(die_at)
    for name, owner in WATCHED.items():
        points.watch(owner, name)
    points.watch_log(Journal.add)
    for module in (loop, files, out_of_core):
        module.locked = functools.partial(meet, module.locked, lock, meetings)
    code = main(words)
    Path("points").write_text(json.dumps(points.passed))
    sys.exit(code)


def start(folder, words, die_at=None, lock=None, meetings=()):
    folder.mkdir(exist_ok=True)
    words = [*map(str, words)]
    process = FORKS.Process(target=work, args=(folder, words, die_at, lock, meetings))
    process.start()
    return process


def finish(process, folder):
    """Returns exit code and error messages of a process."""
    process.join(300)
    code = process.exitcode
    process.kill()  # if it hangs
    process.join()
    if code == LOST and (folder / f"{process.pid}.dead").exists():
        code = -signal.SIGKILL
    told = folder / f"{process.pid}.told"  # a killed one may not have come that far
    return code, told.read_text() if told.exists() else ""


def run(folder, words, die_at=None):
    return finish(start(folder, words, die_at), folder)


def resume(folder, command):
    """Returns exit code and error messages of a run that goes on, if anything is left to do."""
    code, told = run(folder, command.into(folder, "--resume"))
    return code, re.sub(r"^train: nothing to do: 4 of 4 steps done;.*\n$", "", told)


def contents(folder):
    """All of the folder `out`, byte for byte, without measured times and its own place."""
    found = {}
    for path in (folder / "out").rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.name == "log.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: x for k, x in row.items() if k != "seconds"} for row in rows]
        else:
            content = path.read_bytes() if path.is_file() else b"a folder"
            found[name] = content.replace(os.fsencode(folder), b"")
    return found


class Command:
    """Words of the command line, and what an unbroken process makes of them."""

    def __init__(self, folder, *words):
        self.words = words
        assert run(folder, self.into(folder)) == (0, "")
        self.whole = contents(folder)
        self.points = json.loads((folder / "points").read_text())

    def into(self, folder, *more):
        return [*self.words, "--out", folder / "out", *more]

    def differences(self, folder):
        """Names of what is not as it was made by an unbroken process."""
        found = contents(folder)
        return sorted(n for n in found | self.whole if found.get(n) != self.whole.get(n))


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Makes a command when it is first asked for by its name."""
    folder = tmp_path_factory.mktemp("commands")
    discs, images, trained = discs_in(folder / "discs"), folder / "images", folder / "train"
    images.mkdir()
    shutil.copy(discs[0] / "0.png", images / "a.png")
    planes = np.stack([np.asarray(Image.open(images / "a.png"))] * 2)
    tifffile.imwrite(images / "b.tif", planes, metadata={"axes": "ZYX"})
    pixels = np.random.default_rng(0).integers(0, 255, (600, 550), np.uint8)
    facts = {"axes": "YX", "chunks": (256, 256), "dtype": "uint8", "pixel_size": {"X": 0.5}}
    create(images / "c.ome.zarr", name="c", shape=pixels.shape, labels=False, **facts)[...] = pixels
    settings = {"steps": 4, "checkpoint_every": 2, "evaluate_every": 2, "previews": 1}
    predict = "predict", trained / "out", "--tile", 64
    words = {
        "train": ("train", *discs, *options(settings)),
        "instances": (*predict, images),
        "labels": (*predict, images, "--output", "labels"),
        "png": (*predict, images / "a.png"),
        "zarr": (*predict, images / "c.ome.zarr"),
        "tables": (*predict, images / "a.png", images / "b.tif", "--table", "--rois"),
    }

    @functools.cache
    def command(name):
        if name != "train":
            command("train")
        return Command(folder / name, *words[name])

    return command


def let_an_hour_pass(folder, name):
    """Until then, another process may write files of predictions; a run has but one."""
    for part in folder.rglob(".unet_fast-*.part") if name != "train" else ():
        os.utime(part, (time.time() - 7200,) * 2)


@pytest.mark.parametrize("name", ["train", *first("tables", "instances", "labels")])
def test_death_at_every_point(commands, tmp_path, name):
    """All points with `--thorough`, else some of them."""
    command = commands(name)

    def fault_of(number):
        folder = tmp_path / str(number)
        died, _ = run(folder, command.into(folder), number)
        let_an_hour_pass(folder, name)
        code, told = resume(folder, command)
        different = command.differences(folder)
        if (died, code, told, different) != (-signal.SIGKILL, 0, "", []):
            return number, command.points[number - 1], died, code, told, different[:2]
        shutil.rmtree(folder)
        return None

    count = len(command.points)
    numbers = range(1, count + 1) if budget.thorough else range(count // 6, count, count // 3)
    with ThreadPoolExecutor(2) as pool:
        faults = [x for x in pool.map(fault_of, numbers) if x is not None]
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["train", "instances", "labels"])
def test_death_again_and_again(commands, tmp_path, name):
    """Each try dies at a later point than the one before, until one comes to its end."""
    command, number = commands(name), 1
    while (end := run(tmp_path, command.into(tmp_path, "--resume"), number))[0]:
        assert end[0] == -signal.SIGKILL, end
        let_an_hour_pass(tmp_path, name)
        number += 7
    assert number > 7
    assert end == (0, "")
    assert command.differences(tmp_path) == []


LOCKS = {"train": "state.safetensors", "zarr": "c.ome.zarr", "png": "a.png"}


@pytest.mark.parametrize("name", first("train", "zarr", "png"))
@pytest.mark.parametrize("more", first((), ("--resume",)))
@pytest.mark.parametrize("late", [False, True])
def test_two_writers(commands, tmp_path, name, more, late):
    """Both find an empty folder, then both write, or (`late`) one after the other."""
    words, lock = commands(name).into(tmp_path, *more), LOCKS[name]
    meetings = [FORKS.Barrier(2) for _ in range(1 + late)]
    both = [start(tmp_path, words, lock=lock, meetings=meetings)]
    if late:
        meetings[0].wait(60)
        assert run(tmp_path, words) == (0, "")
        meetings[1].wait(60)
    else:
        both.append(start(tmp_path, words, lock=lock, meetings=meetings))
    ends = [finish(process, tmp_path) for process in both]
    assert late or (0, "") in ends, ends
    assert {(code, told.count("\n")) for code, told in ends} <= {(0, 0), (2, 1)}, ends
    assert commands(name).differences(tmp_path) == []


@contextmanager
def disk(folder, limit):
    """A file system of its own, so small that it may be full."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, text=True)
    if re.search("superuser|permission|permitted", done.stderr):
        pytest.skip(f"a tmpfs may not be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


READERS = {
    ".safetensors": load_file,
    ".png": lambda path: np.asarray(Image.open(path)),
    ".tif": tifffile.imread,
    ".json": lambda path: json.loads(path.read_text()),
}


@pytest.mark.parametrize("name", first("train", "instances"))
@pytest.mark.parametrize("kind", first("size", "nr_inodes"))
def test_full_disks(commands, tmp_path, name, kind):
    """Of growing sizes, in bytes or numbers of files, until all fits: one line, and whole files."""
    command = commands(name)
    pages = sum(-(-len(x) // 4096) if isinstance(x, bytes) else 1 for x in command.whole.values())
    most = 4096 * pages if kind == "size" else len(command.whole)
    tries = 8 if budget.thorough else 2
    for i in range(1, tries + 1):
        folder = tmp_path / str(i)
        with disk(folder / "out", f"{kind}={max(2, i * most // (tries + 1))}"):
            code, told = run(folder, command.into(folder))
            assert code == 2
            assert told.count("\n") == 1
            assert "No space left on device" in told
            for path in (folder / "out").rglob("*.*"):
                assert not re.search(r"^\.|\.partial$", path.name)
                if path.is_file():
                    READERS.get(path.suffix, Path.read_bytes)(path)
            more = "remount,size=64m,nr_inodes=9999"
            subprocess.run(["mount", "-o", more, folder / "out"], check=True)
            assert resume(folder, command) == (0, "")
            assert command.differences(folder) == []


def test_eight_readers(tmp_path):
    """What is damaged is refused by every thread; it does no harm to others, nor they to it."""
    rng = np.random.default_rng(0)
    expected, kinds = {}, {"minisblack": (90, 80), "rgb": (90, 80, 3)}
    for (kind, shape), bits in itertools.product(kinds.items(), (8, 16)):
        array = rng.integers(0, 2**bits - 1, shape, f"uint{bits}")
        for packed in (None, "zlib", "lzw"):
            name = f"{kind}{bits}{packed}.tif"
            tifffile.imwrite(tmp_path / name, array, compression=packed, photometric=kind)
            expected[name] = np.moveaxis(np.atleast_3d(array), -1, 0)
        if (kind, bits) != ("rgb", 16):  # Pillow does not write such
            Image.fromarray(array).save(tmp_path / f"{kind}{bits}.png")
            expected[f"{kind}{bits}.png"] = np.moveaxis(np.atleast_3d(array), -1, 0)
    stack = rng.integers(0, 255, (3, 50, 60), np.uint8)  # cut off, a whole plane may be left
    tifffile.imwrite(tmp_path / "s.tif", stack, compression="zlib", photometric="minisblack")
    for path, share in itertools.product(list(tmp_path.iterdir()), (0.0, 0.4, 0.7)):
        content, cut = path.read_bytes(), path.with_name(f"{share}{path.name}")
        cut.write_bytes(content[: int(share * len(content))])
        expected[cut.name] = None

    def read(name):
        try:
            return read_image(tmp_path / name)
        except ValueError as error:
            return str(error)

    names = list(expected) * (40 if budget.thorough else 4)
    rng.shuffle(names)
    with ThreadPoolExecutor(8) as pool:
        for name, found in zip(names, pool.map(read, names), strict=True):
            good = expected[name]
            assert name in str(found) if good is None else np.array_equal(found, good), name
