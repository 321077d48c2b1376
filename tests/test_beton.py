"""Betons: read as ffcv reads them, refused when cut, and no changed byte unnoticed."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cossl.pipelines.beton import HEADER, Beton, digests, manifest_digest, manifest_path, verify
from cossl.pipelines.convert import convert
from cossl.pipelines.ffcv_stock import FfcvMissing, decode_function, require_ffcv


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        (root / f"class{i % 3}").mkdir(exist_ok=True)
        coarse.resize((64 + i, 48), Image.Resampling.BICUBIC).save(root / f"class{i % 3}" / f"{i:03}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("betons") / "set.beton"
    convert(folder, out, num_workers=2, progress=False)
    return out


@pytest.fixture
def beton(whole, tmp_path) -> Path:
    """A copy that a test may damage."""
    for path in (whole, manifest_path(whole)):
        shutil.copy(path, tmp_path)
    return tmp_path / whole.name


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rewrite_manifest(beton: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replaces parts of the manifest, with a digest that fits."""
    manifest = json.loads(manifest_path(beton).read_text())
    del manifest["sha256"]
    manifest |= change(manifest)
    manifest_path(beton).write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))


def test_ffcv_reads_the_same_rows(whole):
    pytest.importorskip("ffcv")
    require_ffcv()
    from ffcv.reader import Reader

    theirs, ours = Reader(str(whole)), Beton(whole)
    assert list(theirs.handlers) == ["image", "label"]  # an unknown field type would have no handler
    image, label = (theirs.metadata[name] for name in theirs.metadata_type.names)
    assert np.array_equal(label, ours.labels)
    assert np.array_equal(image["height"], ours.heights)
    assert np.array_equal(image["width"], ours.widths)
    assert len(theirs.alloc_table) == len(ours) == 24
    for i in range(24):
        at = int(image["data_ptr"][i])
        assert whole.read_bytes()[at : at + ours.sizes[i]] == ours.payload(i).tobytes()


def test_reads_what_ffcvs_own_writer_wrote(tmp_path, capfd):
    pytest.importorskip("ffcv")
    require_ffcv()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    rng = np.random.default_rng(1)
    rows = [(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8), 5 - i) for i in range(6)]
    path = tmp_path / "theirs.beton"
    # The label first: the order of the fields must not matter.
    fields = {"label": IntField(), "image": RGBImageField(write_mode="raw")}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset([(label, pixels) for pixels, label in rows])
    beton = Beton(path)
    assert beton.labels.tolist() == [5, 4, 3, 2, 1, 0]
    assert beton.class_names == ()
    for i, (pixels, _) in enumerate(rows):
        assert beton.mode(i) == "raw"
        assert np.array_equal(np.asarray(beton.open(i)), pixels)
    with pytest.raises(FileNotFoundError, match=r"no manifest theirs.beton.json"):
        verify(path)


def test_rows_are_the_folder_in_order(whole, folder):
    files = sorted(folder.glob("*/*.jpg"))
    beton = Beton(whole)
    assert beton.class_names == ("class0", "class1", "class2")
    assert beton.labels.tolist() == [int(file.parent.name[-1]) for file in files]
    for i, file in enumerate(files):
        assert beton.payload(i).tobytes() == file.read_bytes()
        assert beton.mode(i) == "jpg"
    with pytest.raises(ValueError, match="read-only"):
        beton.payload(0)[0] = 0


def test_a_pickled_beton_opens_again(whole):
    import pickle

    again = pickle.loads(pickle.dumps(Beton(whole)))
    assert np.array_equal(again.payload(3), Beton(whole).payload(3))


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("keep_frac", [0, 1e-6, 1e-5, 1e-4, 0.1, 0.5, 0.9999, "last table row", "last byte"])
def test_a_beton_cut_anywhere_is_refused(beton, keep_frac, with_manifest):
    data = beton.read_bytes()
    keep = {"last table row": len(data) - 24, "last byte": len(data) - 1}.get(keep_frac) or int(len(data) * float(keep_frac))
    beton.write_bytes(data[:keep])
    if not with_manifest:
        manifest_path(beton).unlink()
    with pytest.raises(ValueError, match=r"set.beton is not a whole beton: .*cossl convert SRC") as error:
        Beton(beton)
    assert "\n" not in str(error.value)


def test_a_conversion_that_never_finished_is_refused(beton):
    manifest_path(beton).unlink()
    data = np.fromfile(beton, dtype=np.uint8)
    data[: HEADER.itemsize].view(HEADER)["alloc_table_ptr"] = 0
    data.tofile(beton)
    with pytest.raises(ValueError, match="never finished"):
        Beton(beton)


def test_a_pointer_outside_the_file_is_refused(beton):
    manifest_path(beton).unlink()
    data = np.fromfile(beton, dtype=np.uint8)
    data[-16:-8].view("<u8")[:] += 1 << 40
    data.tofile(beton)
    with pytest.raises(ValueError, match="a row points outside the data"):
        Beton(beton)


