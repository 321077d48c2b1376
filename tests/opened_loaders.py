"""Every loader on the shared pictures, and what two batches must have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cossl.pipelines import LOADERS, make_loader
from cossl.pipelines.batch import Batch, Loader, LoaderSpec
from cossl.pipelines.positions import PositionSpec
from cossl.pipelines.views import byol

_MISSING = {"dali"} if find_spec("nvidia") is None or find_spec("nvidia.dali") is None else set()
BACKENDS = [pytest.param(name, marks=pytest.mark.skipif(name in _MISSING, reason="DALI is not installed")) for name in LOADERS]
GRID = PositionSpec("overlap", 9, size=6, stride_px=8, offset_px=0.5, receptive_field_px=17, view_px=48)
SPEC = LoaderSpec(byol(48, 0.3), batch_size=16, seed=2, positions=(GRID,), workers=1)


def opened_loaders(pictures: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Loader]]:
    """What a fixture yields: opens a loader, which is closed with the test."""
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
