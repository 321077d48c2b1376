"""The rows of `cossl bench loaders`: ours, its peers and the floors; and the process that measures one of them.

Every row renders the same number of uint8 views from the same JPEG bytes: random resized crops of the recipe's scale, flips, no colours.
They differ in what their users get: ours, DALI and torchvision antialias (bilinear), stock ffcv averages (INTER_AREA), the floors neither.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cossl.pipelines import jpeg, make_loader
from cossl.pipelines.batch import LoaderSpec
from cossl.pipelines.beton import Beton
from cossl.pipelines.cut import stride_of
from cossl.pipelines.dali_loader import INSTALL_DALI
from cossl.pipelines.ffcv_stock import INSTALL_FFCV, decode_function
from cossl.pipelines.geometry import sample_views
from cossl.pipelines.views import ViewSpec
from cossl.tools.bench import Stopwatch, peak_rss_mib

INSTALL_CV2 = "pip install opencv-python (the extra [ffcv] brings it)"

# The views of each recipe, (size in px, smallest and largest share of the picture): SwAV's numbers where there are local crops.
VIEWS: dict[str, tuple[tuple[int, tuple[float, float]], ...]] = {
    "2x224": ((224, (0.08, 1.0)),) * 2,
    "2x224+6x96": ((224, (0.14, 1.0)),) * 2 + ((96, (0.05, 0.14)),) * 6,
}


@dataclass(frozen=True)
class Job:
    """One row of the table: what to open, on which pictures, and how many batches a turn has."""

    name: str
    views: str
    workers: int
    batch_size: int
    batches: int
    folder: str
    beton: str | None

    @property
    def sizes(self) -> list[int]:
        return [size for size, _ in VIEWS[self.views]]

    @property
    def scales(self) -> list[tuple[float, float]]:
        return [scale for _, scale in VIEWS[self.views]]

    @property
    def source(self) -> Path:
        return Path(self.folder if ROWS[self.name].reads == "folder" else self.beton or "")

    @property
    def spec(self) -> LoaderSpec:
        recipe = tuple(ViewSpec(size, scale, jitter_p=0, grayscale_p=0) for size, scale in VIEWS[self.views])
        return LoaderSpec(recipe, self.batch_size, workers=self.workers)


# Batches, of an epoch, before the first turn (stock ffcv touches all of its five buffers) and after the last (no loader runs dry in it).
RAMP_BATCHES, SPARE_BATCHES = 8, 8

Batches = Iterator[Any]  # one epoch, each batch of `batch_size` pictures


def _ours(backend: str, job: Job) -> Batches:
    return make_loader(backend, job.source, job.spec).epoch(0)


def _stock_ffcv(job: Job) -> Batches:
    from cossl.pipelines.ffcv_stock import stock_ffcv

    return iter(stock_ffcv(job.source, job.batch_size, job.workers, job.sizes, job.scales))


class _SeveralViews:
    """A transform that applies one transform per view, as multi-crop SSL code does."""

    def __init__(self, transforms: list[Callable[[Any], Any]], shared: Callable[[Any], Any] | None = None):
        self.transforms, self.shared = transforms, shared

    def __call__(self, image: Any) -> list[Any]:
        image = self.shared(image) if self.shared else image
        return [transform(image) for transform in self.transforms]


def _torchvision(tensors: bool, job: Job) -> Batches:
    """ImageFolder and DataLoader. Crops by PIL, then tensors; or tensors first, then crops by the v2 transforms."""
    import torchvision.transforms as v1
    import torchvision.transforms.v2 as v2
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    views = zip(job.sizes, job.scales, strict=True)
    if tensors:
        crops = [v2.Compose([v2.RandomResizedCrop(size, scale, antialias=True), v2.RandomHorizontalFlip()]) for size, scale in views]
        transform = _SeveralViews(crops, v2.PILToTensor())
    else:
        transform = _SeveralViews(
            [v1.Compose([v1.RandomResizedCrop(size, scale), v1.RandomHorizontalFlip(), v1.PILToTensor()]) for size, scale in views]
        )
    pictures = ImageFolder(str(job.source), transform)
    return iter(DataLoader(pictures, job.batch_size, shuffle=True, num_workers=job.workers, drop_last=True))


def _usual_dali(job: Job) -> Batches:
    from cossl.pipelines.dali_loader import usual_dali

    return iter(usual_dali(job.source, job.batch_size, job.workers, job.sizes, job.scales))


# ---- the floors: one thread, no loader --------------------------------------------------------------------------------------------

# (payload, height, width, boxes [v 4], views) fills the views, each uint8 [s s 3] or, where that spares a copy, [3 s s].
Cutter = Callable[[NDArray[np.uint8], int, int, NDArray[np.int32], list[NDArray[np.uint8]]], None]


def _bilinear(picture: NDArray[np.uint8], view: NDArray[np.uint8]) -> None:
    """OpenCV's two-tap bilinear, on one thread."""
    import cv2

    cv2.setNumThreads(0)
    cv2.resize(picture, view.shape[:2], dst=view, interpolation=cv2.INTER_LINEAR)


