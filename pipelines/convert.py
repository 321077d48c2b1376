"""From a folder of pictures to a beton: the policy for every kind of picture, and a conversion that is whole or not there.

Policy, picture by picture (the contents decide, never the suffix):
  stored as it is   mode jpg: a three-component JPEG that needs no rotation and no resize keeps its ORIGINAL BYTES, so there is no second
                    generation of JPEG loss: a baseline one if it decodes cleanly, a progressive one if Pillow decodes it to the end.
  converted         PNG, GIF and WebP (first frame), BMP; grayscale, CMYK, YCCK, palette, alpha (dropped, as torchvision's ImageFolder
                    does); EXIF rotation (applied); larger than --max-side-px (area average); a baseline JPEG with stray bytes inside.
                    They become 8-bit RGB, then a JPEG of --jpeg-quality, or raw pixels.
  quarantined       empty, truncated and damaged files, 12-bit JPEG, 16-bit or floating-point samples, files of any other kind, a side
                    over 65,535 px, more than 179 million pixels: left out, named with the reason in the manifest and at the end.
  kept              every other picture, however small.

A file that cannot be read at all (permission, vanished, input/output error) stops the conversion: the disk is at fault, not the picture.
What was done by then is kept for --resume.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from cossl.pipelines.beton import JPG, MANIFEST_FORMAT, RAW, Beton, Row, manifest_digest, manifest_path, sample_rows
from cossl.pipelines.beton_partial import Partial, partial_beton, partial_folder
from cossl.pipelines.beton_writer import Written, data_start, write_rows
from cossl.pipelines.imagenet import list_pictures
from cossl.pipelines.jpeg import decode

Decode = Callable[[NDArray[np.uint8], int, int, NDArray[np.uint8]], bool]
Mode = Literal["jpg", "raw", "proportion"]
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # no others: Pillow hands some (EPS) to an interpreter
EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
LONGEST_SIDE_PX = 65_535  # ffcv's table keeps height and width in 16 bits


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
    """Picture files as rows of a beton, prepared when asked for, in whatever process asks.

    `stored` of a row is one of "original bytes", "re-encoded", "raw pixels". decode(payload, height, width, out) fills out, uint8
    [height, width, 3], and says whether the payload is a JPEG that decodes cleanly; it says False of the kinds it does not know.
    """

    def __init__(self, files: Sequence[Path], options: Options, decode: Decode):
        # One array: worker processes would copy the pages of a million Path objects by touching their reference counts.
        self._files = np.array([os.fsencode(file) for file in files])
        self.options, self._decode = options, decode
        self._scratch = np.empty(0, dtype=np.uint8)
        decode(np.frombuffer(b"no JPEG", np.uint8), 1, 1, np.empty((1, 1, 3), np.uint8))  # compiled here, once, not in every worker

    def __len__(self) -> int:
        return len(self._files)

    def file(self, i: int) -> Path:
        return Path(os.fsdecode(self._files[i]))

    def name(self, i: int) -> str:
        return str(self.file(i))

    def __getitem__(self, i: int) -> Row | str:
        data = self.file(i).read_bytes()
        try:
            with warnings.catch_warnings():
                # Pillow warns of broken EXIF blocks, palette transparency and large pictures: the policy above has the answer to each.
                warnings.simplefilter("ignore")
                return self._row(data, self._as_jpeg(i))
        except UnidentifiedImageError:
            return _why_unreadable(data)
        except Image.DecompressionBombError:
            return "more than 179 million pixels"
        except (MemoryError, AttributeError, NameError):
            raise  # the machine's fault or this program's, not the picture's
        except Exception as error:  # Pillow's decoders answer damage with OSError, Syntax-, Value-, Index-, Type-, struct and zlib errors
            return f"damaged: {error}"

    def _as_jpeg(self, i: int) -> bool:
        """As in ffcv's proportion mode, but drawn from the row number: the same rows in every conversion, whatever the workers do."""
        if self.options.mode == "proportion":
            return bool(np.random.default_rng(i).random() < self.options.jpeg_fraction)
        return self.options.mode == "jpg"

    def _row(self, data: bytes, as_jpeg: bool) -> Row | str:
        limit = self.options.max_side_px or LONGEST_SIDE_PX
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.mode not in EIGHT_BIT:
                return f"samples of kind {picture.mode!r}, not 8-bit"
            width, height = picture.size
            if max(width, height) > LONGEST_SIDE_PX and self.options.max_side_px is None:
                return f"{width} x {height} px: a side is over {LONGEST_SIDE_PX}; --max-side-px would shrink it"
            upright = _orientation(picture) == 1
            plain = picture.format in ("JPEG", "MPO") and picture.mode == "RGB" and upright and max(width, height) <= limit
            payload = np.frombuffer(data, dtype=np.uint8)
            if plain and self._decode(payload, height, width, pixels := self._room(height, width, keep=not as_jpeg)):
                return (
                    Row(JPG, height, width, payload, "original bytes")
                    if as_jpeg
                    else Row(RAW, height, width, pixels.reshape(-1), "raw pixels")
                )
            picture.load()
            if as_jpeg and plain and picture.info.get("progressive"):
                return Row(JPG, height, width, payload, "original bytes")
            rgb: Image.Image = picture if upright else ImageOps.exif_transpose(picture)
            rgb = rgb if rgb.mode == "RGB" else rgb.convert("RGB")
            if max(rgb.size) > limit:
                scale = limit / max(rgb.size)
                rgb = rgb.resize((max(1, int(rgb.width * scale)), max(1, int(rgb.height * scale))), Image.Resampling.BOX)
            if not as_jpeg:
                return Row(RAW, rgb.height, rgb.width, np.asarray(rgb).reshape(-1), "raw pixels")
            target = io.BytesIO()
            rgb.save(target, "JPEG", quality=self.options.jpeg_quality)
            return Row(JPG, rgb.height, rgb.width, np.frombuffer(target.getbuffer(), dtype=np.uint8), "re-encoded")

    def _room(self, height: int, width: int, *, keep: bool) -> NDArray[np.uint8]:
        """Memory for a picture's pixels; the next call may overwrite it unless it is to keep."""
        if keep:
            return np.empty((height, width, 3), np.uint8)
        if self._scratch.size < height * width * 3:
            self._scratch = np.empty(height * width * 3, dtype=np.uint8)
        return self._scratch[: height * width * 3].reshape(height, width, 3)


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1..8; 1 for none, for values outside that range and for EXIF blocks that cannot be read."""
    try:
        value = picture.getexif().get(0x0112, 1)
    except Exception:  # whatever a broken EXIF block makes Pillow raise, it must not cost the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion left behind: rows by how they were stored, pictures left out as (file, reason), and its cost.

    `num_converted` counts the pictures that this call went through in `seconds`; a resumed conversion found the others done.
    """

    out: Path
    num_rows: int
    class_names: tuple[str, ...]
    stored: dict[str, int]
    quarantined: tuple[tuple[str, str], ...]
    beton_bytes: int
    seconds: float
    num_converted: int


