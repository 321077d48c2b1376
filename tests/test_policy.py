"""What `cossl convert` makes of each kind of picture: its bytes kept, encoded again as RGB, or left out with the reason."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from encoded import encoded, picture, turned
from PIL import Image

from cossl.pipelines.beton import Row, verify
from cossl.pipelines.convert import FolderRows, Options, convert
from cossl.pipelines.jpeg import decode


def row_of(data: bytes, tmp_path: Path, **options) -> Row | str:
    """What the policy makes of one file, whatever its suffix."""
    file = tmp_path / "file.JPEG"
    file.write_bytes(data)
    return FolderRows([file], Options(**options), decode)[0]


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
    "byte after the end": encoded(picture()) + b"\n",
    "orientation 1": turned(1),
    "orientation 0": turned(0),
    "broken EXIF": encoded(picture(), exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff garbage"),
    "EXIF that is none": encoded(picture(), exif=b"Exif\x00\x00garbage of no byte order"),
    "narrow": encoded(picture(width=8, height=300)),
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
    "JPEG stored as RGB": encoded(picture(), keep_rgb=True),  # this and the next two are JPEGs that the training decoder leaves to Pillow
    "two pixels wide": encoded(picture(width=2, height=300)),
    "one pixel": encoded(picture(width=1, height=1)),
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


def test_a_jpeg_with_stray_bytes_inside_is_encoded_again(tmp_path):
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
    "rgb_colourspace_500x333.jpg": "re-encoded",
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
    rows = FolderRows(files, Options(), decode)
    for i, file in enumerate(files):
        row = rows[i]
        assert (row if isinstance(row, str) else row.stored).startswith(ODD[file.name]), file.name
    narrow = rows[files.index(DATA / "odd" / "cmyk_exif6_800x533.jpg")]
    assert isinstance(narrow, Row)
    assert (narrow.width, narrow.height) == (533, 800)
