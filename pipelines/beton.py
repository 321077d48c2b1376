"""Betons, ffcv's one-file data sets: read with plain numpy, and proved whole.

`convert.py` makes them. The manifest beside a beton (`<beton>.json`) holds its source, options, class names, the pictures left out, and the
SHA-256 of every stretch of the beton.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# ffcv 1.0.2's layout (ffcv/types.py, version 2): header, field descriptors, a table of rows, pages of payloads, allocation table.
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table_ptr", "<u8")], align=True
)
FIELD = np.dtype([("type_id", "u1"), ("name", "u1", (16,)), ("arguments", "u1", (1024,))], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
FIELD_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE}  # float, int, image: the ones that need no second allocation

JPG, RAW = 0, 1  # the image field's `mode`
MANIFEST_FORMAT = "cossl beton manifest 2"
MANIFEST_LIMIT_BYTES = 1 << 30  # 150 bytes for each of ImageNet's pictures, were they all quarantined, are 0.2 GB


class Row(NamedTuple):
    """One picture as it lies in a beton. `stored` says how its payload came to be; it is only counted."""

    mode: int
    height: int
    width: int
    payload: NDArray[np.uint8]
    stored: str


class Rows(Protocol):
    """What the writer asks for: rows[i] is a Row, or the reason (str) why picture i is left out; name(i) is for messages."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Row | str: ...

    def name(self, i: int) -> str: ...


def manifest_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")


class Beton:
    """A beton with one image and one integer field, memory-mapped: n rows of payload, height, width and label.

    Opening checks every size and pointer (10 ms for a million rows), so a file cut anywhere raises ValueError here and not in the middle of
    an epoch; only `verify` looks at the bytes themselves. Payloads are views of the map: writing is refused, copying is up to the reader.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no beton at {self.path}; make one with `cossl convert SRC {self.path}`")
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < HEADER.itemsize:
                raise self._refused(f"{size} bytes are no beton")
            # Read-only map; numpy keeps it alive as long as a view does.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.manifest = self._read_manifest(size)
        self.class_names: tuple[str, ...] = tuple(self.manifest["class_names"]) if self.manifest else ()
        header = self.bytes[: HEADER.itemsize].view(HEADER)[0]
        if header["version"] != 2 or not 2 <= header["num_fields"] <= 64 or header["page_size"] == 0:
            raise self._refused("no ffcv version 2 header")
        self.page_bytes, n = int(header["page_size"]), int(header["num_samples"])
        if n == 0:
            raise self._refused("no rows")
        table, end = self._metadata(int(header["num_fields"]), n, size)
        self.modes, self.labels = np.ascontiguousarray(table[0]["mode"]), np.ascontiguousarray(table[1])
        self.heights, self.widths = table[0]["height"].astype(np.int64), table[0]["width"].astype(np.int64)
        self.starts = table[0]["data_ptr"].astype(np.int64)
        self.pages = self.starts // self.page_bytes
        self.sizes = self._allocations(int(header["alloc_table_ptr"]), n, size, end)

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[type[Beton], tuple[Path]]:
        return Beton, (self.path,)

    def mode(self, i: int) -> Literal["jpg", "raw"]:
        return "jpg" if self.modes[i] == JPG else "raw"

    def payload(self, i: int) -> NDArray[np.uint8]:
        """The JPEG file or the raw pixels (height * width * 3) of row i, without a copy; any page may have to come from disk."""
        return self.bytes[self.starts[i] : self.starts[i] + self.sizes[i]]

    def ask_for(self, page: int) -> None:
        """Has the kernel read a page of the beton before it is needed. The page may reach beyond the end."""
        with self.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), page * self.page_bytes, self.page_bytes, os.POSIX_FADV_WILLNEED)

    def let_go(self, page: int) -> None:
        """Gives a page's memory back: first that of our map, as the kernel keeps what is mapped, then that of the page cache."""
        start = page * self.page_bytes
        self._map.madvise(mmap.MADV_DONTNEED, start, min(self.page_bytes, len(self._map) - start))
        with self.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), start, self.page_bytes, os.POSIX_FADV_DONTNEED)

    def open(self, i: int) -> Image.Image:
        """Row i decoded by Pillow, RGB. Raises ValueError when the payload does not decode to its stated size."""
        height, width = int(self.heights[i]), int(self.widths[i])
        if self.modes[i] == RAW:
            return Image.fromarray(self.payload(i).reshape(height, width, 3))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a broken EXIF block does not touch the pixels
                picture = Image.open(io.BytesIO(self.payload(i).tobytes()), formats=("JPEG",))
                if picture.size == (width, height):  # before any memory is taken for its pixels
                    return picture.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.path}: row {i} does not decode ({error}); convert again") from error
        raise ValueError(f"{self.path}: row {i} is {picture.size}, its table says {(width, height)}; convert again")

    def _refused(self, reason: str) -> ValueError:
        return ValueError(f"{self.path} is not a whole beton: {reason}. Write it again with `cossl convert SRC {self.path} --force`")

    def _read_manifest(self, size: int) -> dict[str, Any] | None:
        path = manifest_path(self.path)
        if not path.exists():
            return None
        try:
            if (length := path.stat().st_size) > MANIFEST_LIMIT_BYTES:
                raise ValueError(f"{length:,} bytes")
            manifest: dict[str, Any] = json.loads(path.read_text())
            if manifest["format"] != MANIFEST_FORMAT or manifest.pop("sha256") != manifest_digest(manifest):
                raise ValueError("it was changed")
            _check_parts(manifest)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is no manifest of a beton ({error}). Remove it, or convert again") from error
        if manifest["beton_bytes"] != size:
            raise self._refused(f"{size:,} bytes where its manifest says {manifest['beton_bytes']:,}")
        return manifest

    def _metadata(self, num_fields: int, n: int, size: int) -> tuple[tuple[Any, Any], int]:
        """(image column, label column), the offset at which the rows' table ends."""
        start = HEADER.itemsize + num_fields * FIELD.itemsize
        if start > size:
            raise self._refused("cut inside the field descriptors")
        types = self.bytes[HEADER.itemsize : start].view(FIELD)["type_id"].tolist()
        if types.count(2) != 1 or types.count(1) != 1 or not set(types) <= set(FIELD_TYPES):
            raise ValueError(f"{self.path} has fields of types {types}; cossl reads betons of one image and one integer field (the label)")
        row = np.dtype([("", FIELD_TYPES[kind]) for kind in types], align=True)
        end = start + n * row.itemsize
        if end > size:
            raise self._refused(f"cut inside the table of its {n:,} rows")
        table = self.bytes[start:end].view(row)
        return (table[f"f{types.index(2)}"], table[f"f{types.index(1)}"]), end

    def _allocations(self, table_at: int, n: int, size: int, data_from: int) -> NDArray[np.int64]:
        """Bytes of each row's payload. The allocation table is the last thing written: a conversion that was cut short has none."""
        if table_at == 0 or table_at + n * ALLOCATION.itemsize != size:
            raise self._refused(f"its {size:,} bytes do not end with the allocation table of its {n:,} rows (cut off, or never finished)")
        table = self.bytes[table_at:size].view(ALLOCATION)
        rows, starts, lengths = (table[name].astype(np.int64) for name in ("sample_id", "ptr", "size"))
        if not np.array_equal(np.sort(rows), np.arange(n)):
            raise self._refused("its allocation table does not name every row once")
        inside = lengths.min() >= 1 and starts.min() >= data_from and (lengths <= table_at - starts).all()  # their sum might overflow
        if not inside or not np.array_equal(self.starts[rows], starts):
            raise self._refused("a row points outside the data")
        sizes = np.empty(n, dtype=np.int64)
        sizes[rows] = lengths
        pixels = self.heights * self.widths * 3
        if self.modes.max() > RAW or pixels.min() < 1 or (sizes != pixels)[self.modes == RAW].any():
            raise self._refused("a row has an impossible size")
        return sizes


