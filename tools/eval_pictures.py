"""The picture sets that a run is asked about: their labels, how they are opened, and what tells them from others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from cossl.pipelines import LoaderConfig, find_split, make_loader
from cossl.pipelines.batch import Loader, LoaderSpec
from cossl.pipelines.torch_loader import Pictures, TorchLoader
from cossl.pipelines.views import evaluation


class PictureSet(NamedTuple):
    """Pictures of a train and a val split with the same classes, from wherever they come."""

    name: str
    identity: dict[str, Any]
    """What tells it from another set, or from itself before it was changed: plain values."""
    class_names: tuple[str, ...]
    labels: dict[str, Int[Tensor, " n"]]
    """Of all pictures of a split in order."""
    open: Callable[[str, LoaderSpec], Loader]


def folder_set(data: Path, how: LoaderConfig) -> PictureSet:
    """The pictures of a folder with train.beton and val.beton, or with image folders train/ and val/."""
    backend = "auto" if how.backend == "synthetic" else how.backend

    def open_(split: str, spec: LoaderSpec) -> Loader:
        return make_loader(backend, find_split(data, split, backend), spec)

    sources = {split: find_split(data, split, backend) for split in ("train", "val")}
    where = {"data": str(data.resolve()), "files": {split: marks(source) for split, source in sources.items()}, "backend": backend}
    return _picture_set(data.resolve().name, where, open_)


def dataset_set(name: str, root: Path) -> PictureSet:
    """The pictures of one of torchvision's datasets, which the user has below `root`. FileNotFoundError of one line if not."""
    from cossl.tools.eval_datasets import DATASETS, DatasetPictures

    sets: dict[str, Any] = {split: DatasetPictures(name, parts, root) for split, parts in DATASETS[name].items()}
    files = digest(sorted(marks(folder) for folder in {folder for pictures in sets.values() for folder in pictures.folders}))

    def open_(split: str, spec: LoaderSpec) -> Loader:
        pictures: Pictures = sets[split]
        return TorchLoader(pictures, spec)

    return _picture_set(name, {"dataset": name, "data": str(root.resolve()), "files": files}, open_)


def marks(source: Path) -> str:
    """Tells a file, or all files of a folder, from what they were before they were changed: by names, sizes and times, unread."""
    files: Iterable[Path] = [source] if source.is_file() else _files(source)
    states = ((str(path.relative_to(source)), path.stat()) for path in files)
    return digest(sorted([name, state.st_size, state.st_mtime_ns] for name, state in states))


def _files(folder: Path) -> Iterable[Path]:
    return (Path(where, name) for where, _, names in os.walk(folder, followlinks=True) for name in names)


def _picture_set(name: str, identity: dict[str, Any], open_: Callable[[str, LoaderSpec], Loader]) -> PictureSet:
    names, labels = {}, {}
    for split in ("train", "val"):
        loader: Any = open_(split, LoaderSpec(evaluation(32), 1, workers=0, shuffle=False))
        source = loader.pictures if hasattr(loader, "pictures") else loader.beton
        names[split], labels[split] = loader.class_names, torch.as_tensor(source.labels, dtype=torch.int64)
        loader.close()
    if names["train"] != names["val"]:
        raise ValueError(f"{name}: train and val have different classes")
    if len(names["val"]) < 2:
        raise ValueError(f"{name}: pictures of {len(names['val'])} class, expected 2 or more")
    content = {"counts": {split: len(each) for split, each in labels.items()}, "classes": digest(names["train"])}
    content |= {"labels": digest({split: hashlib.sha256(each.numpy().tobytes()).hexdigest() for split, each in labels.items()})}
    return PictureSet(name, identity | content, names["train"], labels, open_)


def digest(value: Any) -> str:
    """16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