@contextmanager
def progress_bar(total: int, what: str, unit: str, show: bool = True, done_before: int = 0) -> Iterator[Callable[[int], None]]:
    """A function to call with each number of units done: a tqdm bar on a terminal, otherwise a plain line every 5 seconds."""
    if not show or sys.stderr.isatty():
        with tqdm(total=total, initial=done_before, desc=what, unit=unit, unit_scale=True, disable=not show) as bar:
            yield lambda done: bar.update(done) and None
        return
    start = last = time.monotonic()
    so_far = done_before

    def line(done: int) -> None:
        nonlocal so_far, last
        so_far, now = so_far + done, time.monotonic()
        if now - last > 5:
            last, rate = now, (so_far - done_before) / (now - start)
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


def _identity(source: Path, files: Sequence[Path], labels: Sequence[int], names: Sequence[str], options: Options) -> dict[str, Any]:
    """What a beton is made of: the same identity gives the same bytes, as long as the files' contents stay."""
    state, prefix = hashlib.sha256(), f"{source}{os.sep}"
    for file, label in zip(files, labels, strict=True):
        state.update(os.fsencode(f"{str(file).removeprefix(prefix)}\0{names[label]}\n"))
    tools = {name: importlib.metadata.version(name) for name in ("cossl", "pillow")}
    return {"pictures": len(files), "pictures_sha256": state.hexdigest(), **vars(options), **tools}


