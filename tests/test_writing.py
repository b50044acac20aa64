"""Files of several processes: written whole, one writer at a time, nothing left behind."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from runs import config, discs_in

from unet_fast import train
from unet_fast._files import locked, make_folder, read_file, replace_file
from unet_fast.cli import main
from unet_fast.training import previews

HOLDER = """if True:
    import sys, time
    from pathlib import Path
    from unet_fast._files import locked
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def hold(path):
    """A process that has locked a file."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "file"
    process = hold(path)
    said = re.escape(f"{path}: another process is writing it")
    with pytest.raises(ValueError, match=said), locked(path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locked(path), pytest.raises(ValueError, match="another process"), locked(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / ".file.lock").symlink_to(tmp_path / "other")
    said = r"\.file\.lock: cannot be written"
    with pytest.raises(ValueError, match=said), locked(tmp_path / "file"):
        pass
    assert not (tmp_path / "other").exists()


def test_file_systems_without_locks(tmp_path, monkeypatch):
    """As some clusters have: there is no lock, and files are written all the same."""
    error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=error))
    with locked(tmp_path / "file"), locked(tmp_path / "file"):
        assert [p.name for p in tmp_path.iterdir()] == [".file.lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_a_file_that_was_replaced(tmp_path, monkeypatch):
    """Its owner removed it, and a third process made another: that one is to be locked."""
    name, flock, tries = tmp_path / ".file.lock", fcntl.flock, []

    def late(lock, how):
        tries.append(os.fstat(lock).st_ino)
        if len(tries) == 1:
            name.unlink()
            name.touch()
        return flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / "file"):
        assert tries == [tries[0], name.stat().st_ino]
        assert tries[0] != tries[1]
        with pytest.raises(ValueError, match="another process"), locked(tmp_path / "file"):
            pass


def test_files_that_are_too_long(tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    assert read_file(tmp_path / "file", 4) == b"1234"
    with pytest.raises(ValueError, match="it must have at most 3 bytes, got 4"):
        read_file(tmp_path / "file", 3)


def test_many_writers_of_one_file(tmp_path):
    contents = [bytes([i]) * 300_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: replace_file(tmp_path / "file", contents[i % 8]), range(80)))
    assert (tmp_path / "file").read_bytes() in contents
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_killed_processes_left_is_removed(tmp_path):
    old, new = tmp_path / ".unet_fast-0.part", tmp_path / ".unet_fast-1.part"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    make_folder(tmp_path)
    assert list(tmp_path.iterdir()) == [new]  # its process may still write


@pytest.fixture
def discs(tmp_path):
    return discs_in(tmp_path / "data")


def test_one_run_for_each_folder(discs, tmp_path, capsys):
    out = tmp_path / "run"
    train(config(discs, out))
    (out / ".unet_fast-0.part").write_bytes(b"half")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    process = hold(out / "state.safetensors")
    assert main(["train", *map(str, discs), "--out", str(out), "--resume"]) == 2
    line = f"unet-fast: {out / 'state.safetensors'}: another process is writing it\n"
    assert capsys.readouterr().err.endswith(line)
    process.kill()
    process.communicate()
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert after == before | {out / ".state.safetensors.lock": b""}
    train(config(discs, out, resume=True))
    assert not list(out.glob(".*"))


def test_one_process_for_each_result(discs, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "results"
    train(config(discs, run))
    out.mkdir()
    process = hold(out / "1.png")
    assert main(["predict", str(run), str(discs[0]), "--out", str(out)]) == 1
    assert f"\n{out / '1.png'}: another process is writing it\n" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert sorted(path.name for path in out.glob("*.png")) == ["0.png", "2.png"]
    assert main(["predict", str(run), str(discs[0]), "--out", str(out), "--resume"]) == 0
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    assert names == {f"{folder}{i}.png" for folder in ("", "overlays/") for i in range(3)}


def test_a_run_killed_before_its_pictures_draws_them_later(discs, tmp_path, monkeypatch):
    changes = {"steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "previews": 2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config(discs, whole, **changes))

    def die(*_):
        raise SystemExit

    monkeypatch.setattr(previews, "draw_previews", die)
    with pytest.raises(SystemExit):
        train(config(discs, broken, **changes))
    monkeypatch.undo()
    train(config(discs, broken, resume=True, **changes))
    pictures = [sorted(p.name for p in (r / "previews").iterdir()) for r in (whole, broken)]
    assert pictures[0] == pictures[1]
    for name in pictures[0]:
        one, two = ((r / "previews" / name).read_bytes() for r in (whole, broken))
        assert one == two