# ---- pictures in ------------------------------------------------------------------------------------------------------------------


def list_image_folder(root: Path | str, keep: Sequence[str] | None = None) -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and class names of `<root>/<class>/**/<file>`: sorted classes, sorted files, the order of torchvision's ImageFolder.

    `keep` names the classes to take (default: all); a label is the index among those. Raises FileNotFoundError or ValueError with one line
    for a path that is none. Every visible file counts, whatever its suffix: what is no picture is for the conversion to say.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {root}; expected {root}/<class>/<picture>")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; expected a folder {root}/<class>/<picture>")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        found = "has no class folders" if any(root.iterdir()) else "is empty"
        raise ValueError(f"{root} {found}; expected {root}/<class>/<picture>")
    if set(names) <= {"train", "val", "valid", "test"} and any(entry.is_dir() for entry in (root / names[0]).iterdir()):
        raise ValueError(f"{root} holds splits, not classes: {', '.join(names)}; give one of them, such as {root / names[0]}")
    names = kept_classes(root, names, keep)
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        before = len(files)
        for folder, _, entries in sorted(os.walk(root / name, followlinks=True)):
            files += [Path(folder, entry) for entry in sorted(entries) if not entry.startswith(".")]
        labels += [label] * (len(files) - before)
    if empty := sorted(set(range(len(names))) - set(labels)):
        raise ValueError(f"{root}: {len(empty)} class folder(s) without pictures: {some(names[i] for i in empty)}; fill or remove them")
    return files, labels, names


def kept_classes(root: Path, found: Sequence[str], keep: Sequence[str] | None) -> list[str]:
    """The classes of `keep`, sorted, or all that were found. Raises ValueError naming those that root lacks."""
    if missing := sorted(set(keep or ()) - set(found)):
        raise ValueError(f"{root} lacks {len(missing)} of the {len(set(keep or ()))} classes asked for: {some(missing)}")
    return sorted(found if keep is None else set(keep))


