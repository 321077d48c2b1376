"""The DALI loader renders exactly the boxes of `geometry`, to nearly the reference's pixels, whatever the files are; nothing leaks."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import encoded, picture, turned
from PIL import Image

from cossl.pipelines import dali_loader, find_split, make_loader
from cossl.pipelines.batch import Batch, LoaderSpec
from cossl.pipelines.dali_loader import DaliLoader, jpeg_size, require_dali, usual_dali
from cossl.pipelines.views import ViewSpec, byol, evaluation

SPEC = LoaderSpec((*byol(48, 0.3), ViewSpec(32, area_frac=(0.1, 0.3))), batch_size=16, seed=2, workers=1)
WHOLE = LoaderSpec(evaluation(32, 1.0), batch_size=16, workers=1, shuffle=False)
Open = Callable[..., DaliLoader]


@pytest.fixture
def open_dali() -> Iterator[Open]:
    pytest.importorskip("nvidia.dali", exc_type=ImportError)
    opened: list[DaliLoader] = []

    def open_one(path: Path, spec: LoaderSpec = SPEC) -> DaliLoader:
        opened.append(DaliLoader(path, spec))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def folder(root: Path, *files: bytes) -> Path:
    (root / "class").mkdir()
    for i, content in enumerate(files):
        (root / "class" / f"{i}.jpg").write_bytes(content)
    return root


def assert_same(one: Batch, other: Batch) -> None:
    assert all(torch.equal(x, y) for x, y in zip(one.views, other.views, strict=True))
    for name in (field.name for field in fields(Batch) if field.name not in ("memory", "views")):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def psnr_to_the_reference(ours: DaliLoader, path: Path, spec: LoaderSpec) -> torch.Tensor:
    """Of each view; everything but the pixels must be equal."""
    errors = []
    for batch, expected in zip(ours.epoch(0), make_loader("torch", path, replace(spec, workers=0)).epoch(0), strict=True):
        assert_same(replace(batch, views=()), replace(expected, views=()))
        for view, reference in zip(batch.views, expected.views, strict=True):
            errors.append((view.float() - reference.float()).square().mean((2, 3, 4)).flatten())
    return 10 * torch.log10(255**2 / torch.cat(errors).clamp_min(1e-9))


# ---- pixels -----------------------------------------------------------------------------------------------------------------------


def test_equals_the_reference(pictures: Path, open_dali: Open) -> None:
    psnr = psnr_to_the_reference(open_dali(pictures / "train"), pictures / "train", SPEC)
    assert psnr.min() > 44
    assert psnr.median() > 50


@pytest.mark.skipif("COSSL_DATA" not in os.environ, reason="COSSL_DATA does not name the folder of real pictures")
def test_equals_the_reference_on_imagenet(open_dali: Open) -> None:
    """Both decoders are libjpeg with the slow DCT; what is left is Pillow's rounding between its passes, and the edge of the box."""
    path = Path(os.environ["COSSL_DATA"]) / "imagenet-sample" / "train"
    spec = LoaderSpec((*byol(), ViewSpec(96, area_frac=(0.05, 0.14))), 50, workers=2)
    psnr = psnr_to_the_reference(open_dali(path, spec), path, spec)
    assert psnr.min() > 44
    assert psnr.median() > 54


def test_nothing_outside_the_box_is_seen(tmp_path: Path, open_dali: Open) -> None:
    """A black square on white, cut along its edge, beside a view of the whole picture: a PNG, so that black is black."""
    square = np.full((96, 96, 3), 255, np.uint8)
    square[24:72, 24:72] = 0
    path = folder(tmp_path, encoded(Image.fromarray(square), "PNG"))
    inner, outer = evaluation(24, 0.5)[0], evaluation(24, 1.0)[0]
    batch = next(iter(open_dali(path, replace(WHOLE, recipe=(inner, outer))).epoch(0)))
    assert batch.views[0][0].max() == 0
    assert batch.views[0][1].max() == 255


def test_a_flip_mirrors_exactly(pictures: Path, open_dali: Open) -> None:
    recipe = evaluation(32, 0.7)
    plain, mirrored = (
        next(iter(open_dali(pictures / "train", replace(WHOLE, recipe=(replace(recipe[0], flip_p=p),))).epoch(0))) for p in (0, 1)
    )
    assert mirrored.flips.all()
    assert torch.equal(plain.views[0], mirrored.views[0].flip(-1))


