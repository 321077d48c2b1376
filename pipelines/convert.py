"""From a folder of pictures to a beton: the policy for every kind of picture, and a conversion that is whole or not there.

Policy, picture by picture (the contents decide, never the suffix):
  stored as it is   mode jpg: a three-component JPEG that needs no rotation and no resize and that TurboJPEG decodes without a warning
                    keeps its ORIGINAL BYTES: no second generation of JPEG loss, and its pixels are those of the source file.
  converted         PNG, GIF and WebP (first frame), BMP; grayscale, CMYK, YCCK, palette, alpha (dropped, as torchvision's ImageFolder
                    does); EXIF rotation (applied); larger than --max-side-px (area average); a JPEG that libjpeg only warns about.
                    They become 8-bit RGB, then a JPEG of --jpeg-quality, or raw pixels.
  quarantined       empty, truncated and damaged files, 12-bit JPEG, 16-bit or floating-point samples, files of any other kind, a side
                    over 65,535 px, more than 179 million pixels: left out, named with the reason in the manifest and at the end.
  kept              every other picture, however small.

A file that cannot be read at all (permission, vanished, input/output error) stops the conversion: the disk is at fault, not the picture.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from cossl.pipelines.beton import (
    CHUNK_BYTES,
    JPG,
    MANIFEST_FORMAT,
    RAW,
    Beton,
    Row,
    chunk_digests,
    list_image_folder,
    manifest_digest,
    manifest_path,
)
from cossl.pipelines.ffcv_loader import LARGEST_PAGE_BYTES, Decode, PageTooSmall, Written, decode_function, require_ffcv, write_rows

Mode = Literal["jpg", "raw", "proportion"]
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # no others: Pillow hands some (EPS) to an interpreter
EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
LONGEST_SIDE_PX = 65_535  # ffcv's table keeps height and width in 16 bits
SMALLEST_PAGE_BYTES = 1 << 23


@dataclass(frozen=True)
class Options:
    """How pictures are stored. Raises ValueError with the allowed values."""

    mode: Mode = "jpg"
    max_side_px: int | None = None
    jpeg_quality: int = 90
    jpeg_fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode {self.mode!r} is none of {', '.join(get_args(Mode))}")
        if self.max_side_px is not None and not 1 <= self.max_side_px <= LONGEST_SIDE_PX:
            raise ValueError(f"max_side_px {self.max_side_px} is not in 1..{LONGEST_SIDE_PX}; leave it out to keep every size")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality {self.jpeg_quality} is not in 1..100; 90 is usual")
        if not 0 <= self.jpeg_fraction <= 1:
            raise ValueError(f"jpeg_fraction {self.jpeg_fraction} is not in 0..1; 0.5 stores every other picture as JPEG")


def _why_unreadable(data: bytes) -> str:
    if not data:
        return "empty file"
    if data.startswith(b"\xff\xd8"):
        return "a JPEG that Pillow cannot read (12-bit samples or a damaged header)"
    return "no picture (none of JPEG, PNG, GIF, BMP, WebP)"


class FolderRows:
    """The pictures of an image folder as rows of a beton, prepared when asked for, in whatever process asks.

    `stored` of a row is one of "original bytes", "re-encoded", "raw pixels".
    """

    def __init__(self, files: list[Path], labels: list[int], options: Options, decode: Decode):
        self.files, self.labels, self.options = files, labels, options
        self._decode = decode
        self._scratch = np.empty(0, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return str(self.files[i])

    def __getitem__(self, i: int) -> Row | str:
        data = self.files[i].read_bytes()
        try:
            with warnings.catch_warnings():
                # Pillow warns of broken EXIF blocks, palette transparency and large pictures: the policy above has the answer to each.
                warnings.simplefilter("ignore")
                return self._row(data, self.labels[i], self._as_jpeg(i))
        except UnidentifiedImageError:
            return _why_unreadable(data)
        except Image.DecompressionBombError:
            return "more than 179 million pixels"
        except MemoryError:
            raise  # the machine's fault, not the picture's
        except Exception as error:  # Pillow's decoders answer damage with OSError, Syntax-, Value-, Index-, Type-, struct and zlib errors
            return f"damaged: {error}"

    def _as_jpeg(self, i: int) -> bool:
        """As in ffcv's proportion mode, but drawn from the row number: the same rows in every conversion, whatever the workers do."""
        if self.options.mode == "proportion":
            return bool(np.random.default_rng(i).random() < self.options.jpeg_fraction)
        return self.options.mode == "jpg"

    def _row(self, data: bytes, label: int, as_jpeg: bool) -> Row | str:
        limit = self.options.max_side_px or LONGEST_SIDE_PX
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.mode not in EIGHT_BIT:
                return f"samples of kind {picture.mode!r}, not 8-bit"
            width, height = picture.size
            if max(width, height) > LONGEST_SIDE_PX and self.options.max_side_px is None:
                return f"{width} x {height} px: a side is over {LONGEST_SIDE_PX}; --max-side-px would shrink it"
            upright = _orientation(picture) == 1
            plain = picture.format in ("JPEG", "MPO") and picture.mode == "RGB" and upright and max(width, height) <= limit
            if as_jpeg and plain and self._decodes(payload := np.frombuffer(data, dtype=np.uint8), height, width):
                return Row(JPG, height, width, payload, label, "original bytes")
            rgb = (picture if upright else ImageOps.exif_transpose(picture)).convert("RGB")
        if max(rgb.size) > limit:
            scale = limit / max(rgb.size)
            rgb = rgb.resize((max(1, int(rgb.width * scale)), max(1, int(rgb.height * scale))), Image.Resampling.BOX)
        if not as_jpeg:
            return Row(RAW, rgb.height, rgb.width, np.asarray(rgb).reshape(-1), label, "raw pixels")
        target = io.BytesIO()
        rgb.save(target, "JPEG", quality=self.options.jpeg_quality)
        return Row(JPG, rgb.height, rgb.width, np.frombuffer(target.getbuffer(), dtype=np.uint8), label, "re-encoded")

    def _decodes(self, payload: NDArray[np.uint8], height: int, width: int) -> bool:
        """Whether TurboJPEG, which will read it in training, takes the payload without a warning; Pillow hides libjpeg's warnings."""
        if self._scratch.size < height * width * 3:
            self._scratch = np.empty(height * width * 3, dtype=np.uint8)
        return self._decode(payload, height, width, self._scratch)


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1..8; 1 for none, for values outside that range and for EXIF blocks that cannot be read."""
    try:
        value = picture.getexif().get(0x0112, 1)
    except Exception:  # whatever a broken EXIF block makes Pillow raise, it must not cost the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion left behind: rows by how they were stored, pictures left out as (file, reason), and its cost."""

    out: Path
    num_rows: int
    class_names: tuple[str, ...]
    stored: dict[str, int]
    quarantined: tuple[tuple[str, str], ...]
    beton_bytes: int
    seconds: float


