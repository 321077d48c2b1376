"""Betons on the disk of the node that a job runs on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_slurm import made

from cossl.slurm.folder import Sweep
from cossl.slurm.point import staged, trainer


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    return made(tmp_path, 3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "shared disk"
    folder.mkdir()
    for name in ("train.beton", "train.beton.json", "val.beton", "val.beton.json"):
        (folder / name).write_bytes(os.urandom(1000))
        os.utime(folder / name, ns=(10**18, 10**18 + 123_456_789))
    (folder / "train").mkdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_betons_are_copied_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = staged(data, tmp_path / "node")
    assert target.is_relative_to(tmp_path / "node" / f"cossl-{os.getuid()}")
    assert contents(target) == contents(data)
    monkeypatch.setattr(shutil, "copy2", lambda *_: pytest.fail("copied again"))
    assert staged(data, tmp_path / "node") == target


def test_another_folder_of_pictures_has_another_copy(data: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    shutil.copytree(data, tmp_path / "b" / "shared disk")
    assert staged(data, tmp_path / "node") != staged(tmp_path / "b" / "shared disk", tmp_path / "node")


@pytest.mark.parametrize("how", ["size", "time", "more files"])
def test_an_original_that_was_made_anew_is_copied_again(data: Path, tmp_path: Path, how: str) -> None:
    staged(data, tmp_path / "node")
    if how == "size":
        (data / "val.beton").write_bytes(b"longer" * 1000)
        os.utime(data / "val.beton", ns=(10**18, 10**18))
    elif how == "time":
        (data / "val.beton").write_bytes(os.urandom(1000))
        os.utime(data / "val.beton", ns=(10**18, 10**18 + 10**9))
    else:
        (data / "test.beton").write_text("x")
    assert contents(staged(data, tmp_path / "node")) == contents(data)


def test_without_room_the_original_is_read_and_that_is_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3999))
    assert staged(data, tmp_path / "node") == data
    assert capsys.readouterr().err.endswith(f"0.0 GiB free, 0.0 are needed: reading {data}\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4000))
    assert staged(data, tmp_path / "node") != data


def test_a_disk_that_fills_up_meanwhile_is_no_failure(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = shutil.copy2

    def full(source: Path, target: Path) -> None:
        if source.name == "val.beton":
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(shutil, "copy2", full)
    assert staged(data, tmp_path / "node") == data
    assert capsys.readouterr().err.endswith(f"No space left on device: reading {data}\n")
    assert not list((tmp_path / "node").rglob("*.part"))
    monkeypatch.undo()
    assert contents(staged(data, tmp_path / "node")) == contents(data)


def test_a_variable_that_the_node_has_not_is_no_folder(
    own: Sweep, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    point = own.points[0]._replace(flags=["--data", str(data)])
    monkeypatch.delenv("NODE_DISK", raising=False)
    assert trainer(own, point, "$NODE_DISK") == trainer(own, point)
    assert capsys.readouterr().err.startswith("cossl sweep: scratch $NODE_DISK: no absolute path, or a variable that this node has not")
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "node"))
    command = trainer(own, point, "$NODE_DISK/x")
    assert command[command.index("--data") + 1] == str(staged(data, tmp_path / "node" / "x"))
    assert not (tmp_path / "$NODE_DISK").exists()


def test_folders_of_pictures_stay_where_they_are(data: Path, tmp_path: Path) -> None:
    (data / "train.beton").unlink()
    assert staged(data, tmp_path / "node") == data
    assert not (tmp_path / "node").exists()


def test_of_several_processes_on_a_node_one_copies(data: Path, tmp_path: Path) -> None:
    code = f"""
import pathlib, shutil, sys, time
from cossl.slurm.point import staged
real = shutil.copy2
def slow(source, target):
    print("copied", flush=True)
    time.sleep(0.05)
    real(source, target)
shutil.copy2 = slow
target = staged(pathlib.Path({str(data)!r}), pathlib.Path({str(tmp_path / "node")!r}))
print(sum(path.stat().st_size for path in target.iterdir()))
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    words = [process.communicate()[0].split() for process in running]
    assert sorted(words) == [["4000"], ["4000"], ["copied"] * 4 + ["4000"]]
