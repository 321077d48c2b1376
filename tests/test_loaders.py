"""Every loader keeps the contract of `Batch`, and all of them render the same boxes to nearly the same pixels."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from encoded import turned
from PIL import Image

from cossl.pipelines import LOADERS, choose_backend, find_split, make_loader
from cossl.pipelines.augment import _ORDERS, IMAGENET_MEAN, IMAGENET_STD, augment, augment_tensors, blur_radius, normalize
from cossl.pipelines.batch import Batch, Loader, LoaderSpec
from cossl.pipelines.positions import PositionSpec
from cossl.pipelines.views import ViewSpec, byol, evaluation, multi_crop

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(name == "ffcv" and find_spec("ffcv") is None, reason="no ffcv")) for name in LOADERS
]
GRID = PositionSpec("overlap", 9, size=6, stride_px=8, offset_px=0.5, receptive_field_px=17, view_px=48)
SPEC = LoaderSpec(byol(48, 0.3), batch_size=16, seed=2, positions=GRID, workers=1)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def open_loader(pictures: Path, request: pytest.FixtureRequest) -> Iterator:
    opened: list[Loader] = []

    def open_one(backend: str, spec: LoaderSpec = SPEC, split: str = "train", folder: bool = False) -> Loader:
        source = pictures / split
        if backend != "synthetic" and not folder:
            source = request.getfixturevalue("betons") / f"{split}.beton"
        opened.append(make_loader(backend, source, spec))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def assert_same(one: Batch, other: Batch) -> None:
    for field in fields(Batch)[1:]:  # between the tensors the memory holds anything
        a, b = getattr(one, field.name), getattr(other, field.name)
        for x, y in zip(a, b, strict=True) if field.name == "views" else [(a, b)]:
            assert x.dtype == y.dtype
            assert torch.equal(x, y), field.name


def test_shapes_types_and_memory(backend: str, open_loader) -> None:
    local = ViewSpec(32, area_frac=(0.1, 0.3))
    batch = next(iter(open_loader(backend, replace(SPEC, recipe=(*SPEC.recipe, local), positions=None)).epoch(0)))
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


def test_abandoned_epochs_leave_no_thread(backend: str, open_loader) -> None:
    loader = open_loader(backend)
    next(iter(loader.epoch(0)))
    before = threading.active_count()
    for epoch in range(20 if backend == "torch" else 200):
        next(iter(loader.epoch(epoch)))
    deadline = time.monotonic() + 5  # the last epoch's thread is told to end, and takes a moment
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize("recipe", [byol(48, 0.3), multi_crop(48, 32, local_crops_number=3), evaluation(32)], ids=["pair", "multi-crop", "eval"])
def test_ffcv_equals_the_reference_bit_for_bit(open_loader, recipe: tuple[ViewSpec, ...]) -> None:
    spec = replace(SPEC, recipe=recipe, positions=None)
    for ours, expected in zip(open_loader("ffcv", spec).epoch(0), open_loader("torch", spec).epoch(0), strict=True):
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
    with pytest.raises(RuntimeError, match=r"class/2\.jpg.*cossl convert"):
        next(iter(loader.epoch(0)))


def test_auto_takes_ffcv_for_a_beton(betons: Path, pictures: Path) -> None:
    assert choose_backend("auto", find_split(betons, "train")) == "ffcv"
    assert choose_backend("auto", find_split(pictures, "train")) == "torch"


# ------------------------------------------------------------------------------------------------- augmentation

PLAIN = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0.0])


def images(count: int = 6, size: int = 40) -> torch.Tensor:
    """Random colours at random scales, with black, white and grey pixels among them."""
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[:, :, :4], pixels[:, :, 4:8], pixels[:, :, 8:12] = 0, 255, 77
    return pixels.contiguous(memory_format=torch.channels_last)


def unnormalized(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


@pytest.mark.parametrize("render", [augment, augment_tensors])
@pytest.mark.parametrize(
    ("column", "value", "operation"),
    [
        (0, 1.4, lambda x: reference.adjust_brightness(x, 1.4)),
        (1, 0.6, lambda x: reference.adjust_contrast(x, 0.6)),
        (2, 1.2, lambda x: reference.adjust_saturation(x, 1.2)),
        (3, 0.1, lambda x: reference.adjust_hue(x, 0.1)),
        (3, -0.1, lambda x: reference.adjust_hue(x, -0.1)),
        (5, 1.0, lambda x: reference.rgb_to_grayscale(x, 3)),
        (6, 0.7, lambda x: reference.gaussian_blur(x, [2 * blur_radius(40) + 1] * 2, [0.7, 0.7])),
        (7, 1.0, lambda x: reference.solarize(x, 0.5)),
    ],
)
def test_each_operation_equals_torchvisions(render, column: int, value: float, operation) -> None:
    """To 2e-5 of the range [0, 1]."""
    parameters = PLAIN.repeat(6, 1)
    parameters[:, column] = value
    expected = operation(images().float() / 255)
    assert (unnormalized(render(images(), parameters)) - expected).abs().max() < 2e-5
    if column < 4:
        assert (expected - images().float() / 255).abs().max() > 0.02


def test_order_is_the_samples_own() -> None:
    functions = [reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue]
    factors = [1.3, 0.7, 1.2, 0.08]
    parameters = PLAIN.repeat(24, 1)
    parameters[:, :4], parameters[:, 4] = torch.tensor(factors), torch.arange(24)
    x = images(24)
    result = unnormalized(augment(x, parameters))
    for i in range(24):
        expected = x[i : i + 1].float() / 255
        for operation in _ORDERS[i]:
            expected = functions[operation](expected, factors[operation])
        assert (result[i] - expected[0]).abs().max() < 2e-4


def test_both_renderings_agree_on_what_geometry_draws(open_loader) -> None:
    batch = next(iter(open_loader("synthetic").epoch(0)))
    for v, view in enumerate(batch.split()):
        ours = augment(view, batch.photometry[:, v])
        assert ours.is_contiguous(memory_format=torch.channels_last)
        # Hue jumps where two channels are equal to rounding, so a handful of pixels may differ by more.
        difference = (ours - augment_tensors(view, batch.photometry[:, v])).abs()
        assert difference.quantile(0.9999) < 1e-3


def test_without_parameters_it_only_normalizes() -> None:
    assert (augment(images(), PLAIN.repeat(6, 1)) - normalize(images())).abs().max() < 1e-5