def test_a_beton_gives_the_same_batches(pictures: Path, betons: Path, open_dali: Open) -> None:
    for one, other in zip(open_dali(betons / "train.beton").epoch(0), open_dali(pictures / "train").epoch(0), strict=True):
        assert_same(one, other)


# ---- files of any kind ------------------------------------------------------------------------------------------------------------

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
KINDS = {
    "colour": encoded(picture(), quality=90),
    "grey": encoded(picture().convert("L")),
    "progressive": encoded(picture(), progressive=True),
    "not subsampled": encoded(picture(), subsampling=0),
    "CMYK": encoded(picture().convert("CMYK"), quality=95),
    "PNG with alpha": encoded(picture().convert("RGBA"), "PNG"),
    "palette": encoded(picture().convert("P"), "PNG"),
    "bytes after its end": encoded(picture()) + b"\n",
    "EXIF without a turn": turned(1),
    "invalid EXIF turn": turned(9),
    "XMP that turns": encoded(picture(), xmp=XMP),
} | {f"EXIF turn {orientation}": turned(orientation) for orientation in range(2, 9)}


def test_every_kind_of_file_is_read_as_by_pillow(tmp_path: Path, open_dali: Open) -> None:
    path = folder(tmp_path, *KINDS.values())
    spec = replace(WHOLE, recipe=evaluation(48, 0.6), batch_size=len(KINDS))
    for kind, psnr in zip(KINDS, psnr_to_the_reference(open_dali(path, spec), path, spec).tolist(), strict=True):
        assert psnr > 44, kind


def test_the_header_is_read_as_pillow_reads_it() -> None:
    assert jpeg_size(np.frombuffer(KINDS["colour"], np.uint8)) == (32, 48, False)
    assert jpeg_size(np.frombuffer(KINDS["grey"], np.uint8)) == (32, 48, False)
    assert jpeg_size(np.frombuffer(KINDS["progressive"], np.uint8)) == (32, 48, False)
    assert jpeg_size(np.frombuffer(turned(6), np.uint8)) == (32, 48, True)
    whole = KINDS["colour"]
    for other in (KINDS["CMYK"], KINDS["PNG with alpha"], whole + b"\n", whole[:-2] + b"\xff\xff", whole[:-2] + b"\xd9\xd9", whole[2:]):
        assert jpeg_size(np.frombuffer(other, np.uint8)) == (0, 0, False)


def test_a_header_cut_or_changed_anywhere_is_answered() -> None:
    """With Pillow's size or with a refusal; run as Python, where reading past the end is an IndexError."""
    whole, read = KINDS["EXIF without a turn"], jpeg_size.py_func
    assert read(whole) == (32, 48, True)
    header = whole.index(b"\xff\xda")
    for cut in range(header + 20):
        assert read(whole[:cut] + b"\xff\xd9")[:2] in ((0, 0), (32, 48))
    for at in range(2, header):
        for value in (0, 255):
            read(whole[:at] + bytes([value]) + whole[at + 1 :])


@pytest.mark.parametrize("content", [b"", b"no picture", KINDS["colour"][:-40], KINDS["PNG with alpha"][:-40]])
def test_a_broken_picture_is_named(tmp_path: Path, open_dali: Open, content: bytes) -> None:
    path = folder(tmp_path, KINDS["colour"], content, KINDS["colour"])
    with pytest.raises(OSError, match=r"class/1\.jpg.*cossl convert"):
        next(iter(open_dali(path, WHOLE).epoch(0)))