def _manifest(beton: Beton, source: Path, names: list[str], rows: FolderRows, identity: dict[str, Any], written: Written) -> dict[str, Any]:
    left_out = [{"file": str(rows.file(i).relative_to(source)), "reason": reason} for i, reason in written.left_out.items()]
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "source": source.resolve().name,
        "pictures_sha256": identity["pictures_sha256"],
        "options": vars(rows.options),
        "num_rows": len(beton),
        "class_names": names,
        "class_counts": np.bincount(beton.labels, minlength=len(names)).tolist(),
        "stored": written.stored,
        "quarantined": left_out,
        "storage_order": "shuffled",  # pages read one after the other give pictures of all classes
        "page_bytes": beton.page_bytes,
        "beton_bytes": beton.path.stat().st_size,
        "chunk_ends": written.chunk_ends,
        "chunk_sha256": written.chunk_sha256,
        "cossl": identity["cossl"],
        "pillow": identity["pillow"],
    }
    return {**manifest, "sha256": manifest_digest(manifest)}


def _sync(path: Path) -> None:
    """What was written to the file or folder is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(partial: Partial, manifest: dict[str, Any], out: Path, overwrite: bool) -> None:
    """Manifest and beton under their final names, synced.

    A kill between the two leaves the journal, and --resume publishes again; with --force, where an old beton was to be replaced.
    """
    partial.manifest.write_text(json.dumps(manifest, indent=1))
    for path in (partial.beton, partial.manifest):
        _sync(path)
    if out.exists() and not overwrite:
        raise ValueError(f"{out} was written by someone else meanwhile; it is left as it is")
    os.replace(partial.manifest, manifest_path(out))
    os.replace(partial.beton, out)
    _sync(out.parent)


def _report(out: Path, manifest: dict[str, Any], started: float, num_converted: int) -> ConvertReport:
    quarantined = tuple((entry["file"], entry["reason"]) for entry in manifest["quarantined"])
    names, seconds = tuple(manifest["class_names"]), time.monotonic() - started
    size = manifest["beton_bytes"]
    return ConvertReport(out, manifest["num_rows"], names, manifest["stored"], quarantined, size, seconds, num_converted)


def convert(
    source: Path | str,
    out: Path | str,
    *,
    mode: Mode = "jpg",
    max_side_px: int | None = None,
    jpeg_quality: int = 90,
    jpeg_fraction: float = 0.5,
    labels_file: Path | None = None,
    classes: str | None = None,
    num_workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> ConvertReport:
    """Writes the pictures of `source` to the beton `out` and its manifest `<out>.json`; row order is torchvision's ImageFolder's.

    The policy for odd pictures heads this file; `imagenet.list_pictures` says what labels_file and classes are. Each picture is read once.
    All is written in the folder `.<out>.partial` and renamed when whole and synced: on any error what was at `out` before is still there.
    That folder stays when a kill, a full disk or a vanished file ends the work, and `resume` goes on from it, to the same bytes; of a
    conversion that is finished `resume` returns the report. Raises ValueError or FileNotFoundError (one line, with the remedy) for what the
    user can put right, RuntimeError when a worker process fails.
    """
    started = time.monotonic()
    source, out = Path(source), Path(out)
    options = Options(mode, max_side_px, jpeg_quality, jpeg_fraction)
    workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    if workers < 1:
        raise ValueError(f"{workers} workers convert nothing; give at least 1")
    _check_target(out, overwrite or resume)
    files, labels, names = list_pictures(source, labels_file, classes)
    rows, identity = FolderRows(files, options, decode), _identity(source, files, labels, names, options)
    if out.exists() and not overwrite:
        manifest = Beton(out).manifest or {}
        if manifest.get("pictures_sha256") != identity["pictures_sha256"] or manifest["options"] != vars(options):
            raise ValueError(f"{out} exists, of other pictures or options; --force writes it again, and keeps it until then")
        if partial_folder(out).exists():  # killed after its last step but one
            Partial(out).close(remove=True)
        return _report(out, manifest, started, 0)
    restart = overwrite and not resume
    with partial_beton(out, identity, data_start(len(rows)), resume=resume, restart=restart, num_threads=workers) as partial:
        done = sum(len(shard.rows) for shard in partial.shards)
        with progress_bar(len(rows), "converting", "pictures", progress, done) as tick:
            written = write_rows(partial, rows, labels, num_workers=workers, progress=tick)
        _refuse_lost_classes(source, names, labels, written)
        manifest = _manifest(Beton(partial.beton), source, names, rows, identity, written)
        _publish(partial, manifest, out, overwrite)
    return _report(out, manifest, started, len(rows) - done)


def _refuse_lost_classes(source: Path, names: list[str], labels: list[int], written: Written) -> None:
    """Raises ValueError when every picture of a class, or of the folder, was quarantined: its label would stand for nothing."""
    left = np.bincount(np.delete(labels, list(written.left_out)), minlength=len(names))
    lost = [name for name, count in zip(names, left, strict=True) if count == 0]
    if lost:
        first = next(reason for i, reason in written.left_out.items() if names[labels[i]] == lost[0])
        what = "no picture" if len(lost) == len(names) else f"no picture of {len(lost)} class(es) ({', '.join(lost[:5])})"
        raise ValueError(f"{source}: {what} can be read, the first because: {first}; nothing was written. Repair or remove them")


def compare_with_source(
    beton: Path, source: Path, *, labels_file: Path | None = None, classes: str | None = None, rows: int | None = 64
) -> int:
    """How many rows, evenly spread, were found equal to what the policy makes of their source files today.

    Original bytes and raw pixels are equal to the byte; a picture that was encoded again has the same size and a PSNR over 30 dB, which
    another version of Pillow reaches too. Raises ValueError naming the file, and for a source that is not the manifest's.
    """
    ours = Beton(beton)
    if ours.manifest is None:
        raise FileNotFoundError(f"{beton} has no manifest that names its source; convert again")
    files, labels, names = list_pictures(source, labels_file, classes)
    try:
        options = Options(**ours.manifest["options"])
    except TypeError:
        raise ValueError(f"{manifest_path(beton)} names options that this version does not know; convert again") from None
    if _identity(source, files, labels, names, options)["pictures_sha256"] != ours.manifest["pictures_sha256"]:
        raise ValueError(f"{source} does not hold the pictures that {beton} was made of: names, labels or number differ")
    left_out = {entry["file"] for entry in ours.manifest["quarantined"]}
    kept = [i for i, file in enumerate(files) if str(file.relative_to(source)) not in left_out]
    theirs = FolderRows(files, options, decode)
    chosen = sample_rows(len(ours), rows)
    for i in chosen:
        row = theirs[kept[i]]
        if isinstance(row, str) or not _same(ours, i, row):
            raise ValueError(f"{beton}: row {i} is not what {files[kept[i]]} holds; the file has changed, or the beton is damaged")
    return len(chosen)


def _same(beton: Beton, i: int, row: Row) -> bool:
    if (beton.modes[i], beton.heights[i], beton.widths[i]) != (row.mode, row.height, row.width):
        return False
    if np.array_equal(beton.payload(i), row.payload):
        return True
    if row.stored != "re-encoded":
        return False
    difference = np.asarray(beton.open(i), np.float32) - np.asarray(Image.open(io.BytesIO(row.payload.tobytes())), np.float32)
    return bool(np.mean(difference**2) < 255**2 / 1000)
