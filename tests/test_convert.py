"""`cossl convert`: a conversion is whole or not there, and every mistake costs one line."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encoded import encoded, picture
from PIL import Image

import cossl.pipelines.convert as conversion
from cossl.pipelines.beton import Beton, Row, list_image_folder, manifest_path, verify
from cossl.pipelines.convert import FolderRows, convert
from cossl.tools import cli
from cossl.tools.write_beton import summary


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "pictures"
    for i in range(20):
        (root / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        (root / f"class{i % 2}" / f"{i:03}.jpg").write_bytes(encoded(picture(i)))
    return root


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_proportion_and_workers_do_not_change_a_row(folder, tmp_path, num_workers):
    out = tmp_path / "mixed.beton"
    report = convert(folder, out, mode="proportion", jpeg_fraction=0.4, num_workers=num_workers, progress=False)
    beton = Beton(out)
    assert [beton.mode(i) for i in range(20)] == ["jpg" if np.random.default_rng(i).random() < 0.4 else "raw" for i in range(20)]
    assert 2 < report.stored["original bytes"] < 15
    for i, file in enumerate(list_image_folder(folder)[0]):
        assert np.array_equal(np.asarray(beton.open(i)), np.asarray(Image.open(file)))


def test_left_out_pictures_take_no_row_and_are_listed(folder, tmp_path):
    (folder / "class0" / "000.jpg").write_bytes(b"")
    (folder / "class1" / "011.jpg").write_bytes(b"no picture")
    report = convert(folder, tmp_path / "set.beton", num_workers=2, progress=False)
    beton = Beton(tmp_path / "set.beton")
    good = [file for file in list_image_folder(folder)[0] if file.name not in ("000.jpg", "011.jpg")]
    assert [beton.payload(i).tobytes() for i in range(len(beton))] == [file.read_bytes() for file in good]
    assert beton.labels.tolist() == [int(file.parent.name[-1]) for file in good]
    left_out = (("class0/000.jpg", "empty file"), ("class1/011.jpg", "no picture (none of JPEG, PNG, GIF, BMP, WebP)"))
    assert report.quarantined == left_out
    assert beton.manifest is not None
    assert [(entry["file"], entry["reason"]) for entry in beton.manifest["quarantined"]] == list(left_out)
    assert beton.manifest["source"] == "pictures"
    assert verify(tmp_path / "set.beton", decode=None).num_decoded == 18
    text = summary(report)
    assert "pictures/s)" in text
    again = convert(folder, tmp_path / "set.beton", resume=True, progress=False)
    assert "was finished before" in summary(again)  # no rate: nothing was converted
    odd = summary(replace(report, quarantined=((os.fsdecode(b"b\xff.jpg"), "why"),)))
    assert r"b\xff.jpg: why" in odd
    odd.encode()  # so a terminal of UTF-8 can show it
    assert "18 pictures (18 original bytes) in 2 classes" in text
    assert "class0/000.jpg: empty file" in text


def test_a_picture_larger_than_ffcvs_page(folder, tmp_path):
    Image.new("RGB", (1800, 1700), "teal").save(folder / "class0" / "big.png")
    convert(folder, tmp_path / "set.beton", mode="raw", num_workers=2, progress=False)
    beton = Beton(tmp_path / "set.beton")
    assert beton.sizes.max() == 1800 * 1700 * 3
    assert beton.page_bytes >= 1800 * 1700 * 3
    assert verify(tmp_path / "set.beton", decode=None).num_rows == 21


def test_the_order_is_torchvisions(folder):
    from torchvision.datasets import ImageFolder

    (folder / "class0" / "nested").mkdir()
    (folder / "class0" / "nested" / "z.jpg").write_bytes(encoded(picture()))
    (folder / "class0" / ".hidden").write_bytes(b"")
    (folder / "labels.txt").write_text("beside the class folders: nobody's business")
    files, labels, names = list_image_folder(folder)
    theirs = ImageFolder(str(folder))
    assert [(str(file), label) for file, label in zip(files, labels, strict=True)] == theirs.samples
    assert names == theirs.classes


def nothing_left(out: Path) -> bool:
    """No file of a conversion, finished or not, and no process."""
    return (
        not [path for path in out.parent.iterdir() if path.name.lstrip(".").startswith(out.name)] and not multiprocessing.active_children()
    )


def resumes_to_the_same(folder: Path, out: Path, **options) -> bool:
    """Whether --resume goes on from what an error left, to the bytes of a conversion that met none; removes both."""
    convert(folder, out, resume=True, num_workers=2, progress=False, **options)
    ours = out.read_bytes(), manifest_path(out).read_bytes()
    convert(folder, out, overwrite=True, num_workers=1, progress=False, **options)
    same = ours == (out.read_bytes(), manifest_path(out).read_bytes())
    out.unlink()
    manifest_path(out).unlink()
    return same and nothing_left(out)


class Trap(FolderRows):
    """Rows of which number 7 does something terrible to its writer process."""

    def __getitem__(self, i: int) -> Row | str:
        if i == 7:
            self.spring()
        return super().__getitem__(i)

    def spring(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_writer_ends_the_conversion(folder, tmp_path, monkeypatch, num_workers):
    out = tmp_path / "set.beton"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "FolderRows", Trap)
        with pytest.raises(RuntimeError, match=r"a writer process died at .*014.jpg \(killed: out of memory\?\)"):
            convert(folder, out, num_workers=num_workers, progress=False)
    assert not out.exists()
    assert not multiprocessing.active_children()
    assert resumes_to_the_same(folder, out)


def test_a_picture_that_vanishes_ends_the_conversion(folder, tmp_path, monkeypatch):
    out, file = tmp_path / "set.beton", folder / "class0" / "014.jpg"
    data = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Trap, "spring", lambda self: self.file(7).unlink())
        patch.setattr(conversion, "FolderRows", Trap)
        with pytest.raises(RuntimeError, match=r"writing failed at .*014.jpg: .*No such file"):
            convert(folder, out, num_workers=2, progress=False)
    assert not out.exists()
    assert not multiprocessing.active_children()
    file.write_bytes(data)
    assert resumes_to_the_same(folder, out)


def test_a_fault_of_the_program_is_no_damaged_picture(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(FolderRows, "_room", lambda self, *size, keep: self.nothing)
    with pytest.raises(RuntimeError, match=r"writing failed at .*jpg: AttributeError: .*nothing"):
        convert(folder, tmp_path / "set.beton", num_workers=2, progress=False)
    assert nothing_left(tmp_path / "set.beton")


def test_a_picture_that_changes_under_the_conversion_is_quarantined(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Trap, "spring", lambda self: self.file(7).write_bytes(b"") and None)
    monkeypatch.setattr(conversion, "FolderRows", Trap)
    assert convert(folder, tmp_path / "set.beton", num_workers=2, progress=False).quarantined == (("class0/014.jpg", "empty file"),)


@pytest.mark.parametrize("limit_bytes", [1 << 20, (1 << 23) + (1 << 20), (1 << 24) + (1 << 18)])
def test_a_full_disk_ends_the_conversion(folder, tmp_path, limit_bytes):
    """A limit on the file's size, met before the first payload, between two of them, and in the last table."""
    for i in range(4):
        Image.new("RGB", (900, 900), "teal").save(folder / "class1" / f"large{i}.png")
    out, (soft, hard) = tmp_path / "set.beton", resource.getrlimit(resource.RLIMIT_FSIZE)
    out.write_bytes(b"what was there before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises((RuntimeError, OSError), match=r"File too large"):
            convert(folder, out, mode="raw", num_workers=2, overwrite=True, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes() == b"what was there before"
    assert not multiprocessing.active_children()
    out.unlink()
    assert resumes_to_the_same(folder, out, mode="raw")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 10 MiB; it is skipped where mounting one is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_with_room_made_goes_on(folder, small_disk, capfd):
    for i in range(40):
        Image.new("RGB", (400, 400), "teal").save(folder / "class1" / f"large{i:02}.png")
    out = small_disk / "set.beton"
    with pytest.raises(RuntimeError, match=r"No space left on device. \d+ pictures are done and kept: .*--resume"):
        convert(folder, out, mode="raw", num_workers=2, progress=False)
    assert [path.name for path in small_disk.iterdir()] == [".set.beton.partial"]
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert resumes_to_the_same(folder, out, mode="raw")


def test_a_target_that_someone_else_wrote_meanwhile_stays(folder, tmp_path, monkeypatch):
    out = tmp_path / "set.beton"
    monkeypatch.setattr(conversion, "_sync", lambda path: out.write_bytes(b"theirs"))
    with pytest.raises(ValueError, match="written by someone else meanwhile"):
        convert(folder, out, progress=False)
    assert out.read_bytes() == b"theirs"
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_force_replaces_beton_and_manifest(folder, tmp_path):
    out = tmp_path / "set.beton"
    convert(folder, out, progress=False)
    (folder / "class0" / "000.jpg").unlink()
    with pytest.raises(ValueError, match="--force"):
        convert(folder, out, progress=False)
    assert verify(out).num_rows == 20
    convert(folder, out, overwrite=True, progress=False)
    assert verify(out).num_rows == 19
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "set.beton", "set.beton.json"]


def _empty(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def _flat(root: Path) -> Path:
    (root / "flat").mkdir()
    (root / "flat" / "a.jpg").write_bytes(encoded(picture()))
    return root / "flat"


def _hollow(root: Path) -> Path:
    (root / "pictures" / "class5").mkdir()
    return root / "pictures"


def _all_bad(root: Path) -> Path:
    (root / "bad" / "a").mkdir(parents=True)
    (root / "bad" / "a" / "x.jpg").write_bytes(b"")
    return root / "bad"


def _class_bad(root: Path) -> Path:
    (root / "pictures" / "class7").mkdir()
    (root / "pictures" / "class7" / "x.jpg").write_bytes(b"")
    return root / "pictures"


def _splits(root: Path) -> Path:
    (root / "train").mkdir()
    (root / "pictures").rename(root / "train" / "a")
    return root


MISTAKES = {
    "no such folder": (lambda root: root / "nowhere", "set.beton", [], "no such folder: "),
    "a file": (lambda root: root / "pictures/class0/000.jpg", "set.beton", [], "is a file"),
    "empty": (_empty, "set.beton", [], "empty is empty"),
    "no classes": (_flat, "set.beton", [], "has no class folders"),
    "a class without pictures": (_hollow, "set.beton", [], "without pictures: class5"),
    "all pictures bad": (_all_bad, "set.beton", [], "no picture can be read, the first because: empty file"),
    "a class of bad pictures": (_class_bad, "set.beton", [], "class7"),
    "a folder of splits": (_splits, "set.beton", [], "holds splits, not classes: train"),
    "no target folder": (lambda root: root / "pictures", "deep/set.beton", [], "make it first"),
    "target is a folder": (lambda root: root / "pictures", "pictures", [], "is a folder"),
    "bad quality": (lambda root: root / "pictures", "set.beton", ["--jpeg-quality", "0"], "jpeg_quality 0"),
    "bad side": (lambda root: root / "pictures", "set.beton", ["--max-side-px", "0"], "max_side_px 0"),
    "bad fraction": (lambda root: root / "pictures", "set.beton", ["--jpeg-fraction", "1.5"], "jpeg_fraction 1.5"),
    "no workers": (lambda root: root / "pictures", "set.beton", ["--workers", "0"], "0 workers"),
    "unknown mode": (lambda root: root / "pictures", "set.beton", ["--mode", "png"], "png"),
    "unknown flag": (lambda root: root / "pictures", "set.beton", ["--qualty", "90"], "qualty"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name, folder, tmp_path, monkeypatch, capfd):
    source, out, flags, expected = MISTAKES[name]
    monkeypatch.setattr(sys, "argv", ["cossl", "convert", str(source(tmp_path)), str(tmp_path / out), *flags])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capfd.readouterr()
    assert end.value.code == 2
    assert expected in " ".join(shown.err.split())
    assert "Traceback" not in shown.err
    if "unknown" not in name:  # tyro draws a frame around those two
        assert len([line for line in shown.err.splitlines() if line.startswith("cossl convert: ")]) == 1
        assert len(shown.err.splitlines()) == 1
    assert not (tmp_path / "set.beton").exists()
    assert not list(tmp_path.glob(".*partial*"))


def test_an_unwritable_target_is_said_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere, so the answer is made up
    with pytest.raises(ValueError, match="is not writable"):
        convert(folder, tmp_path / "set.beton")


def test_the_commands_end_to_end(folder, tmp_path, monkeypatch, capfd):
    out = tmp_path / "set.beton"
    monkeypatch.setattr(sys, "argv", ["cossl", "convert", str(folder), str(out), "--mode", "raw", "--max-side-px", "24", "--workers", "2"])
    cli.main()
    assert "20 pictures (20 raw pixels) in 2 classes" in capfd.readouterr().out
    assert (Beton(out).widths.max(), Beton(out).heights.max()) == (24, 16)
    monkeypatch.setattr(sys, "argv", ["cossl", "verify", str(out), "--decode", "all"])
    cli.main()
    assert "is whole: 20 pictures in 2 classes" in capfd.readouterr().out
    out.write_bytes(out.read_bytes()[:-100])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_progress_is_plain_lines_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter(np.arange(0, 100, 2.0))
    monkeypatch.setattr(conversion.time, "monotonic", lambda: next(clock))
    with conversion.progress_bar(100, "converting", "pictures") as done:
        for _ in range(10):
            done(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "converting: 30 of 100 pictures, 5 pictures/s, 14 s left",
        "converting: 60 of 100 pictures, 5 pictures/s, 8 s left",
        "converting: 90 of 100 pictures, 5 pictures/s, 2 s left",
    ]


DATA = Path(os.environ.get("COSSL_DATA", "/nonexistent"))


@pytest.mark.skipif(not DATA.is_dir(), reason="COSSL_DATA names no folder")
def test_real_imagenet_keeps_its_bytes(tmp_path):
    root = DATA / "imagenet-sample" / "train"
    report = convert(root, tmp_path / "in.beton", num_workers=2, progress=False)
    assert report.stored["original bytes"] == 293
    assert report.quarantined == ()
    beton, (files, _, _) = Beton(tmp_path / "in.beton"), list_image_folder(root)
    assert sum(beton.payload(i).tobytes() == file.read_bytes() for i, file in enumerate(files)) == 293
    assert manifest_path(tmp_path / "in.beton").is_file()
