"""Everything that touches NVIDIA DALI: the loader built on it, and DALI as its users commonly write it, the benchmark's peer.

This is the only file of the project that imports nvidia.dali, inside functions, so that the rest runs where it is not installed. On the CPU
all of it is tested. With a GPU the same pipeline decodes by nvJPEG ("mixed") and the views stay on the GPU: that has NOT been run yet.
"""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from cossl.pipelines.batch import Batch, Blocks, LoaderSpec, fill
from cossl.pipelines.geometry import box_fractions, sample_views
from cossl.pipelines.simd import compiled
from cossl.pipelines.torch_loader import BetonPictures, open_pictures

INSTALL_DALI = "pip install -c constraints.txt -e '.[dali]' (with a CUDA 12 driver: '.[dali-cuda12]')"
EXIF_ORIENTATION = 0x0112


def require_dali() -> Any:
    """The nvidia.dali module. Raises ImportError with the one line that installs it."""
    try:
        import nvidia.dali
    except ImportError as error:
        raise ImportError(f"DALI is not installed ({error}); install it with: {INSTALL_DALI}") from error
    return nvidia.dali


# ---- encoded pictures -------------------------------------------------------------------------------------------------------------

Encoded = tuple[UInt8[np.ndarray, " n"], int, int]  # the bytes of a file, height and width of its picture
_pillow = threading.Lock()  # Pillow's warnings are silenced by catch_warnings, which acts on the whole process


@compiled
def jpeg_size(data: UInt8[np.ndarray, " n"]) -> tuple[int, int, bool]:
    """Height and width of a whole JPEG file, 8-bit grey or of three components, and whether it has EXIF or XMP. Zeros for all else."""
    size, at, height, width, tagged = len(data), 2, 0, 0, False
    if size < 4 or data[0] != 0xFF or data[1] != 0xD8 or data[size - 2] != 0xFF or data[size - 1] != 0xD9:
        return 0, 0, False
    while at + 9 < size and data[at] == 0xFF:
        marker, length = data[at + 1], 256 * data[at + 2] + data[at + 3]
        if marker == 0xDA:  # the scan begins: all that concerns the picture has been said
            return (height, width, tagged) if height * width else (0, 0, False)
        if 0xC0 <= marker <= 0xC2 and data[at + 4] == 8 and (data[at + 9] == 1 or data[at + 9] == 3):
            height, width = 256 * data[at + 5] + data[at + 6], 256 * data[at + 7] + data[at + 8]
        tagged = tagged or marker == 0xE1
        at += 2 + length
    return 0, 0, False


class EncodedPictures:
    """What DALI decodes, for each picture of an image folder or a beton.

    An upright grey or colour JPEG goes to DALI as it is stored. All else (PNG, CMYK, EXIF-rotated, damaged: 1 in 1,000 of ImageNet) is
    decoded by Pillow as in the torch loader, one at a time, and goes on uncompressed: same pixels, same errors, and no second opinion on
    how a picture stands. Trap: damage inside a scan that libjpeg reads over is read over here too, where Pillow may refuse it.
    """

    def __init__(self, path: Path):
        self.pictures = open_pictures(path)

    def open(self, index: int) -> Image.Image:
        """The picture as Pillow decodes it, upright RGB. Raises OSError or ValueError naming a broken one."""
        with _pillow:
            return self.pictures.open(index)

    def __getitem__(self, index: int) -> Encoded:
        data = self._stored(index)
        height, width, tagged = jpeg_size(data)
        if height and not (tagged and self._is_turned(data)):
            return data, height, width
        picture = self.open(index)
        pixels = b"P6 %d %d 255\n" % picture.size + picture.tobytes()
        return np.frombuffer(pixels, np.uint8), picture.height, picture.width

    def _stored(self, index: int) -> UInt8[np.ndarray, " n"]:
        if isinstance(self.pictures, BetonPictures):
            return self.pictures.beton.payload(index)
        return np.fromfile(self.pictures.files[index], np.uint8)

    def _is_turned(self, data: UInt8[np.ndarray, " n"]) -> bool:
        with _pillow, Image.open(io.BytesIO(data.tobytes())) as picture:
            return bool(picture.getexif().get(EXIF_ORIENTATION, 1) != 1)


# ---- the loader -------------------------------------------------------------------------------------------------------------------