@contextmanager
def progress_bar(total: int, what: str, unit: str, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A function to call with each number of units done: a tqdm bar on a terminal, otherwise a plain line every 5 seconds."""
    if not show or sys.stderr.isatty():
        with tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=not show) as bar:
            yield lambda done: bar.update(done) and None
        return
    start = last = time.monotonic()
    so_far = 0

    def line(done: int) -> None:
        nonlocal so_far, last
        so_far, now = so_far + done, time.monotonic()
        if now - last > 5:
            last, rate = now, so_far / (now - start)
            left = (total - so_far) / rate
            print(f"{what}: {so_far:,} of {total:,} {unit}, {rate:,.0f} {unit}/s, {left:,.0f} s left", file=sys.stderr, flush=True)

    yield line


def _check_target(out: Path, overwrite: bool) -> None:
    """Raises ValueError or FileNotFoundError when nothing could be, or should be, written at out."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the beton to write, such as {out / 'train.beton'}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent} to write {out.name} into; make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ValueError(f"the folder {out.parent} is not writable; choose another target")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; --force writes it again, and keeps it until the new one is whole")


def _write(partial: Path, rows: FolderRows, num_workers: int, show: bool) -> Written:
    """write_rows with pages that hold the largest row. Their size is found by trying: a raw picture's is known once it is decoded."""
    page_bytes = SMALLEST_PAGE_BYTES
    while True:
        try:
            with progress_bar(len(rows), "converting", "pictures", show) as progress:
                return write_rows(partial, rows, num_workers=num_workers, page_bytes=page_bytes, progress=progress)
        except PageTooSmall as error:
            # Four times what was asked for: one more start, rarely two.
            page_bytes = min(LARGEST_PAGE_BYTES, 1 << (4 * error.needed - 1).bit_length())