@pytest.mark.parametrize("size", [(1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_size_that_overflows_is_refused(beton, size):
    """start + size in 64 bits is negative then, and so inside any file."""
    manifest_path(beton).unlink()
    data = np.fromfile(beton, dtype=np.uint8)
    data[-8:].view("<u8")[:] = size
    data.tofile(beton)
    with pytest.raises(ValueError, match="a row points outside the data"):
        Beton(beton)


def test_pages_of_no_bytes_are_refused(beton):
    manifest_path(beton).unlink()
    data = np.fromfile(beton, dtype=np.uint8)
    data[: HEADER.itemsize].view(HEADER)["page_size"] = 0
    data.tofile(beton)
    with pytest.raises(ValueError, match="no ffcv version 2 header"):
        Beton(beton)


def test_a_picture_of_another_size_than_its_row_is_not_decoded(beton):
    """A JPEG header may claim gigapixels: Pillow would answer with an error of its own, or with gigabytes."""
    manifest_path(beton).unlink()
    data, at = np.fromfile(beton, dtype=np.uint8), int(Beton(beton).starts[3])
    frame = at + data[at : at + 2000].tobytes().index(b"\xff\xc0\x00\x11\x08") + 5
    for side, said in ((b"\x00\x40", "row 3 is"), (b"\xff\xff", "row 3 ")):
        data[frame : frame + 4] = np.frombuffer(side * 2, np.uint8)
        data.tofile(beton)
        with pytest.raises(ValueError, match=said):
            Beton(beton).open(3)


def test_verify_looks_at_every_place(beton):
    """Two payloads that share bytes, and one across two pages: what a file with good hashes may hold all the same."""
    good = beton.read_bytes()
    data, starts = np.fromfile(beton, dtype=np.uint8), Beton(beton).starts
    data[: HEADER.itemsize].view(HEADER)["page_size"] = 1 << 10
    data.tofile(beton)
    with pytest.raises(ValueError, match=r"row \d+ overlaps another or the end of a page"):
        verify(beton)
    first, second = np.argsort(starts)[:2]
    moved = good.replace(int(starts[second]).to_bytes(8, "little"), int(starts[first] + 1).to_bytes(8, "little"))
    assert len(moved) == len(good)
    beton.write_bytes(moved)
    with pytest.raises(ValueError, match=rf"row ({first}|{second}) overlaps another"):
        verify(beton)


def test_verify_finds_every_flipped_byte(beton):
    good, size = beton.read_bytes(), beton.stat().st_size
    table = int(np.frombuffer(good[:24], HEADER)["alloc_table_ptr"][0])
    places = [0, 9, 17, 30, 500, 2110, 2120, *Beton(beton).starts[:2].tolist(), table - 1, table + 3, size - 1]
    places += np.random.default_rng(0).integers(0, size, 8).tolist()
    assert verify(beton, decode=None).num_decoded == 24
    for at in places:
        flip_byte(beton, at)
        with pytest.raises(ValueError, match=r"set.beton"):
            verify(beton, decode=0)
        beton.write_bytes(good)


def test_verify_decodes_what_the_hashes_cannot_know(beton):
    """A payload that was bad before it was hashed."""
    at = int(Beton(beton).starts[5])
    data = bytearray(beton.read_bytes())
    data[at : at + 2] = b"no"
    beton.write_bytes(data)
    rewrite_manifest(beton, lambda old: {"chunk_sha256": digests(beton, 0, old["chunk_ends"], 1)})
    assert verify(beton, decode=0).num_decoded == 0
    with pytest.raises(ValueError, match="row 5 does not decode"):
        verify(beton, decode=None)


def test_a_manifest_that_does_not_belong_is_refused(beton):
    path = manifest_path(beton)
    text = path.read_text()
    path.write_text(text.replace("class1", "class9"))
    with pytest.raises(ValueError, match=r"set.beton.json is no manifest.*changed"):
        Beton(beton)
    path.write_text(text[:50])
    with pytest.raises(ValueError, match=r"set.beton.json is no manifest"):
        Beton(beton)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest set.beton.json"):
        verify(beton)


MALFORMED = {
    "no entry": {"class_names": None},
    "names that are none": {"class_names": [1, 2, 3]},
    "more names than counts": {"class_names": ["a"]},
    "a stretch without a hash": {"chunk_sha256": []},
    "stretches that end early": {"chunk_ends": [100], "chunk_sha256": ["0"]},
    "no stretch": {"chunk_ends": [], "chunk_sha256": []},
    "stretches backwards": lambda old: {"chunk_ends": old["chunk_ends"][::-1]},
    "an end that is no number": {"chunk_ends": ["x"], "chunk_sha256": ["0"]},
    "left out, but what": {"quarantined": [{}]},
    "no options": {"options": 3},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_manifest_whose_own_digest_is_right_is_not_believed_blindly(beton, name):
    """Above all, `verify` says `whole` only of stretches that cover the file."""
    change = MALFORMED[name]
    rewrite_manifest(beton, change if callable(change) else lambda _: change)
    with pytest.raises(ValueError, match=r"set.beton.json is no manifest of a beton"):
        Beton(beton)


def test_a_manifest_too_large_to_be_one_is_not_read(beton):
    with manifest_path(beton).open("ab") as file:
        file.truncate(1 << 40)  # a hole: it takes no room
    with pytest.raises(ValueError, match=r"set.beton.json is no manifest of a beton \(1,099,511,627,776 bytes\)"):
        Beton(beton)


def test_labels_out_of_the_manifests_range(beton):
    rewrite_manifest(beton, lambda old: {part: old[part][:2] for part in ("class_names", "class_counts")})
    with pytest.raises(ValueError, match="labels are not those of its manifest"):
        verify(beton)


def test_missing_beton_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no beton at .*nothing.beton; make one with `cossl convert SRC"):
        Beton(tmp_path / "nothing.beton")


def test_decode_agrees_with_pillow(whole):
    pytest.importorskip("ffcv")
    beton, decode = Beton(whole), decode_function()
    for i in range(0, 24, 5):
        h, w = int(beton.heights[i]), int(beton.widths[i])
        out = np.zeros((h, w, 3), dtype=np.uint8)
        assert decode(beton.payload(i), h, w, out)
        error = out.astype(float) - np.asarray(beton.open(i))
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 40  # fast DCT against slow: 43 dB on ImageNet


def test_decode_tells_a_damaged_payload_and_keeps_within_its_room():
    pytest.importorskip("ffcv")
    decode = decode_function()
    stream = io.BytesIO()
    Image.effect_noise((80, 60), 50).convert("RGB").save(stream, "JPEG")
    payload = np.frombuffer(stream.getvalue(), dtype=np.uint8)
    guarded = np.full(60 * 80 * 3 + 64, 7, dtype=np.uint8)
    out = guarded[: 60 * 80 * 3].reshape(60, 80, 3)
    assert decode(payload, 60, 80, out)
    assert not decode(payload[: len(payload) // 2].copy(), 60, 80, out)
    assert not decode(payload[:0], 60, 80, out)
    assert (guarded[-64:] == 7).all()
    with pytest.raises(ValueError, match="14400 bytes of room, got 14220"):
        decode(payload, 60, 80, out[:, :79].copy())
    with pytest.raises(ValueError, match="C-contiguous"):
        decode(payload, 60, 80, np.empty((60, 80, 6), np.uint8)[:, :, ::2])


def test_importing_ffcv_leaves_no_trace():
    pytest.importorskip("ffcv")
    code = """
import numba.typed, torch
before = numba.typed.Dict
torch.set_num_threads(3)
from cossl.pipelines.ffcv_stock import require_ffcv
require_ffcv()
assert torch.get_num_threads() == 3, torch.get_num_threads()
assert numba.typed.Dict is before and before is not dict
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, timeout=120)


def test_without_ffcv_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(FfcvMissing, match=r"sudo apt-get install .*libturbojpeg0-dev.* pip install .*\.\[ffcv\]"):
        require_ffcv()


def test_a_page_let_go_leaves_the_page_cache_and_one_asked_for_comes_back(tmp_path):
    """Whole pages of 8 MiB, mapped and touched: the kernel keeps a page that is mapped, so the map has to let go first."""
    if shutil.which("fincore") is None:
        pytest.skip("fincore (util-linux) tells what is in the page cache, and is not here")
    if "tmpfs" in subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout:
        pytest.skip("a file in memory has no disk to be dropped to")
    random = np.random.default_rng(0)
    for i in range(12):
        file = tmp_path / "pictures" / "class" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (1000, 900, 3), dtype=np.uint8)).save(file, compress_level=0)
    convert(tmp_path / "pictures", tmp_path / "set.beton", mode="raw", num_workers=1, progress=False)
    beton = Beton(tmp_path / "set.beton")

    def cached() -> int:
        shown = subprocess.run(["fincore", "-b", "-n", "-o", "RES", beton.path], capture_output=True, text=True, check=True)
        return int(shown.stdout)

    page = int(beton.pages[0])
    assert int(beton.bytes[::4096].sum()) > 0
    whole = cached()
    beton.let_go(page)
    assert whole - beton.page_bytes <= cached() <= whole - beton.page_bytes // 2
    payload = beton.payload(0).copy()
    assert payload.std() > 50
    beton.let_go(page)
    before = cached()
    beton.ask_for(page)
    deadline = time.monotonic() + 10
    while cached() < before + beton.page_bytes // 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cached() > before
    np.testing.assert_array_equal(beton.payload(0), payload)