def _build_pipeline(spec: LoaderSpec, depth: int, device_id: int | None) -> Any:
    """One decode of the union of the boxes, then each view's box cut out of that and resized; a negative width mirrors.

    The box is cut before it is resized (0.1 ms of CPU a view at 224): the resize's own region of interest blends in what lies around it.
    `jpeg_fancy_upsampling` asks nvJPEG for the chroma that libjpeg gives on the CPU, where the option changes nothing.
    """
    dali = require_dali()
    batch_size = -(-spec.batch_size // spec.world_size)
    pipeline = dali.Pipeline(batch_size, max(1, spec.workers), device_id, prefetch_queue_depth=depth)
    fn = dali.fn
    with pipeline:
        picture = fn.decoders.image_slice(
            fn.external_source(name="encoded"),
            device="cpu" if device_id is None else "mixed",
            start=fn.external_source(name="start"),
            shape=fn.external_source(name="shape"),
            axes=(0, 1),
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
        views = []
        for v in range(len(spec.recipe)):
            start, shape, size = (fn.external_source(name=f"{name}{v}") for name in ("start", "shape", "size"))
            box = fn.slice(picture, start=start, shape=shape, axes=(0, 1))
            views.append(fn.resize(box, size=size, interp_type=dali.types.INTERP_LINEAR, antialias=True))
        pipeline.set_outputs(*views)
    pipeline.build()
    return pipeline


@dataclass
class _Step:
    """One batch on its way: being read, then being rendered, then there."""

    index: Int[np.ndarray, " b"]
    epoch: int
    reads: list[Future[list[Encoded]]]
    batch: Batch | None = None
    geometry: Any = None
    abandoned: bool = False


class DaliLoader:
    """`Loader` over an image folder or a beton: `spec.workers` threads read files, as many of DALI's own decode, cut and resize.

    Up to `spec.batches_ahead` batches are under way. The pipeline is built once; batches that an abandoned epoch left in it are thrown away
    when the next one needs their place. After an error of DALI's the loader must be made anew.
    """

    def __init__(self, path: Path, spec: LoaderSpec) -> None:
        require_dali()
        self.encoded, self.spec = EncodedPictures(path), spec
        self.pictures = self.encoded.pictures
        self.class_names = self.pictures.class_names
        len(self)
        self._rows = np.stack([view.row() for view in spec.recipe])
        self._gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._depth, self._blocks = max(1, spec.batches_ahead), Blocks(spec.batches_ahead + 2)
        self._pipeline = _build_pipeline(spec, self._depth, self._gpu.index if self._gpu else None)
        self._rendering: deque[_Step] = deque()
        self._readers = ThreadPoolExecutor(max(1, spec.workers), thread_name_prefix="cossl-dali")
        self._prime()

    def __len__(self) -> int:
        return self.spec.steps(len(self.pictures), self.pictures.pages)

    @property
    def num_samples(self) -> int:
        return len(self.pictures)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        steps: deque[_Step] = deque()  # the newest is being read, the others are being rendered
        try:
            for index in self.spec.batches(self.num_samples, epoch, start_step, self.pictures.pages):
                steps.append(_Step(index, epoch, self._read(index)))
                if len(steps) > 1:
                    self._render(steps[-2])
                if len(steps) > self.spec.batches_ahead:
                    yield self._finish(steps.popleft())
            while steps:
                yield self._finish(steps.popleft())
        finally:
            for step in steps:
                step.abandoned = True
                for read in step.reads:
                    read.cancel()

    def picture(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        return np.asarray(self.encoded.open(index))

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._rendering.clear()
        self._pipeline = None  # DALI ends its threads with its last reference

    def _read(self, index: Int[np.ndarray, " b"]) -> list[Future[list[Encoded]]]:
        """The encoded pictures of a batch in their order, sixteen to a task."""
        parts = [index[i : i + 16].tolist() for i in range(0, len(index), 16)]
        return [self._readers.submit(lambda part: [self.encoded[i] for i in part], part) for part in parts]

    def _prime(self) -> None:
        """Runs single black pixels through: the first `schedule_run` of a pipeline runs it as often as it prefetches."""
        pixel = np.frombuffer(b"P6 1 1 255\n\0\0\0", np.uint8)
        boxes = np.tile(np.array([0, 0, 1, 1], np.int32), (1, len(self._rows), 1))
        for _ in range(self._depth):
            self._feed([pixel], boxes, np.zeros((1, len(self._rows)), np.bool_))
        self._pipeline.schedule_run()
        for _ in range(self._depth):
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()

    def _feed(self, encoded: list[np.ndarray], boxes: Int[np.ndarray, "b v 4"], flips: Bool[np.ndarray, "b v"]) -> None:
        starts, shapes = boxes[..., :2], boxes[..., 2:]
        start, end = starts.min(1), (starts + shapes).max(1)
        inputs: dict[str, Any] = {"encoded": encoded, "start": start, "shape": end - start}
        for v, view in enumerate(self.spec.recipe):
            inputs[f"start{v}"], inputs[f"shape{v}"] = starts[:, v] - start, np.ascontiguousarray(shapes[:, v])
            inputs[f"size{v}"] = view.size_px * np.where(flips[:, v, None], (1, -1), (1, 1)).astype(np.float32)
        for name, data in inputs.items():
            self._pipeline.feed_input(name, data)

    def _render(self, step: _Step) -> None:
        """Gives the batch to DALI, which renders it in its own threads."""
        encoded, heights, widths = zip(*(picture for read in step.reads for picture in read.result()), strict=True)
        sizes = np.array(heights), np.array(widths)
        boxes, flips, photometry = sample_views(self.spec.seed, step.epoch, step.index, *sizes, self._rows)
        step.reads, step.geometry = [], (box_fractions(boxes, *sizes), flips, photometry)
        while len(self._rendering) >= self._depth:
            self._collect()
        self._feed(list(encoded), boxes, flips)
        self._pipeline.schedule_run()
        self._rendering.append(step)

    def _finish(self, step: _Step) -> Batch:
        if step.reads:
            self._render(step)
        while step.batch is None:
            self._collect()
        return step.batch

    def _collect(self) -> None:
        """Takes the oldest batch out of the pipeline, whichever epoch asked for it."""
        step = self._rendering.popleft()
        try:
            # On a GPU, copies out of DALI's memory and its reuse are ordered on this stream; nothing waits on the host.
            outputs = self._pipeline.share_outputs(cuda_stream=torch.cuda.current_stream() if self._gpu else None)
        except RuntimeError as error:
            raise self._explained(step, error) from None
        if not step.abandoned:
            step.batch = self._batch(step, outputs)
        self._pipeline.release_outputs()

    def _batch(self, step: _Step, outputs: Sequence[Any]) -> Batch:
        """The batch in memory of its own: on the GPU if there is one, where `Batch.to` then leaves it."""
        count, labels = len(step.index), self.pictures.labels[step.index]
        batch = fill(
            self.spec.allocate(count, None if self._gpu else self._blocks), self.spec, step.epoch, step.index, labels, *step.geometry
        )
        if self._gpu:
            there = self.spec.allocate(count, lambda size: torch.empty(size, dtype=torch.uint8, device=self._gpu))
            for name in (field.name for field in fields(Batch) if field.name not in ("memory", "views")):
                getattr(there, name).copy_(getattr(batch, name))
            batch = there
        for view, output in zip(batch.split(), outputs, strict=True):
            view.permute(0, 2, 3, 1).copy_(from_dlpack(output.as_tensor()))
        return batch

    def _explained(self, step: _Step, error: RuntimeError) -> Exception:
        """The error that names the picture DALI could not decode, as far as Pillow cannot either."""
        try:
            for index in step.index.tolist():
                self.encoded.open(index)
        except (OSError, RuntimeError, ValueError) as named:
            return named
        said = str(error).partition("encountered:")[2].strip() or str(error)
        return RuntimeError(f"DALI cannot render a batch that Pillow can read ({said.splitlines()[0]}): use the torch loader")


# ---- DALI as it is commonly written -----------------------------------------------------------------------------------------------


class UsualDali:
    """Epochs of a pipeline whose outputs are the views and the labels: a list of views, uint8 [b, s, s, 3], per batch."""

    def __init__(self, pipeline: Any, num_views: int):
        from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

        self._names = [f"view{v}" for v in range(num_views)]
        self._batches = DALIGenericIterator(
            pipeline, [*self._names, "label"], reader_name="reader", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True
        )

    def __iter__(self) -> Iterator[list[Tensor]]:
        for (batch,) in self._batches:
            yield [batch[name] for name in self._names]


def usual_dali(
    path: Path, batch_size: int, workers: int, sizes: Sequence[int], areas: Sequence[tuple[float, float]] | None = None
) -> UsualDali:
    """DALI over an image folder as its users write it: one decode, then a random resized crop of (smallest, largest) area per view, a flip.

    Source: DALI's own ResNet-50 example (readers.file, decoders.image, random_resized_crop), with as many crops as there are sizes.
    """
    dali = require_dali()
    gpu = torch.cuda.is_available()
    pipeline = dali.Pipeline(batch_size, max(1, workers), torch.cuda.current_device() if gpu else None, seed=0)
    fn = dali.fn
    with pipeline:
        encoded, label = fn.readers.file(file_root=str(path), random_shuffle=True, name="reader")
        picture = fn.decoders.image(encoded, device="mixed" if gpu else "cpu")
        crops = [
            fn.random_resized_crop(picture, size=(size, size), random_area=area)
            for size, area in zip(sizes, areas or [(0.08, 1.0)] * len(sizes), strict=True)
        ]
        pipeline.set_outputs(*(fn.flip(crop, horizontal=fn.random.coin_flip()) for crop in crops), label)
    return UsualDali(pipeline, len(crops))