def some(names: Iterable[str]) -> str:
    """The first five, for a message."""
    names = list(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


# ---- proof ------------------------------------------------------------------------------------------------------------------------


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, so that a changed manifest is noticed as well as a changed beton."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_parts(manifest: dict[str, Any]) -> None:
    """Raises ValueError, LookupError or TypeError for a manifest whose parts are missing, not of their kinds, or leave bytes unproved."""
    names, ends, hashes = manifest["class_names"], manifest["chunk_ends"], manifest["chunk_sha256"]
    if not all(isinstance(name, str) for name in names) or len(names) != len(manifest["class_counts"]):
        raise ValueError("its classes are not a name and a count each")
    if not all(isinstance(end, int) for end in ends) or ends != sorted(set(ends)) or len(ends) != len(hashes):
        raise ValueError("its stretches are not an end and a hash each")
    if ends[-1] != manifest["beton_bytes"] or ends[0] <= 0:
        raise ValueError("its stretches do not cover the beton")
    if not isinstance(manifest["options"], dict) or not all(isinstance(entry["file"], str) for entry in manifest["quarantined"]):
        raise ValueError("its options or its list of pictures left out is none")


def digests(path: Path, start: int, ends: Sequence[int], num_threads: int, progress: Callable[[int], None] = lambda _: None) -> list[str]:
    """SHA-256 of the file's bytes start..ends[0], ends[0]..ends[1], and so on; progress is told the bytes of each.

    hashlib drops the GIL: threads add up.
    """

    def digest(stretch: tuple[int, int]) -> str:
        state, (at, end) = hashlib.sha256(), stretch
        with path.open("rb") as file:
            file.seek(at)
            while at < end and (block := file.read(min(end - at, 1 << 20))):
                state.update(block)
                at += len(block)
        progress(end - stretch[0])
        return state.hexdigest()

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(digest, pairwise((start, *ends))))


@dataclass(frozen=True)
class VerifyReport:
    """What was proved: every byte hashed, every pointer checked, and this many rows decoded."""

    num_rows: int
    num_classes: int
    num_decoded: int
    beton_bytes: int


def verify(
    path: Path | str, *, decode: int | None = 64, num_workers: int | None = None, progress: Callable[[int], None] = lambda _: None
) -> VerifyReport:
    """Proves a beton whole against its manifest: sizes, pointers, labels, the hash of every byte, and `decode` rows (None: all) by Pillow.

    progress is told the bytes hashed. Raises FileNotFoundError or ValueError with one line that names the file, what is wrong and where.
    """
    path = Path(path)
    beton = Beton(path)
    rows = sample_rows(len(beton), decode)
    if beton.manifest is None:
        raise FileNotFoundError(f"{path} has no manifest {manifest_path(path).name} beside it to prove it whole; convert again")
    manifest, threads = beton.manifest, num_workers or len(os.sched_getaffinity(0))
    counts, ends = manifest["class_counts"], manifest["chunk_ends"]
    in_range = beton.labels.min() >= 0 and beton.labels.max() < len(counts)
    if not in_range or np.bincount(beton.labels, minlength=len(counts)).tolist() != counts:
        raise ValueError(f"{path}: its labels are not those of its manifest; convert again with --force")
    _check_places(beton)
    for i, (ours, stated) in enumerate(zip(digests(path, 0, ends, threads, progress), manifest["chunk_sha256"], strict=True)):
        if ours != stated:
            where = f"between byte {ends[i - 1] if i else 0:,} and byte {ends[i]:,}"
            raise ValueError(f"{path} is damaged {where} (SHA-256 differs from its manifest); convert again with --force")
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda i: beton.open(i).load(), rows):
            pass
    return VerifyReport(num_rows=len(beton), num_classes=len(counts), num_decoded=len(rows), beton_bytes=manifest["beton_bytes"])


def sample_rows(n: int, count: int | None) -> list[int]:
    """`count` of n rows, evenly spread; None means all. Raises ValueError for a negative count."""
    if count is not None and count < 0:
        raise ValueError(f"decode {count} rows: give a number of rows, or `all`")
    return list(range(n)) if count is None or count >= n else np.unique(np.linspace(0, n - 1, count).astype(int)).tolist()


def _check_places(beton: Beton) -> None:
    """Raises ValueError when two payloads share bytes, or one lies across pages, which ffcv's Loader cannot read."""
    order = np.argsort(beton.starts)
    starts, ends = beton.starts[order], (beton.starts + beton.sizes)[order]
    wrong = starts // beton.page_bytes != (ends - 1) // beton.page_bytes
    wrong[:-1] |= ends[:-1] > starts[1:]
    if wrong.any():
        raise ValueError(f"{beton.path}: row {order[wrong.argmax()]} overlaps another or the end of a page; convert again with --force")
