"""Bytes on disk to a `Batch` on the device. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
