"""The writer: ffcv reads its files, and the number of workers changes no byte."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from encoded import picture
from hypothesis import given
from hypothesis import strategies as st
from ninety_pictures import content, ninety_pictures, undisturbed

import cossl.pipelines.beton_writer as writer
from cossl.pipelines.beton import Beton
from cossl.pipelines.beton_writer import PAGE_BYTES, place, storage_order
from cossl.pipelines.convert import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ninety_pictures(tmp_path_factory.mktemp("source") / "pictures")


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    return undisturbed(folder, tmp_path_factory.mktemp("expected") / "set.beton")


# ---- the format -------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1 << 28), min_size=1, max_size=50), st.integers(0, 1 << 40))
def test_a_payload_never_crosses_a_page(sizes, position):
    page = max(PAGE_BYTES, 1 << (max(sizes) - 1).bit_length())
    for size in sizes:
        start = place(position, size)
        assert start >= position
        assert start // page == (start + size - 1) // page
        position = start + size


def test_small_payloads_fill_their_pages():
    """Nothing is left free but what the next payload does not fit into."""
    position = 5 * PAGE_BYTES
    for size in [PAGE_BYTES // 2, PAGE_BYTES // 2, 7, PAGE_BYTES - 7, 1]:
        assert place(position, size) == position
        position += size
    assert place(6 * PAGE_BYTES - 6, 7) == 6 * PAGE_BYTES


def test_rows_are_sorted_and_payloads_are_shuffled(folder, tmp_path):
    convert(folder, tmp_path / "set.beton", num_workers=2, progress=False)
    beton = Beton(tmp_path / "set.beton")
    files = [file for file in sorted(folder.glob("*/*.jpg")) if file.read_bytes() != b"no picture"]
    assert [beton.payload(i).tobytes() for i in range(len(beton))] == [file.read_bytes() for file in files]
    kept = [i for i in storage_order(90) if i % 40]
    assert np.array_equal(np.argsort(beton.starts), np.searchsorted(sorted(kept), kept))
    changes = np.count_nonzero(np.diff(beton.labels[np.argsort(beton.starts)]))
    assert changes > 40  # of 86; sorted classes change twice
    assert beton.manifest is not None
    assert beton.manifest["storage_order"] == "shuffled"
    assert storage_order(8).tolist() == [1, 2, 7, 0, 6, 3, 5, 4]  # the same with every version of numpy


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_the_tables_are_ffcvs_own_to_the_byte(folder, tmp_path, mode):
    """Header, descriptors and the type of the rows' table, against a file of ffcv's DatasetWriter with as many rows."""
    pytest.importorskip("ffcv")
    from cossl.pipelines.ffcv_stock import require_ffcv

    require_ffcv()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    convert(folder, tmp_path / "ours.beton", mode=mode, num_workers=1, progress=False)
    ours = Beton(tmp_path / "ours.beton")
    rows = [(np.asarray(ours.open(i)), int(ours.labels[i])) for i in range(len(ours))]
    theirs = DatasetWriter(str(tmp_path / "theirs.beton"), {"image": RGBImageField(write_mode=mode), "label": IntField()}, num_workers=1)
    theirs.from_indexed_dataset(rows)
    a, b = (Path(tmp_path / f"{name}.beton").read_bytes() for name in ("ours", "theirs"))
    table_at = 24 + 2 * 1041
    assert a[:16] == b[:16]  # all of the header but the place of the last table
    assert a[24:table_at] == b[24:table_at]
    table = [np.frombuffer(data, writer.ROW, len(rows), table_at) for data in (a, b)]
    for name in ("mode", "height", "width"):
        assert np.array_equal(table[0]["image"][name], table[1]["image"][name])
    assert np.array_equal(table[0]["label"], table[1]["label"])
    if mode == "raw":
        assert len(a) == len(b)


@pytest.mark.parametrize("os_cache", [True, False])
def test_stock_ffcv_loads_it(tmp_path, os_cache):
    """Raw pictures larger than 8 MiB beside small JPEGs, the first of which lie in page 0."""
    pytest.importorskip("ffcv")
    from cossl.pipelines.ffcv_stock import require_ffcv

    require_ffcv()
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    (tmp_path / "pictures" / "a").mkdir(parents=True)
    for i in range(6):
        picture(i, width=1800, height=1600).save(tmp_path / "pictures" / "a" / f"{i}.jpg")
    out = tmp_path / "set.beton"
    convert(tmp_path / "pictures", out, mode="proportion", num_workers=1, progress=False)
    beton = Beton(out)
    assert set(beton.modes.tolist()) == {0, 1}
    assert beton.page_bytes == 1 << 24
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(str(out), 2, num_workers=1, os_cache=os_cache, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    got = [row.copy() for images, _ in loader for row in images]
    assert len(got) == 6
    for i, pixels in enumerate(got):
        difference = np.abs(pixels.astype(int) - np.asarray(beton.open(i)))
        assert difference.max() <= (0 if beton.mode(i) == "raw" else 8)  # TurboJPEG's fast DCT


# ---- the same bytes, come what may ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [2, 3, 7])
def test_any_number_of_workers_writes_the_same(folder, tmp_path, expected, num_workers):
    poison = [np.full(87 * writer.ROW.itemsize, 255, np.uint8) for _ in range(100)]  # for what the table's padding might pick up
    del poison
    convert(folder, tmp_path / "set.beton", mode="proportion", num_workers=num_workers, progress=False)
    assert content(tmp_path / "set.beton") == expected


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_worker_that_may_hold_little_writes_the_same(folder, tmp_path, expected, monkeypatch, num_workers):
    held, write = multiprocessing.get_context("fork").Value("q", 0), writer._Outbox.write

    def watched(outbox, most_bytes: int) -> None:
        held.value = max(held.value, outbox.held_bytes)
        write(outbox, most_bytes)

    monkeypatch.setattr(writer._Outbox, "write", watched)
    monkeypatch.setattr(writer, "HELD_BYTES", 3000)
    convert(folder, tmp_path / "set.beton", mode="proportion", num_workers=num_workers, progress=False)
    assert content(tmp_path / "set.beton") == expected
    assert 3000 < held.value <= 3000 + Beton(tmp_path / "set.beton").sizes.max()


def test_a_disk_that_takes_a_write_in_pieces(folder, tmp_path, expected, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:1000], at))
    convert(folder, tmp_path / "set.beton", mode="proportion", num_workers=2, progress=False)
    assert content(tmp_path / "set.beton") == expected