def union_cutter(cuts: bool, beton: Beton) -> Cutter:
    """The union of the boxes by our own decoder, the fastest here; its planes are cut one by one and stay planes, or are not cut at all."""
    pixels, longest = int((beton.heights * beton.widths).max()), int(max(beton.heights.max(), beton.widths.max()))
    space = jpeg.workspace(pixels, longest, int(beton.sizes.max()))
    room = np.empty(3 * int(beton.widths.max()) * stride_of(int(beton.heights.max())), np.uint8)

    def cut_all(payload: NDArray[np.uint8], height: int, width: int, boxes: NDArray[np.int32], views: list[NDArray[np.uint8]]) -> None:
        (top, left), (bottom, right) = boxes[:, :2].min(0).tolist(), (boxes[:, :2] + boxes[:, 2:]).max(0).tolist()
        if jpeg.decode_box(payload, height, width, (left, top, right, bottom), room, space) != jpeg.OK:
            raise RuntimeError("a picture of the set is of a kind that our decoder leaves to Pillow")
        stride = stride_of(bottom - top)
        planes = room[: 3 * (right - left) * stride].reshape(right - left, 3, stride)
        for (y, x, h, w), view in zip(boxes - (top, left, 0, 0), views, strict=True):
            if cuts:
                for c, plane in enumerate(view.reshape(3, *view.shape[:2])):
                    _bilinear(planes[x : x + w, c, y : y + h], plane)

    return cut_all


def turbojpeg_cutter(beton: Beton) -> Cutter:
    """The whole picture by libffcv's TurboJPEG: a floor that owes nothing to our decoder."""
    decode, room = decode_function(), np.empty(3 * int((beton.heights * beton.widths).max()), np.uint8)

    def cut_all(payload: NDArray[np.uint8], height: int, width: int, boxes: NDArray[np.int32], views: list[NDArray[np.uint8]]) -> None:
        picture = room[: height * width * 3].reshape(height, width, 3)
        if not decode(payload, height, width, picture):
            raise RuntimeError("a picture of the set does not decode")
        for (top, left, h, w), view in zip(boxes, views, strict=True):
            _bilinear(picture[top : top + h, left : left + w], view)

    return cut_all


def _floor(make_cutter: Callable[[Beton], Cutter], job: Job) -> Batches:
    """The pictures, order and boxes of ours-ffcv, decoded and cut by one thread into memory that is used again. No flips, no batches."""
    beton, spec = Beton(job.source), job.spec
    cut_all, rows = make_cutter(beton), np.stack([view.row() for view in spec.recipe])
    views = [np.empty((size, size, 3), np.uint8) for size in job.sizes]
    for index in spec.batches(len(beton), 0, 0):
        heights, widths = beton.heights[index], beton.widths[index]
        boxes, _, _ = sample_views(spec.seed, 0, index, heights, widths, rows)
        for b, i in enumerate(index):
            cut_all(beton.payload(i), int(heights[b]), int(widths[b]), boxes[b], views)
        yield index


# ---- the table of rows ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """How a row is opened, what it reads (folder or beton), the package it needs, if any, and the line that installs that."""

    open: Callable[[Job], Batches]
    reads: str
    package: str | None = None
    install: str | None = None
    floor: bool = False


