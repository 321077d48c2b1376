"""Bytes on disk to a `Batch` on the device. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from cossl.pipelines.batch import Loader, LoaderSpec

Backend = Literal["auto", "ffcv", "dali", "torch", "synthetic"]
Order = Literal["random", "pages"]
LOADERS: dict[str, tuple[str, str]] = {  # imported when chosen, so that a missing package hurts only who asks for it
    "ffcv": ("cossl.pipelines.ffcv_loader", "FfcvLoader"),
    "dali": ("cossl.pipelines.dali_loader", "DaliLoader"),
    "torch": ("cossl.pipelines.torch_loader", "TorchLoader"),
    "synthetic": ("cossl.pipelines.synthetic", "SyntheticLoader"),
}


@dataclass(frozen=True)
class LoaderConfig:
    """How pictures are read."""

    backend: Backend = "auto"
    """auto: ffcv for a beton, torch for an image folder. dali: NVIDIA's, for folders. synthetic: random pixels, for speed tests."""
    workers: int = 2
    """Threads (ffcv, dali) or processes (torch) that decode; never changes a result."""
    batches_ahead: int = 3
    """Batches kept ready (ffcv, dali)."""
    order: Order = "random"
    """random, or pages: half a GiB of the beton at a time, read in long runs: for disks that cannot seek and sets larger than memory."""
    os_cache: bool = True
    """--loader.no-os-cache, with --loader.order pages: the beton does not fit into memory, so its pages are dropped once used."""


def find_split(data: Path, split: str, backend: str = "auto") -> Path:
    """The pictures of `split` ("train" or "val") below `data`: <split>.beton if there is one, else the image folder <split>/.

    For the DALI loader the folder comes first: reading one is what it is for.
    """
    if not data.exists():
        raise FileNotFoundError(f"--data {data} does not exist: give a folder with train.beton and val.beton, or with train/ and val/")
    beton, folder = data / f"{split}.beton", data / split
    if beton.is_file() and not (backend == "dali" and folder.is_dir()):
        return beton
    if folder.is_dir() and backend != "ffcv":
        return folder
    if folder.is_dir():
        raise FileNotFoundError(f"{beton} does not exist and the ffcv loader reads nothing else: run `cossl convert {folder} {beton}`")
    raise FileNotFoundError(
        f"no {split} pictures in {data}: expected {beton.name} (from `cossl convert`) or a folder {split}/ with a folder per class"
    )


def choose_backend(backend: str, source: Path) -> str:
    """What `auto` means for these pictures: ffcv for a beton, torch for an image folder."""
    if backend != "auto":
        return backend
    return "ffcv" if source.is_file() else "torch"


def make_loader(backend: str, source: Path, spec: LoaderSpec) -> Loader:
    """The loader of that name over a beton or an image folder."""
    module, name = LOADERS[choose_backend(backend, source)]
    build: Callable[[Path, LoaderSpec], Loader] = getattr(import_module(module), name)
    return build(source, spec)


class Loaders(NamedTuple):
    """The training views, the pictures of train and val as they are, and those of both in random order (or nothing): a sample's."""

    views: Loader
    train: Loader
    val: Loader
    sample: tuple[Loader, ...]


def open_splits(data: Path | None, backend: str, views: LoaderSpec, whole: LoaderSpec, sample: bool) -> Loaders:
    """The loaders of `data`'s train and val: `views` of train, the `whole` pictures of both, and the same shuffled if a `sample` is wanted.

    ValueError or FileNotFoundError, of one line, where there are no such pictures or the splits have different classes.
    """
    if data is None and backend != "synthetic":
        raise ValueError("--data is missing: give a folder with train.beton and val.beton (see `cossl convert`), or with train/ and val/")
    sources = [Path() if data is None else find_split(data, split, backend) for split in ("train", "val")]
    training, (train, val) = make_loader(backend, sources[0], views), [make_loader(backend, source, whole) for source in sources]
    if train.class_names != val.class_names:
        raise ValueError(f"{sources[0]} and {sources[1]} have different classes: convert both from folders with the same class folders")
    drawn = [replace(whole, shuffle=True, batch_size=min(whole.batch_size, all_.num_samples)) for all_ in (train, val)]
    shuffled = [make_loader(backend, source, spec) for source, spec in zip(sources, drawn, strict=True)] if sample else []
    return Loaders(training, train, val, tuple(shuffled))
