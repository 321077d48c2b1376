"""Every loader keeps the contract of `Batch`, and all of them render the same boxes to nearly the same pixels."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import encoded, picture, turned
from opened_loaders import BACKENDS, SPEC, assert_same, opened_loaders
from PIL import Image

from cossl.models.features import features
from cossl.pipelines import choose_backend, find_split, make_loader
from cossl.pipelines.batch import Batch, Blocks, LoaderSpec
from cossl.pipelines.beton import JPG, RAW, Beton
from cossl.pipelines.convert import convert
from cossl.pipelines.torch_loader import UnreadablePicture
from cossl.pipelines.views import ViewSpec, byol, evaluation, multi_crop
from cossl.train import pictures as evaluated


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def open_loader(pictures: Path, request: pytest.FixtureRequest) -> Iterator:
    yield from opened_loaders(pictures, request)


def test_shapes_types_and_memory(backend: str, open_loader) -> None:
    local = ViewSpec(32, area_frac=(0.1, 0.3))
    batch = next(iter(open_loader(backend, replace(SPEC, recipe=(*SPEC.recipe, local), positions=())).epoch(0)))
    assert [tuple(view.shape) for view in batch.views] == [(2, 16, 3, 48, 48), (1, 16, 3, 32, 32)]
    assert all(view.is_contiguous(memory_format=torch.channels_last) and view.dtype == torch.uint8 for view in batch.split())
    assert len(batch.split()) == 3
    assert batch.boxes.shape == (16, 3, 4)
    assert batch.boxes.dtype == torch.float32
    assert batch.flips.dtype == torch.bool
    assert batch.positions.shape == (16, 3, 0)
    assert batch.index.dtype == batch.label.dtype == torch.int64
    assert batch.photometry.shape == (16, 3, 8)


def test_workers_change_nothing(backend: str, open_loader) -> None:
    alone, many = (list(open_loader(backend, replace(SPEC, workers=n)).epoch(1)) for n in (0 if backend == "torch" else 1, 2))
    assert len(alone) == len(many) > 1
    for one, other in zip(alone, many, strict=True):
        assert_same(one, other)


def test_a_restart_continues_exactly(backend: str, open_loader) -> None:
    loader = open_loader(backend)
    whole = list(loader.epoch(2))
    for one, other in zip(whole[2:], loader.epoch(2, start_step=2), strict=True):
        assert_same(one, other)


def test_views_of_one_size_stand_together() -> None:
    small, large = ViewSpec(32), ViewSpec(48)
    replace(SPEC, recipe=(large, large, small, small))
    with pytest.raises(ValueError, match=r"\[48, 32, 48\] px: put views of one size next to each other"):
        replace(SPEC, recipe=(large, small, large))


def test_multi_crop_comes_with_positions_for_the_sizes_that_have_a_grid(backend: str, open_loader) -> None:
    recipe = multi_crop(48, local_px=32, local_crops_number=4)
    batch = next(iter(open_loader(backend, replace(SPEC, recipe=recipe)).epoch(0)))
    assert [tuple(view.shape) for view in batch.views] == [(2, 16, 3, 48, 48), (4, 16, 3, 32, 32)]
    assert (batch.positions[:, :2] >= 0).any()
    assert (batch.positions[:, 2:] == -1).all()
    area = (batch.boxes[..., 2] - batch.boxes[..., 0]) * (batch.boxes[..., 3] - batch.boxes[..., 1])
    assert area[:, :2].min() > 0.12
    assert area[:, 2:].max() < 0.16
    with pytest.raises(ValueError, match=r"positions for views of \[48\] px, but the views have \[32\] px"):
        replace(SPEC, recipe=(ViewSpec(32),))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_deal_out_the_joint_batch(backend: str, open_loader, world_size: int) -> None:
    joint = list(open_loader(backend).epoch(1, start_step=1))
    for rank in range(world_size):
        own = list(open_loader(backend, replace(SPEC, rank=rank, world_size=world_size)).epoch(1, start_step=1))
        assert len(own) == len(joint)
        for part, whole in zip(own, joint, strict=True):
            own_part = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
            views = part.views if backend == "synthetic" else tuple(view[:, own_part] for view in whole.views)
            dealt = {f.name: getattr(whole, f.name)[own_part] for f in fields(Batch) if f.name not in ("memory", "views")}
            assert_same(part, Batch(memory=part.memory, views=views, **dealt))


def test_ranks_evaluate_every_picture_once(backend: str, open_loader) -> None:
    seen = []
    for rank in range(3):
        spec = LoaderSpec(evaluation(32), 13, workers=1, shuffle=False, rank=rank, world_size=3)
        loader = open_loader(backend, spec, split="val")
        seen.append(torch.cat([batch.index for batch in loader.epoch(0)]))
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(loader.num_samples))
    assert max(map(len, seen)) - min(map(len, seen)) <= len(loader)


@pytest.mark.parametrize(("rank", "world_size", "said"), [(0, 3, "--batch-size 15"), (0, 32, "--batch-size 32"), (2, 2, "0 to 1")])
def test_impossible_ranks_are_refused(rank: int, world_size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SPEC, rank=rank, world_size=world_size)


def test_epochs_draw_nothing_from_torchs_generator(backend: str, open_loader) -> None:
    """Else a resumed run, or one with another loader, would go on with other numbers than the first."""
    before = torch.get_rng_state()
    next(open_loader(backend).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_is_a_permutation_and_the_next_another(backend: str, open_loader) -> None:
    loader = open_loader(backend)
    first, second = (torch.cat([batch.index for batch in loader.epoch(e)]) for e in (0, 1))
    assert len(first.unique()) == len(first) == len(loader) * 16
    assert not torch.equal(first, second)


def test_evaluation_sees_every_picture_once_in_order(backend: str, open_loader) -> None:
    loader = open_loader(backend, LoaderSpec(evaluation(32), 24, workers=1, shuffle=False), split="val")
    index = torch.cat([batch.index for batch in loader.epoch(0)])
    assert torch.equal(index, torch.arange(loader.num_samples))


def test_batches_may_be_kept(backend: str, open_loader) -> None:
    if backend == "synthetic":
        pytest.skip("shows the same pixels again by design")
    kept = list(open_loader(backend).epoch(0))
    copies = [batch.views[0].clone() for batch in kept]
    for _ in open_loader(backend).epoch(1):
        pass
    assert all(torch.equal(batch.views[0], copy) for batch, copy in zip(kept, copies, strict=True))


PARITY = {"pair": byol(48, 0.3), "multi-crop": multi_crop(48, local_px=32, local_crops_number=3), "eval": evaluation(32)}


@pytest.mark.parametrize("recipe", PARITY.values(), ids=PARITY)
def test_ffcv_equals_the_reference_bit_for_bit(open_loader, recipe: tuple[ViewSpec, ...]) -> None:
    spec = replace(SPEC, recipe=recipe, positions=())
    for ours, expected in zip(open_loader("ffcv", spec).epoch(0), open_loader("torch", spec).epoch(0), strict=True):
        assert_same(ours, expected)


def test_raw_pixels_and_rare_jpegs_equal_the_reference_too(tmp_path: Path) -> None:
    """A mixed beton: raw rows to the last byte of the data, and JPEGs that our decoder leaves to Pillow among those that it reads."""
    (tmp_path / "pictures" / "class").mkdir(parents=True)
    for i in range(24):
        data = encoded(picture(i, width=30 + 3 * i, height=90 - 3 * i), progressive=i % 2 == 0)
        (tmp_path / "pictures" / "class" / f"{i:02}.jpg").write_bytes(data)
    convert(tmp_path / "pictures", tmp_path / "mixed.beton", mode="proportion", num_workers=1, progress=False)
    assert set(Beton(tmp_path / "mixed.beton").modes) == {JPG, RAW}
    spec = LoaderSpec(byol(32, 0.3), batch_size=24, workers=0, shuffle=False)
    ours, expected = (next(make_loader(name, tmp_path / "mixed.beton", spec).epoch(0)) for name in ("ffcv", "torch"))
    assert_same(ours, expected)


def test_folder_and_beton_are_the_same_pictures(open_loader) -> None:
    for one, other in zip(open_loader("torch", folder=True).epoch(0), open_loader("torch").epoch(0), strict=True):
        assert_same(one, other)


def test_labels_follow_the_class_folders(pictures: Path, open_loader) -> None:
    loader = open_loader("torch", LoaderSpec(evaluation(32), 80, workers=1, shuffle=False), folder=True)
    names = sorted(p.name for p in (pictures / "train").iterdir())
    files = [p for name in names for p in sorted((pictures / "train" / name).iterdir())]
    assert loader.class_names == tuple(names)
    batch = next(iter(loader.epoch(0)))
    assert [names[i] for i in batch.label] == [file.parent.name for file in files]
    with Image.open(files[5]) as picture:
        np.testing.assert_array_equal(loader.picture(5), np.asarray(picture.convert("RGB")))


def test_a_folder_is_read_upright(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    for name, orientation in (("a.jpg", 1), ("b.jpg", 6)):
        (tmp_path / "class" / name).write_bytes(turned(orientation))
    loader = make_loader("torch", tmp_path, LoaderSpec(evaluation(32), 2, workers=0, shuffle=False))
    np.testing.assert_array_equal(loader.picture(1), np.rot90(loader.picture(0), -1))


def test_a_broken_picture_in_a_folder_is_named(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "class").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "class" / f"{i}.jpg")
    (tmp_path / "class" / "2.jpg").write_bytes(b"no picture")
    loader = make_loader("torch", tmp_path, LoaderSpec(evaluation(32), 4, workers=0, shuffle=False))
    with pytest.raises(UnreadablePicture, match=r"class/2\.jpg.*cossl convert"):
        next(iter(loader.epoch(0)))


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_a_decoder_says_of_damage_is_one_line(betons: Path, tmp_path: Path, workers: int) -> None:
    """Pillow answers broken numbers in a header with a ValueError, a worker process with its traceback."""
    files = [tmp_path / "train" / "a" / f"{i}.ppm" for i in range(4)]
    files[0].parent.mkdir(parents=True)
    for file in files:
        picture(8, 8).save(file)
    files[2].write_bytes(b"P6 8 8 2x5 " + bytes(192))
    beton = tmp_path / "damaged.beton"
    shutil.copy(betons / "val.beton", beton)
    with beton.open("r+b") as file:
        file.seek(int(Beton(beton).starts[5]))
        file.write(b"no")
    for source, said in ((tmp_path / "train", f"cannot read {files[2]}: "), (beton, f"{beton}: row 5 does not decode ")):
        loader = make_loader("torch", source, LoaderSpec(evaluation(16), 4, workers=workers, shuffle=False))
        with pytest.raises(UnreadablePicture) as error:
            list(loader.epoch(0))
        assert str(error.value).startswith(said)
        assert "\n" not in str(error.value)


def test_auto_takes_ffcv_for_a_beton(betons: Path, pictures: Path) -> None:
    assert choose_backend("auto", find_split(betons, "train")) == "ffcv"
    assert choose_backend("auto", find_split(pictures, "train")) == "torch"


def test_a_batch_of_foreign_parts_does_not_move(open_loader) -> None:
    batch = next(iter(open_loader("synthetic").epoch(0)))
    with pytest.raises(ValueError, match="does not lie in its memory"):
        replace(batch, label=batch.label.clone()).to(torch.device("cpu"))


@pytest.mark.parametrize("nothing", [{"batch_size": 0}, {"recipe": (), "positions": ()}])
def test_nothing_to_load_is_refused(nothing: dict) -> None:
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        replace(SPEC, **nothing)


def test_what_is_kept_of_an_evaluation_is_not_its_pixels(betons: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are copied out of their batches, which would hold every picture of the set: few blocks serve all twenty batches."""
    loader = make_loader("ffcv", betons / "val.beton", LoaderSpec(evaluation(64), 2, workers=1, shuffle=False))
    blocks, original = [], Blocks._fresh
    monkeypatch.setattr(Blocks, "_fresh", staticmethod(lambda size: blocks.append(size) or original(size)))
    _, labels = features({}, evaluated(loader, torch.device("cpu"), "val"))
    assert torch.equal(labels, torch.from_numpy(loader.beton.labels))
    assert 1 <= len(blocks) <= 7
    loader.close()