def _manifest(beton: Beton, source: Path, names: list[str], rows: FolderRows, written: Written, digests: list[str]) -> dict[str, Any]:
    left_out = [{"file": str(rows.files[i].relative_to(source)), "reason": reason} for i, reason in written.left_out.items()]
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "source": source.resolve().name,
        "options": vars(rows.options),
        "num_rows": len(beton),
        "class_names": names,
        "class_counts": np.bincount(beton.labels, minlength=len(names)).tolist(),
        "stored": dict(written.stored),
        "quarantined": left_out,
        "beton_bytes": beton.path.stat().st_size,
        "chunk_bytes": CHUNK_BYTES,
        "chunk_sha256": digests,
        "cossl": importlib.metadata.version("cossl"),
        "ffcv": importlib.metadata.version("ffcv"),
    }
    return {**manifest, "sha256": manifest_digest(manifest)}


def _sync(path: Path) -> None:
    """What was written to the file or folder is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def convert(
    source: Path | str,
    out: Path | str,
    *,
    mode: Mode = "jpg",
    max_side_px: int | None = None,
    jpeg_quality: int = 90,
    jpeg_fraction: float = 0.5,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ConvertReport:
    """Writes the image folder `source` to the beton `out` and its manifest `<out>.json`; row order is torchvision's ImageFolder's.

    The policy for odd pictures heads this file. Each picture is read once. Both files are written under temporary names in the same folder,
    synced, and renamed when whole: on any error what was at `out` before is still there, and nothing new is.
    Raises ValueError, FileNotFoundError or FfcvMissing (one line, with the remedy) for what the user can put right, RuntimeError when a
    writer process fails (full disk, out of memory).
    """
    started = time.monotonic()
    source, out = Path(source), Path(out)
    options = Options(mode, max_side_px, jpeg_quality, jpeg_fraction)
    workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    if workers < 1:
        raise ValueError(f"{workers} workers convert nothing; give at least 1")
    _check_target(out, overwrite)
    files, labels, names = list_image_folder(source)
    require_ffcv()
    rows = FolderRows(files, labels, options, decode_function())
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        written = _write(partial, rows, min(workers, len(rows)), progress)
        _refuse_lost_classes(source, names, labels, written)
        beton = Beton(partial)
        with progress_bar(partial.stat().st_size, "hashing", "B", progress) as tick:
            digests = chunk_digests(partial, workers, tick)
        manifest = _manifest(beton, source, names, rows, written, digests)
        manifest_path(partial).write_text(json.dumps(manifest, indent=1))
        for path in (partial, manifest_path(partial)):
            _sync(path)
        if out.exists() and not overwrite:
            raise ValueError(f"{out} was written by someone else meanwhile; it is left as it is")
        # A crash between the two leaves a new beton beside an old manifest, which Beton and verify refuse.
        os.replace(partial, out)
        os.replace(manifest_path(partial), manifest_path(out))
        _sync(out.parent)
    finally:
        partial.unlink(missing_ok=True)
        manifest_path(partial).unlink(missing_ok=True)
    quarantined = tuple((entry["file"], entry["reason"]) for entry in manifest["quarantined"])
    seconds = time.monotonic() - started
    return ConvertReport(out, len(beton), tuple(names), dict(written.stored), quarantined, manifest["beton_bytes"], seconds)


def _refuse_lost_classes(source: Path, names: list[str], labels: list[int], written: Written) -> None:
    """Raises ValueError when every picture of a class, or of the folder, was quarantined: its label would stand for nothing."""
    left = np.bincount(np.delete(labels, list(written.left_out)), minlength=len(names))
    lost = [name for name, count in zip(names, left, strict=True) if count == 0]
    if lost:
        first = next(reason for i, reason in written.left_out.items() if names[labels[i]] == lost[0])
        what = "no picture" if len(lost) == len(names) else f"no picture of {len(lost)} class(es) ({', '.join(lost[:5])})"
        raise ValueError(f"{source}: {what} can be read, the first because: {first}; nothing was written. Repair or remove them")
