"""The decoder gives Pillow's pixels bit for bit or declines, whatever it is fed; cuts are Pillow's filter bit for bit."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
from encoded import encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cossl.pipelines import jpeg
from cossl.pipelines.cut import LANES, cut, planes_of, stride_of
from cossl.pipelines.cut import workspace as cut_workspace

OPTIONS = [{"quality": 90}, {"quality": 5}, {"quality": 100, "optimize": True}, {"quality": 75, "restart_marker_blocks": 3}]
SIZES = [(64, 48), (1, 1), (5, 1), (7, 9), (8, 8), (16, 16), (17, 33), (123, 77), (40, 250)]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with grain, so that every frequency occurs."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(coarse) + random.normal(0, 12, (height, width, 3))).clip(0, 255).astype(np.uint8))


def pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def ours(data: bytes, height: int, width: int) -> np.ndarray | None:
    out = np.empty((height, width, 3), np.uint8)
    return out if jpeg.decode(np.frombuffer(data, np.uint8), height, width, out) else None


def boxed(data: bytes, height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray | None:
    stride = stride_of(box[3] - box[1])
    rgb = np.empty(3 * (box[2] - box[0]) * stride + LANES, np.uint8)
    space = jpeg.workspace(height * width, max(height, width), len(data))
    if jpeg.decode_box(np.frombuffer(data, np.uint8), height, width, box, rgb, space) != jpeg.OK:
        return None
    return rgb[: 3 * (box[2] - box[0]) * stride].reshape(box[2] - box[0], 3, stride)[:, :, : box[3] - box[1]].transpose(2, 0, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("subsampling", [0, 1, 2, "grey"])
def test_pixels_are_pillows(size: tuple[int, int], options: dict, subsampling: int | str) -> None:
    image = photo(*size)
    data = encoded(image.convert("L"), **options) if subsampling == "grey" else encoded(image, subsampling=subsampling, **options)
    result = ours(data, size[1], size[0])
    if subsampling in (1, 2) and size[0] <= 4:
        assert result is None  # libjpeg has a filter of its own there; Pillow decodes these
    else:
        np.testing.assert_array_equal(result, pillow(data))


def test_chroma_halved_in_height_alone() -> None:
    cv2 = pytest.importorskip("cv2")
    image = np.asarray(photo(61, 83))
    for factor in (cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420):
        data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor])[1].tobytes()
        np.testing.assert_array_equal(ours(data, 83, 61), pillow(data))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2), st.integers(0, 10**6), st.data())
def test_a_box_is_the_same_part_of_the_picture(subsampling: int, seed: int, data: st.DataObject) -> None:
    image = photo(75, 90, seed % 7)
    stored = encoded(image, quality=85, subsampling=subsampling, restart_marker_rows=seed % 2)
    left, top = data.draw(st.integers(0, 74)), data.draw(st.integers(0, 89))
    right, bottom = data.draw(st.integers(left + 1, 75)), data.draw(st.integers(top + 1, 90))
    np.testing.assert_array_equal(boxed(stored, 90, 75, (left, top, right, bottom)), pillow(stored)[top:bottom, left:right])


DECLINED = {
    "progressive": encoded(photo(40, 30), progressive=True),
    "CMYK": encoded(photo(40, 30).convert("CMYK")),
    "PNG": encoded(photo(40, 30), "PNG"),
    "empty": b"",
    "two bytes": b"\xff\xd8",
    "RGB inside": encoded(photo(40, 30), keep_rgb=True),
}


@pytest.mark.parametrize("kind", DECLINED)
def test_other_kinds_are_left_to_pillow(kind: str) -> None:
    assert ours(DECLINED[kind], 30, 40) is None


@pytest.mark.parametrize("factors", [0x11, 0x22, 0x41, 0x34, 0x15, 0xC1, 0x01, 0x20])
def test_sampling_factors_of_a_single_component_only_have_to_be_allowed(factors: int) -> None:
    data = bytearray(encoded(photo(40, 30).convert("L"), restart_marker_blocks=4))
    data[data.index(b"\xff\xc0") + 11] = factors
    result = ours(bytes(data), 30, 40)
    if all(1 <= factor <= 4 for factor in divmod(factors, 16)):
        np.testing.assert_array_equal(result, pillow(bytes(data)))
    else:
        assert result is None
        with pytest.raises(OSError, match="broken data stream"):
            pillow(bytes(data))


def test_another_size_than_stated_is_declined() -> None:
    assert ours(encoded(photo(40, 30)), 40, 30) is None


def test_every_truncation_is_declined() -> None:
    data = encoded(photo(64, 48), quality=80)
    assert ours(data, 48, 64) is not None
    for length in range(0, len(data), 7):
        assert ours(data[:length], 48, 64) is None, length


@settings(max_examples=600, deadline=None)
@given(st.integers(0, 3), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_is_declined_or_read_as_pillow_reads_it(kind: int, changes: list[tuple[float, int]]) -> None:
    """Never a crash, never pixels of its own."""
    data = bytearray(encoded(photo(64, 48), quality=60, subsampling=kind % 3, restart_marker_blocks=5 * (kind == 3)))
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    result = ours(bytes(data), 48, 64)
    if result is not None:
        np.testing.assert_array_equal(result, pillow(bytes(data)))


def cut_out(image: np.ndarray, top: int, left: int, height: int, width: int, flip: bool, size: int) -> np.ndarray:
    tall, wide, _ = image.shape
    planes, out = np.empty(3 * wide * stride_of(tall) + LANES, np.uint8), np.empty((size, size, 3), np.uint8)
    planes_of(image.reshape(-1), wide, (0, 0, wide, tall), planes)
    cut(planes, tall, top, left, height, width, flip, out.ctypes.data, size, cut_workspace(max(tall, wide), size))
    return out


def test_cut_is_pillows_antialiased_bilinear() -> None:
    """The width first, then the height; Pillow 13 turns that around for tall boxes, so each is asked for alone."""
    random = np.random.default_rng(0)
    for trial in range(80):
        tall, wide = random.integers(1, 500 if trial % 4 == 0 else 200, 2)
        image = random.integers(0, 256, (tall, wide, 3), dtype=np.uint8)
        h, w = int(random.integers(1, tall + 1)), int(random.integers(1, wide + 1))
        top, left, size = int(random.integers(0, tall - h + 1)), int(random.integers(0, wide - w + 1)), int(random.integers(16, 200))
        box = Image.fromarray(image).crop((left, top, left + w, top + h))
        expected = np.asarray(box.resize((size, h), Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BILINEAR))
        expected = expected[:, ::-1] if trial % 2 else expected
        np.testing.assert_array_equal(cut_out(image, top, left, h, w, bool(trial % 2), size), expected)


def test_a_shrunk_box_is_antialiased() -> None:
    """Stripes of one pixel become grey; two taps would leave stripes or invent coarse ones."""
    image = np.zeros((128, 128, 3), np.uint8)
    image[:, ::2] = 255
    assert np.ptp(cut_out(image, 0, 0, 128, 128, False, 32)[4:-4, 4:-4].astype(int)) <= 2


def guarded(memory: Any, whole: list[np.ndarray]) -> Any:
    """The same arrays, with 256 bytes of 0xA5 before and behind each; whole gets all of the bytes."""
    if isinstance(memory, tuple):
        return tuple(guarded(part, whole) for part in memory)
    whole.append(np.full(memory.nbytes + 512, 0xA5, np.uint8))
    inner = whole[-1][256:-256].view(memory.dtype).reshape(memory.shape)
    inner[...] = memory
    return inner


def test_nothing_is_written_beside_the_memory_given() -> None:
    """Kernels write to bare addresses, whole vectors at a time: for pictures and boxes of any shape there is room for the last one."""
    random = np.random.default_rng(0)
    for trial in range(120):
        widest, tallest = [(300, 6), (6, 300), (150, 150)][trial % 3]
        wide, tall = int(random.integers(1, widest)), int(random.integers(1, tallest))
        image = photo(wide, tall)
        data = encoded(image.convert("L") if trial % 4 == 3 else image, subsampling=trial % 4 % 3)
        h, w = int(random.integers(1, tall + 1)), int(random.integers(1, wide + 1))
        top, left, size = int(random.integers(0, tall - h + 1)), int(random.integers(0, wide - w + 1)), int(random.integers(16, 80))
        whole: list[np.ndarray] = []
        space = guarded(jpeg.workspace(tall * wide, max(tall, wide), len(data)), whole)
        planes, out = (guarded(np.zeros(n, np.uint8), whole) for n in (3 * w * stride_of(h), 3 * size * size))
        if jpeg.decode_box(np.frombuffer(data, np.uint8), tall, wide, (left, top, left + w, top + h), planes, space) != jpeg.OK:
            planes_of(np.asarray(image).reshape(-1), wide, (left, top, left + w, top + h), planes)
        padded = np.append(planes, np.zeros(LANES, np.uint8))
        cut(padded, h, 0, 0, h, w, bool(trial % 2), out.ctypes.data, size, guarded(cut_workspace(max(tall, wide), size), whole))
        assert all((memory[:256] == 0xA5).all() and (memory[-256:] == 0xA5).all() for memory in whole), (wide, tall, h, w, size)
