"""The reference loader: PIL in torch's DataLoader, from an image folder or a beton. It runs everywhere.

The other loaders are tested against its pixels: one decode, then per view the box cut out and resized by PIL's
antialiased bilinear filter.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from cossl.pipelines.batch import Batch, LoaderSpec, fill
from cossl.pipelines.beton import Beton, list_image_folder
from cossl.pipelines.geometry import box_fractions, sample_views


class Pictures(Protocol):
    """A set of pictures; `open` gives the RGB picture of an index, and `pages` the pages that pictures lie on in a beton."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    pages: Any

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image: ...


class UnreadablePicture(OSError):
    """A picture that cannot be decoded, in one line; of what torch's DataLoader makes of it, its workers' traceback, the last line."""

    def __init__(self, said: str) -> None:
        super().__init__(said.rstrip().rpartition(f"{type(self).__name__}: ")[2])


class Folder:
    """Pictures of an image folder (`<root>/<class>/<file>`), labels by sorted class name."""

    pages = None

    def __init__(self, root: Path):
        files, labels, names = list_image_folder(root)
        self.files, self.labels, self.class_names = files, np.asarray(labels, np.int64), tuple(names)

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a broken EXIF block does not touch the pixels
                with Image.open(self.files[index]) as picture:
                    return ImageOps.exif_transpose(picture).convert("RGB")
        except (MemoryError, AttributeError, NameError):
            raise  # the machine's fault or this program's, not the picture's
        except Exception as error:  # Pillow's decoders answer damage with OSError, Syntax-, Value-, Index-, Type-, struct and zlib errors
            raise UnreadablePicture(
                f"cannot read {self.files[index]}: {error}. Remove it, or run `cossl convert`, which sets broken pictures aside"
            ) from None


class BetonPictures:
    """Pictures of a beton, decoded by PIL."""

    def __init__(self, path: Path):
        self.beton = Beton(path)
        self.labels, self.class_names, self.pages = self.beton.labels, tuple(self.beton.class_names), self.beton.pages

    def __len__(self) -> int:
        return len(self.beton)

    def open(self, index: int) -> Image.Image:
        try:
            return self.beton.open(index)
        except ValueError as error:
            raise UnreadablePicture(str(error)) from None


def open_pictures(path: Path) -> Folder | BetonPictures:
    return Folder(path) if path.is_dir() else BetonPictures(path)


def resized(picture: Image.Image, px: int) -> UInt8[np.ndarray, "px px 3"]:
    """All of an RGB picture as a square, by Pillow's antialiased bilinear filter."""
    # The width first, always: Pillow 13 begins with the height of tall boxes, which rounds some pixels otherwise.
    wide = picture.resize((px, picture.height), Image.Resampling.BILINEAR)
    return np.asarray(wide.resize((px, px), Image.Resampling.BILINEAR))


class _Cutter(Dataset):
    """(epoch, index) to the views of one picture, in a worker process."""

    def __init__(self, pictures: Pictures, spec: LoaderSpec):
        self.pictures, self.spec = pictures, spec
        self.rows = np.stack([view.row() for view in spec.recipe])

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        picture = self.pictures.open(index)
        sizes = np.array([picture.height]), np.array([picture.width])
        boxes, flips, photometry = sample_views(self.spec.seed, epoch, np.array([index]), *sizes, self.rows)
        views = []
        for view, (top, left, h, w), flip in zip(self.spec.recipe, boxes[0], flips[0], strict=True):
            pixels = resized(picture.crop((left, top, left + w, top + h)), view.size_px)
            views.append(pixels[:, ::-1] if flip else pixels)
        return views, box_fractions(boxes, *sizes)[0], flips[0], photometry[0], index, self.pictures.labels[index]

    def __len__(self) -> int:
        return len(self.pictures)


class TorchLoader:
    """`Loader` over an image folder, a beton, or pictures from elsewhere, with `spec.workers` processes."""

    def __init__(self, path: Path | Pictures, spec: LoaderSpec):
        self.pictures: Pictures = open_pictures(path) if isinstance(path, Path) else path
        self.spec = spec
        self.class_names = self.pictures.class_names
        len(self)
        self._cutter = _Cutter(self.pictures, spec)
        self._cutter[0, 0]  # compiles the geometry here, so that the forked workers inherit it

    def __len__(self) -> int:
        return self.spec.steps(len(self.pictures), self.pictures.pages)

    @property
    def num_samples(self) -> int:
        return len(self.pictures)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        keys = [[(epoch, int(i)) for i in batch] for batch in self.spec.batches(self.num_samples, epoch, start_step, self.pictures.pages)]
        collate = partial(_collate, self.spec, epoch)
        pin = torch.cuda.is_available()
        own = torch.Generator()  # DataLoader draws a seed for its workers; not from the generator that the training uses
        how = {"num_workers": self.spec.workers, "collate_fn": collate, "pin_memory": pin, "generator": own}
        yield from DataLoader(self._cutter, batch_sampler=keys, worker_init_fn=ignore_stop_signals, **how)  # type: ignore[arg-type]

    def picture(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        return np.asarray(self.pictures.open(index))

    def close(self) -> None:
        """Nothing is held between epochs."""


def _collate(spec: LoaderSpec, epoch: int, samples: list[tuple]) -> Batch:
    views, boxes, flips, photometry, index, label = zip(*samples, strict=True)
    batch = spec.allocate(len(samples))
    for v, canvas in enumerate(batch.canvases()):
        np.stack([sample[v] for sample in views], out=canvas)
    return fill(batch, spec, epoch, np.stack(index), np.stack(label), np.stack(boxes), np.stack(flips), np.stack(photometry))


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def ignore_stop_signals(*_: object) -> None:
    """For the start of a worker process (a DataLoader's `worker_init_fn`): stop signals of a launcher no longer reach it.

    SLURM sends them to every process of a job, and a worker that dies of one takes the run with it. SIGTERM from the parent still ends the
    worker: multiprocessing stops its children so, and would wait for ever for one that is deaf to it.
    """
    if sys.platform == "darwin":  # no sigwaitinfo, hence no sender; no launcher either
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        return
    parent = os.getppid()

    def watch() -> None:
        while True:
            came = signal.sigwaitinfo(STOP_SIGNALS)
            if came.si_signo == signal.SIGTERM and came.si_pid == parent:
                os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # threads that start later, the watching one too, have them blocked as well
    threading.Thread(target=watch, name="stop signals", daemon=True).start()
