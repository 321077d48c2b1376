"""torchvision's picture classification sets as `cossl eval` takes them, where the user has their files: nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cossl.pipelines.torch_loader import UnreadablePicture

Build = Callable[..., Any]


def _class(name: str) -> Build:
    def build(**arguments: Any) -> Any:
        from torchvision import datasets

        return getattr(datasets, name)(download=False, **arguments)

    return build


def _splits(name: str, train: tuple[str, ...], val: str) -> dict[str, list[Build]]:
    build = _class(name)
    return {"train": [partial(build, split=split) for split in train], "val": [partial(build, split=val)]}


DATASETS: dict[str, dict[str, list[Build]]] = {  # the parts of "train" and "val": what a set calls its test pictures is our val
    "cifar10": {"train": [partial(_class("CIFAR10"), train=True)], "val": [partial(_class("CIFAR10"), train=False)]},
    "cifar100": {"train": [partial(_class("CIFAR100"), train=True)], "val": [partial(_class("CIFAR100"), train=False)]},
    "flowers102": _splits("Flowers102", ("train", "val"), "test"),
    "pets": _splits("OxfordIIITPet", ("trainval",), "test"),
    "dtd": _splits("DTD", ("train", "val"), "test"),
    "stl10": _splits("STL10", ("train",), "test"),
}


class DatasetPictures:
    """The pictures of some parts of a torchvision set, one after the other, as `TorchLoader` takes them.

    CIFAR's files are pickles: torchvision opens them after their MD5 has proved to be that of the published ones.
    """

    pages = None

    def __init__(self, name: str, parts: list[Build], root: Path) -> None:
        try:
            self.parts = [build(root=str(root)) for build in parts]
        except (RuntimeError, OSError) as error:
            why = str(error).splitlines()[0].split(" You can use")[0].rstrip(".")
            raise FileNotFoundError(f"{name} is not below --dataset-root {root} as torchvision keeps it ({why})") from None
        self.labels = np.concatenate([_labels(part) for part in self.parts])
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])
        names = getattr(self.parts[0], "classes", None) or [str(label) for label in range(int(self.labels.max()) + 1)]
        self.class_names = tuple(names)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def folders(self) -> set[Path]:
        """Where its files lie, for each of its parts."""
        return {Path(getattr(part, "_base_folder", None) or Path(part.root) / part.base_folder) for part in self.parts}

    def open(self, index: int) -> Image.Image:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            return self.parts[part][index - int(self._starts[part])][0].convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow's, of a broken PNG
            raise UnreadablePicture(
                f"cannot read picture {index} of {type(self.parts[part]).__name__}: {error}. Unpack the set anew"
            ) from None


def _labels(part: Any) -> np.ndarray:
    """All labels without opening a picture: each of torchvision's classes has them under one of three names."""
    for name in ("targets", "labels", "_labels"):
        if (found := getattr(part, name, None)) is not None:
            return np.asarray(found, np.int64)
    raise ValueError(f"torchvision's {type(part).__name__} has no list of labels in this version")