_FFCV, _DALI, _CV2 = ("ffcv", INSTALL_FFCV), ("nvidia.dali", INSTALL_DALI), ("cv2", INSTALL_CV2)
ROWS: dict[str, Row] = {
    "ours-ffcv": Row(partial(_ours, "ffcv"), "beton"),
    "ours-torch": Row(partial(_ours, "torch"), "folder"),
    "ours-dali-cpu": Row(partial(_ours, "dali"), "folder", *_DALI),
    "stock-ffcv": Row(_stock_ffcv, "beton", *_FFCV),
    "torchvision-pil": Row(partial(_torchvision, False), "folder"),
    "torchvision-v2": Row(partial(_torchvision, True), "folder"),
    "dali-cpu": Row(_usual_dali, "folder", *_DALI),
    "floor-decode": Row(partial(_floor, partial(union_cutter, True)), "beton", *_CV2, floor=True),  # decode the union, cut by OpenCV
    "floor-union": Row(partial(_floor, partial(union_cutter, False)), "beton", floor=True),  # decode the union, nothing else
    "floor-turbojpeg": Row(partial(_floor, turbojpeg_cutter), "beton", *_FFCV, floor=True),  # decode all by TurboJPEG, cut by OpenCV
}


# ---- the process that measures one row --------------------------------------------------------------------------------------------


def _import_for(job: Job) -> None:
    """Imports what this row's loader needs, so that no time of it is counted."""
    import torch  # noqa: F401

    if job.name.startswith("torchvision"):
        import torchvision.datasets
        import torchvision.transforms.v2  # noqa: F401
    if ROWS[job.name].package == "ffcv":
        decode_function()


class Measured:
    """One row, opened, in the middle of one long epoch: `first` opens it, each `repeat` times as many batches as the job says.

    The start and the end of the epoch are in no figure: an epoch of ImageNet is 40,000 batches, one here is not. (Stock ffcv allocates
    1 GB per epoch for 2x224+6x96; in epochs of 288 pictures that made it look 1.6 times as dear as it is.)
    """

    def __init__(self, job: Job):
        self.job, self.batches = job, iter(())

    def first(self) -> dict[str, float]:
        began = time.perf_counter()
        self.batches = ROWS[self.job.name].open(self.job)
        next(self.batches)
        first_batch_s = time.perf_counter() - began
        for _ in range(RAMP_BATCHES):
            next(self.batches)
        return {"first_batch_s": first_batch_s, "peak_rss_mib": peak_rss_mib()}

    def repeat(self) -> dict[str, float]:
        with Stopwatch() as watch:
            for _ in range(self.job.batches):
                next(self.batches)
        pictures = self.job.batches * self.job.batch_size
        rates = {"images_per_s": pictures / watch.wall_s, "cpu_ms_per_image": 1e3 * watch.cpu_s / pictures}
        return rates | {"peak_rss_mib": peak_rss_mib()}


def serve(job: Job, commands: io.TextIOBase, replies: io.TextIOBase) -> None:
    """Answers each line (`first`, `repeat`) with a line of JSON, until there are no more; before the first it says that it is ready."""

    def reply(content: dict[str, float]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    _import_for(job)
    measured = Measured(job)
    reply({})
    for line in commands:
        reply(getattr(measured, line.strip())())


def main() -> None:
    """`python -m cossl.tools.bench_rows JOB`: started by `cossl bench loaders`, one process per row."""
    job = Job(**json.loads(sys.argv[1]))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be read as an answer
    with warnings.catch_warnings(), contextlib.suppress(KeyboardInterrupt):
        warnings.simplefilter("ignore")
        serve(job, sys.stdin, replies)  # type: ignore[arg-type]
    for worker in multiprocessing.active_children():
        worker.terminate()
    os._exit(0)  # an epoch left half-way: stock ffcv's thread would abort the interpreter


def as_argument(job: Job) -> str:
    return json.dumps(asdict(job))


if __name__ == "__main__":
    from cossl.tools.bench_rows import main as installed_main  # so that no class lives in __main__

    installed_main()
