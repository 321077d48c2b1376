"""The published pictures of ImageNet-C: `<corruption>/<severity 1 to 5>/<class>/<picture>`, in folders or in the tars as they come.

A tar is read as it stands, nothing of it is written to disk. Of its members those count that are plain files of that name and place;
links, absolute paths and all else are passed over. No size that a file states is believed before it is compared with a limit.
"""

from __future__ import annotations

import io
import os
import tarfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from cossl.pipelines.corruptions import CORRUPTIONS, SEVERITIES
from cossl.pipelines.torch_loader import resized

PUBLISHED_PX = 224
"""Side of the published pictures, which are asked about as they are: CenterCrop(224) of them is all of them."""

LARGEST_BYTES, LARGEST_PIXELS = 1 << 24, 1 << 24  # of one picture; the published ones have 50 KB and 224 x 224 pixels
EXTENSIONS = (".jpeg", ".jpg", ".png")


class Stored(NamedTuple):
    """A picture as it is in its file."""

    corruption: str
    severity: int
    class_name: str
    where: str
    data: bytes


class PublishedBatch(NamedTuple):
    """Whole pictures at one size; of any corruptions and severities, as the files have them."""

    corruption: tuple[str, ...]
    severity: tuple[int, ...]
    label: Int[Tensor, " b"]
    images: UInt8[Tensor, "b 3 s s"]


class Published:
    """The set below a folder, or in one tar. ValueError if there is no picture of it there.

    A folder of corruptions may lie in `root` itself or in a folder of it (`root/blur/defocus_blur/1/...`, as the tars are called), beside
    tars. A corruption that was found is not looked for again: first in folders, then in tars by their names.
    """

    def __init__(self, root: Path, class_names: Sequence[str]) -> None:
        self.root, self.labels = root, {name: label for label, name in enumerate(class_names)}
        self.class_folders: set[str] = set()
        """Those that were met so far, whether or not their name is one of `class_names`."""
        self._folders: dict[str, Path] = {}
        for pattern in ("*", "*/*"):
            for path in sorted(root.glob(pattern)):
                if path.name in CORRUPTIONS and path.is_dir():
                    self._folders.setdefault(path.name, path)
        self._tars = [root] if root.is_file() else sorted(root.glob("*.tar"))
        if not self._folders and not self._tars:
            raise ValueError(
                f"{root} holds none of ImageNet-C: expected folders <corruption>/<severity>/<class>, or the published .tar files"
            )

    def stored(self) -> Iterator[Stored]:
        """Every picture of a class that is asked about, one after the other."""
        for name, folder in self._folders.items():
            yield from self._of_folder(name, folder)
        met = set(self._folders)
        for path in self._tars:
            found: set[str] = set()
            yield from self._of_tar(path, met, found)
            met |= found

    def _of_folder(self, corruption: str, folder: Path) -> Iterator[Stored]:
        for severity in SEVERITIES:
            classes = sorted(path for path in (folder / str(severity)).glob("*") if path.is_dir())
            self.class_folders.update(path.name for path in classes)
            for path in (path for path in classes if path.name in self.labels):
                for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                    if entry.is_file() and entry.name.lower().endswith(EXTENSIONS):
                        _check_bytes(entry.path, entry.stat().st_size)
                        yield Stored(corruption, severity, path.name, entry.path, Path(entry.path).read_bytes())

    def _of_tar(self, path: Path, but: set[str], found: set[str]) -> Iterator[Stored]:
        try:
            with _BoundedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep a kilobyte of every one of millions
                    place = _place(member)
                    if place is None or place[0] in but:
                        continue
                    found.add(place[0])
                    self.class_folders.add(place[2])
                    if place[2] in self.labels:
                        where = f"{path}: {member.name}"
                        _check_bytes(where, member.size)
                        data = archive.extractfile(member)
                        assert data is not None  # a plain file
                        yield Stored(*place, where, data.read())
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
                    raise tarfile.ReadError(f"it breaks off at byte {archive.offset:,}")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{path} is no whole tar: {error}") from None

    def batches(self, batch_size: int, px: int = 0) -> Iterator[PublishedBatch]:
        """All of it, decoded by threads ahead of their use: each picture as published, or the whole of it resized to px x px.

        ValueError naming the picture that is damaged, no square or, without px, of another size than the published ones.
        """
        threads = min(16, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[tuple[list[Stored], list[Future[np.ndarray]]]] = deque()
            for some in in_groups(self.stored(), batch_size):
                waiting.append((some, [pool.submit(_whole, one, px) for one in some]))
                if len(waiting) > 1:
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())

    def _batch(self, some: list[Stored], decoded: list[Future[np.ndarray]]) -> PublishedBatch:
        images = torch.from_numpy(np.stack([future.result() for future in decoded])).permute(0, 3, 1, 2)
        label = torch.tensor([self.labels[one.class_name] for one in some])
        return PublishedBatch(tuple(one.corruption for one in some), tuple(one.severity for one in some), label, images)


def in_groups(stored: Iterable[Stored], count: int) -> Iterator[list[Stored]]:
    """So many at a time; the last may be fewer."""
    group: list[Stored] = []
    for one in stored:
        group.append(one)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group


class _BoundedFile(io.FileIO):
    """Refuses a read larger than a picture may be: a header of a tar can ask for as much as it likes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LARGEST_BYTES:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return super().read(size)


def _place(member: tarfile.TarInfo) -> tuple[str, int, str] | None:
    """(corruption, severity, class) of a member that is a picture of the set. The tar may have one folder around the corruptions."""
    parts = member.name.removeprefix("./").split("/")
    if not member.isreg() or member.issparse() or len(parts) not in (4, 5) or not all(parts) or ".." in parts:
        return None
    corruption, severity, class_name, name = parts[-4:]
    if corruption not in CORRUPTIONS or severity not in map(str, SEVERITIES) or not name.lower().endswith(EXTENSIONS):
        return None
    return corruption, int(severity), class_name


def _check_bytes(where: str, size: int) -> None:
    if size > LARGEST_BYTES:
        raise ValueError(f"{where} has {size:,} bytes: a picture of ImageNet-C has at most {LARGEST_BYTES:,}")


def _whole(stored: Stored, px: int) -> UInt8[np.ndarray, "s s 3"]:
    """All of a square picture: see `Published.batches`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a broken EXIF block does not touch the pixels; a large picture is refused below
            with Image.open(io.BytesIO(stored.data), formats=("JPEG", "PNG")) as picture:
                width, height = picture.size
                if width * height > LARGEST_PIXELS:
                    raise ValueError(f"{width} x {height} pixels")
                if width != height:
                    raise ValueError(f"{width} x {height} px: the pictures of ImageNet-C are squares")
                if not px and width != PUBLISHED_PX:
                    raise ValueError(
                        f"{width} x {height} px, the published ones have {PUBLISHED_PX}: --px N resizes the whole square to N px"
                    )
                whole = picture.convert("RGB")
                return np.asarray(whole) if px in (0, width) else resized(whole, px)
    except Exception as error:  # Pillow's decoders answer damage with errors of many kinds
        raise ValueError(f"cannot use {stored.where}: {error}") from None