def test_what_only_dali_refuses_is_named_or_explained(tmp_path: Path, open_dali: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = KINDS["colour"], KINDS["colour"][:-40]
    path = folder(tmp_path, whole, cut)
    monkeypatch.setattr(dali_loader, "jpeg_size", lambda _: (32, 48, False))
    with pytest.raises(OSError, match=r"class/1\.jpg.*cossl convert"):
        next(iter(open_dali(path, WHOLE).epoch(0)))
    (path / "class" / "1.jpg").write_bytes(whole)
    monkeypatch.setattr(dali_loader.EncodedPictures, "_stored", lambda *_: np.frombuffer(cut, np.uint8))
    with pytest.raises(RuntimeError, match=r"^DALI cannot render a batch that Pillow can read \(.*decode.*\): use the torch loader$"):
        next(iter(open_dali(path, WHOLE).epoch(0)))


# ---- epochs -----------------------------------------------------------------------------------------------------------------------


def test_epochs_may_run_side_by_side(pictures: Path, open_dali: Open) -> None:
    """Batches of two epochs in one pipeline, with an abandoned third between them, each reach their own."""
    spec = replace(SPEC, batch_size=8)
    expected = [list(open_dali(pictures / "train", spec).epoch(e)) for e in (0, 1)]
    loader = open_dali(pictures / "train", spec)
    one, other = loader.epoch(0), loader.epoch(1)
    for step in range(len(loader)):
        next(loader.epoch(2))
        assert_same(next(one), expected[0][step])
        assert_same(next(other), expected[1][step])


def test_a_short_last_batch_and_fewer_batches_than_are_prefetched(pictures: Path, open_dali: Open) -> None:
    loader = open_dali(pictures / "val", replace(WHOLE, batch_size=24))
    batches = list(loader.epoch(0))
    assert [len(batch.index) for batch in batches] == [24, 16]
    assert len(batches) < SPEC.batches_ahead
    assert_same(next(iter(loader.epoch(0, start_step=1))), batches[1])


def held() -> tuple[int, int, int]:
    """Threads of the process (DALI's are not Python's), open files, and memory in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE") >> 20


def test_batches_ahead_change_nothing(pictures: Path, open_dali: Open) -> None:
    several = [list(open_dali(pictures / "train", replace(SPEC, batches_ahead=ahead)).epoch(1)) for ahead in (0, 1, 2, 5)]
    for batches in zip(*several, strict=True):
        for other in batches[1:]:
            assert_same(batches[0], other)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_abandoned_epochs_leave_nothing(pictures: Path, open_dali: Open) -> None:
    loader = open_dali(pictures / "train")
    expected = list(loader.epoch(60))
    for epoch in range(10):
        next(iter(loader.epoch(epoch)))
    threads, files, mib = held()
    for epoch in range(10, 60):
        next(iter(loader.epoch(epoch)))
    after = held()
    assert after[0] <= threads
    assert after[1] <= files
    assert after[2] - mib < 8  # fifty times the batches under way are 60 MiB
    for one, other in zip(loader.epoch(60), expected, strict=True):
        assert_same(one, other)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_closed_loader_leaves_no_thread(pictures: Path, open_dali: Open) -> None:
    open_dali(pictures / "train").close()
    before = held()[0]
    for _ in range(3):
        loader = open_dali(pictures / "train")
        next(iter(loader.epoch(0)))
        loader.close()
    assert held()[0] <= before


# ---- around it --------------------------------------------------------------------------------------------------------------------


def test_without_dali_the_line_that_installs_it(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for call in (require_dali, lambda: make_loader("dali", pictures / "train", SPEC)):
        with pytest.raises(ImportError, match=r"DALI is not installed.*pip install -c constraints.txt -e '\.\[dali\]'"):
            call()


def test_the_folder_is_found_before_a_beton(tmp_path: Path) -> None:
    (tmp_path / "train.beton").write_bytes(b"")
    assert find_split(tmp_path, "train", "dali") == tmp_path / "train.beton"
    (tmp_path / "train").mkdir()
    assert find_split(tmp_path, "train", "dali") == tmp_path / "train"
    assert find_split(tmp_path, "train") == tmp_path / "train.beton"


def test_the_usual_way_gives_whole_epochs(pictures: Path) -> None:
    pytest.importorskip("nvidia.dali", exc_type=ImportError)
    usual = usual_dali(pictures / "train", 32, 1, [48, 48, 32], [(0.14, 1.0), (0.14, 1.0), (0.05, 0.14)])
    for _ in range(2):
        batches = list(usual)
        assert len(batches) == 80 // 32
        assert all([tuple(view.shape) for view in views] == [(32, s, s, 3) for s in (48, 48, 32)] for views in batches)
        assert batches[0][0].dtype == torch.uint8
