"""`cossl convert`: every odd picture meets the stated policy, and a conversion is whole or not there."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cossl.pipelines.convert as conversion
from cossl.pipelines.beton import Beton, Row, list_image_folder, manifest_path, verify
from cossl.pipelines.convert import FolderRows, Options, convert
from cossl.pipelines.ffcv_loader import decode_function
from cossl.tools import cli
from cossl.tools.write_beton import summary

pytest.importorskip("ffcv")


def picture(seed: int = 0, width: int = 48, height: int = 32) -> Image.Image:
    """A smooth picture that differs in every corner, so that a rotation shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), exif=exif, quality=95)


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "pictures"
    for i in range(20):
        (root / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        (root / f"class{i % 2}" / f"{i:03}.jpg").write_bytes(encoded(picture(i)))
    return root


def row_of(data: bytes, tmp_path: Path, **options) -> Row | str:
    """What the policy makes of one file, whatever its suffix."""
    file = tmp_path / "file.JPEG"
    file.write_bytes(data)
    return FolderRows([file], [0], Options(**options), decode_function())[0]


def pixels(row: Row) -> np.ndarray:
    if row.stored == "raw pixels":
        return row.payload.reshape(row.height, row.width, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken EXIF, which is what some of these pictures are about
        return np.asarray(Image.open(io.BytesIO(row.payload.tobytes())))


def assert_near(ours: np.ndarray, theirs: Image.Image, least_psnr_db: float = 30) -> None:
    theirs_rgb = np.asarray(theirs.convert("RGB"))
    assert ours.shape == theirs_rgb.shape
    assert 10 * np.log10(255**2 / max(1e-9, np.mean((ours.astype(float) - theirs_rgb) ** 2))) > least_psnr_db


KEPT = {
    "plain": encoded(picture()),
    "progressive": encoded(picture(), progressive=True),
    "no subsampling": encoded(picture(), subsampling=0),
    "stored as RGB": encoded(picture(), keep_rgb=True),
    "byte after the end": encoded(picture()) + b"\n",
    "orientation 1": turned(1),
    "orientation 0": turned(0),
    "broken EXIF": encoded(picture(), exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff garbage"),
    "one pixel": encoded(picture(width=1, height=1)),
    "narrow": encoded(picture(width=2, height=300)),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_plain_jpeg_keeps_its_bytes(name, tmp_path):
    row = row_of(KEPT[name], tmp_path)
    assert isinstance(row, Row)
    assert (row.stored, row.payload.tobytes()) == ("original bytes", KEPT[name])
    assert pixels(row).shape == (row.height, row.width, 3)


CONVERTED = {
    "PNG": encoded(picture(), "PNG"),
    "PNG with alpha": encoded(picture().convert("RGBA"), "PNG"),
    "palette": encoded(picture().quantize(64), "PNG"),
    "palette with transparency": encoded(picture().quantize(64), "PNG", transparency=bytes(range(64))),
    "one-bit": encoded(picture().convert("1"), "PNG"),
    "GIF": encoded(picture(), "GIF"),
    "BMP": encoded(picture(), "BMP"),
    "WebP": encoded(picture(), "WEBP", lossless=True),
    "grayscale": encoded(picture().convert("L")),
    "CMYK": encoded(picture().convert("CMYK")),
}


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_everything_else_becomes_rgb(name, mode, tmp_path):
    row = row_of(CONVERTED[name], tmp_path, mode=mode, jpeg_quality=98)
    assert isinstance(row, Row)
    with Image.open(io.BytesIO(CONVERTED[name])) as source:
        if mode == "raw":
            rgba = source.convert("RGBA") if "palette" in name else source
            assert np.array_equal(pixels(row), np.asarray(rgba.convert("RGB")))
        elif name != "one-bit":  # dither is what JPEG is worst at
            assert_near(pixels(row), source.convert("RGBA"))
    assert row.stored == ("re-encoded" if mode == "jpg" else "raw pixels")


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotation_is_applied(orientation, tmp_path):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]
    row = row_of(turned(orientation), tmp_path)
    assert isinstance(row, Row)
    assert row.stored == "re-encoded"
    assert_near(pixels(row), picture().transpose(undo), 28)
    assert Image.open(io.BytesIO(row.payload.tobytes())).getexif().get(0x0112, 1) == 1


BAD = {
    "empty": (b"", "empty file"),
    "text": (b"class,count\n", "no picture"),
    "TIFF": (encoded(picture(), "TIFF"), "no picture"),
    "half a JPEG": (encoded(picture(width=200, height=200))[:1500], "truncated"),
    "a JPEG's first bytes": (encoded(picture())[:20], "a JPEG that Pillow cannot read"),
    "half a progressive JPEG": (encoded(picture(width=200, height=200), progressive=True)[:1500], "truncated"),
    "half a PNG": (encoded(picture(width=200, height=200), "PNG")[:3000], "damaged: "),
    "16-bit": (encoded(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)), "PNG"), "not 8-bit"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_what_cannot_be_decoded_is_named_not_guessed(name, mode, tmp_path):
    data, reason = BAD[name]
    answer = row_of(data, tmp_path, mode=mode)
    assert isinstance(answer, str)
    assert reason in answer


def test_a_jpeg_that_turbojpeg_warns_about_is_encoded_again(tmp_path):
    data = encoded(picture())
    with_junk = data[:-2] + bytes(50) + data[-2:]  # libjpeg: "extraneous bytes before marker 0xd9"; Pillow says nothing
    row = row_of(with_junk, tmp_path)
    assert isinstance(row, Row)
    assert row.stored == "re-encoded"
    assert_near(pixels(row), Image.open(io.BytesIO(with_junk)))


def test_sides_and_pixel_counts_beyond_the_format(tmp_path, monkeypatch):
    wide = encoded(Image.new("RGB", (65_536, 1)), "PNG")
    assert "65536 x 1 px" in str(row_of(wide, tmp_path))
    row = row_of(wide, tmp_path, max_side_px=100)
    assert isinstance(row, Row)
    assert (row.width, row.height) == (100, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert row_of(encoded(Image.new("RGB", (200, 200)), "PNG"), tmp_path) == "more than 179 million pixels"


def test_max_side_shrinks_only_what_is_larger(tmp_path):
    data = encoded(picture(width=100, height=50), quality=95)
    shrunk = row_of(data, tmp_path, max_side_px=50)
    assert isinstance(shrunk, Row)
    assert (shrunk.width, shrunk.height, shrunk.stored) == (50, 25, "re-encoded")
    assert_near(pixels(shrunk), Image.open(io.BytesIO(data)).resize((50, 25), Image.Resampling.BOX))
    same = row_of(data, tmp_path, max_side_px=100)
    assert isinstance(same, Row)
    assert same.stored == "original bytes"


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
    monkeypatch.setattr(conversion, "FolderRows", Trap)
    out = tmp_path / "set.beton"
    with pytest.raises(RuntimeError, match=r"a writer process died at .*014.jpg \(killed: out of memory\?\)"):
        convert(folder, out, num_workers=num_workers, progress=False)
    assert nothing_left(out)


def test_a_picture_that_vanishes_ends_the_conversion(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Trap, "spring", lambda self: self.files[7].unlink())
    monkeypatch.setattr(conversion, "FolderRows", Trap)
    out = tmp_path / "set.beton"
    with pytest.raises(RuntimeError, match=r"writing failed at .*014.jpg: .*No such file"):
        convert(folder, out, num_workers=2, progress=False)
    assert nothing_left(out)


def test_a_picture_that_changes_under_the_conversion_is_quarantined(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Trap, "spring", lambda self: self.files[7].write_bytes(b"") and None)
    monkeypatch.setattr(conversion, "FolderRows", Trap)
    assert convert(folder, tmp_path / "set.beton", num_workers=2, progress=False).quarantined == (("class0/014.jpg", "empty file"),)


@pytest.mark.parametrize("limit_bytes", [1 << 20, (1 << 23) + (1 << 20), 1 << 24])
def test_a_full_disk_ends_the_conversion(folder, tmp_path, limit_bytes):
    """A limit on the file's size, met inside the first page, the second page, and the last table."""
    for i in range(4):
        Image.new("RGB", (1000, 1000), "teal").save(folder / "class1" / f"large{i}.png")
    out, (soft, hard) = tmp_path / "set.beton", resource.getrlimit(resource.RLIMIT_FSIZE)
    out.write_bytes(b"what was there before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises((RuntimeError, OSError), match=r"writing .*failed|File too large"):
            convert(folder, out, mode="raw", num_workers=2, overwrite=True, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes() == b"what was there before"
    out.unlink()
    assert nothing_left(out)


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
    "no such folder": (lambda root: root / "nowhere", "set.beton", [], "nowhere"),
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
ODD = {
    "bad_exif_grey_500x500.jpg": "re-encoded",
    "broken_stream_1280x960.jpg": "damaged: broken data stream",
    "cmyk_100x100.jpg": "re-encoded",
    "cmyk_256x256_adobe0.jpg": "re-encoded",
    "cmyk_exif6_800x533.jpg": "re-encoded",
    "empty.jpg": "empty file",
    "imagenet_exif_orientation0__n01728572_thunder_snake.JPEG": "original bytes",
    "imagenet_exif_orientation6__n02951585_can_opener.JPEG": "re-encoded",
    "imagenet_grey__n02676566_acoustic_guitar.JPEG": "re-encoded",
    "imagenet_large_1836x1377__n03843555_oil_filter.JPEG": "original bytes",
    "imagenet_narrow_40x122__n04074963_15621_remote_control.jpg": "original bytes",
    "imagenet_png_rgba_named_JPEG__n02105855_2933.JPEG": "re-encoded",
    "imagenet_progressive__n02274259_4225_butterfly.jpg": "original bytes",
    "imagenet_tiny_75x56__n01871265_tusker.JPEG": "original bytes",
    "imagenet_trailing_byte_360x360__n04317175_5409_stethoscope.jpg": "original bytes",
    "rgb_colourspace_500x333.jpg": "original bytes",
    "truncated_360x216.jpg": "damaged: image file is truncated",
    "truncated_progressive_100x100.jpg": "damaged: image file is truncated",
    "twelve_bit.jpg": "a JPEG that Pillow cannot read",
    "ycck_500x333.jpg": "re-encoded",
}


@pytest.mark.skipif(not DATA.is_dir(), reason="COSSL_DATA names no folder")
def test_real_oddities_meet_the_policy(tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "all").symlink_to(DATA / "odd")
    convert(tmp_path / "odd", tmp_path / "odd.beton", num_workers=2, progress=False)
    verify(tmp_path / "odd.beton", decode=None)
    files = sorted(file for file in (DATA / "odd").iterdir() if file.suffix != ".md")
    assert [file.name for file in files] == sorted(ODD)
    rows = FolderRows(files, [0] * len(files), Options(), decode_function())
    for i, file in enumerate(files):
        row = rows[i]
        assert (row if isinstance(row, str) else row.stored).startswith(ODD[file.name]), file.name
    narrow = rows[files.index(DATA / "odd" / "cmyk_exif6_800x533.jpg")]
    assert isinstance(narrow, Row)
    assert (narrow.width, narrow.height) == (533, 800)


@pytest.mark.skipif(not DATA.is_dir(), reason="COSSL_DATA names no folder")
def test_real_imagenet_keeps_its_bytes(tmp_path):
    root = DATA / "imagenet-sample" / "train"
    report = convert(root, tmp_path / "in.beton", num_workers=2, progress=False)
    assert report.stored["original bytes"] == 293
    assert report.quarantined == ()
    beton, (files, _, _) = Beton(tmp_path / "in.beton"), list_image_folder(root)
    assert sum(beton.payload(i).tobytes() == file.read_bytes() for i, file in enumerate(files)) == 293
    assert manifest_path(tmp_path / "in.beton").is_file()
