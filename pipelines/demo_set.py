"""The demo pictures: an ImageFolder of small JPEGs whose class is the set of textured parts that occur together.

Source: CO-SSL's subject (arXiv 2501.02860), spatial co-occurrence, in miniature. Each of the 10 classes is one block of the 2-(6,3,2) design over six
part types: every part type is in 5 classes and every pair in 2, so one part leaves five classes, two parts leave two and only all three tell.

Trap: colour, contrast polarity, size, rotation, phase, shape, place, background and clutter are drawn without looking at the class. A class that
leaked through any of them would be read off by the pixel floor or by an untrained network, and the demo would show nothing.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

Plane = NDArray[np.float32]

VERSION = "v1"  # part of the folder's name: raise it with every change that alters a pixel
TRAIN_COUNT, VAL_COUNT = 2400, 600
SIDE_PX = (96, 128)
JPEG_QUALITY = 90
STALE_S = 3600.0

# (part types of a class): 10 blocks, each part in 5, each pair in 2.
BLOCKS = ((0, 1, 2), (0, 1, 3), (0, 2, 4), (0, 3, 5), (0, 4, 5), (1, 2, 5), (1, 3, 4), (1, 4, 5), (2, 3, 4), (2, 3, 5))


def _stripes(u: Plane, v: Plane, phase: float) -> Plane:
    return np.sin(8.0 * u + phase)


def _checker(u: Plane, v: Plane, phase: float) -> Plane:
    return 2.0 * np.sin(5.5 * u + phase) * np.sin(5.5 * v + phase)


def _dots(u: Plane, v: Plane, phase: float) -> Plane:
    s, h = 7.0 * u + phase, 7.0 * 0.8660254 * v
    return np.cos(s) + 2.0 * np.cos(0.5 * s) * np.cos(h) - 0.6


def _rings(u: Plane, v: Plane, phase: float) -> Plane:
    return np.sin(9.0 * np.sqrt(u * u + v * v) + phase)


def _rays(u: Plane, v: Plane, phase: float) -> Plane:
    return 1.5 * np.sin(5.0 * np.arctan2(v, u) + phase)


def _zigzag(u: Plane, v: Plane, phase: float) -> Plane:
    return np.sin(8.0 * (u + 0.9 * np.abs((1.1 * v + phase) % 1.4 - 0.7)) + phase)


# Each takes coordinates in units of the part's radius and returns about -1..1; its sign is ink or ground.
PARTS: dict[str, Callable[[Plane, Plane, float], Plane]] = {
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "rings": _rings,
    "rays": _rays,
    "zigzag": _zigzag,
}


class Blob(NamedTuple):
    """One shape of a picture: place and radius in pixels, and the part type, or None for plain clutter."""

    x: float
    y: float
    radius: float
    part: int | None


def class_names() -> list[str]:
    """The ten folder names in ImageFolder's (sorted) order: the class's part types joined by a hyphen."""
    names = list(PARTS)
    return sorted("-".join(names[p] for p in block) for block in BLOCKS)


def _colour(rng: np.random.Generator, light: float, saturation: float) -> Plane:
    """An RGB triple 0..1 of random hue whose mean is `light`."""
    angle = rng.uniform(0.0, 2.0 * math.pi) + np.array([0.0, 2.0, 4.0]) * math.pi / 3.0
    return np.clip(light + saturation * np.cos(angle), 0.0, 1.0).astype(np.float32)


def _background(rng: np.random.Generator, width: int, height: int) -> Plane:
    """`[h w 3]`, mid-grey with a faint gradient and low-frequency noise: alike in all pictures, for one that names its picture is a shortcut."""
    coarse = rng.uniform(-1.0, 1.0, (4, 4)).astype(np.float32)
    noise = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return 0.5 + 0.06 * noise[..., None] + (_colour(rng, 0.0, 0.0) + rng.uniform(-0.03, 0.03, 3).astype(np.float32))


def _place(rng: np.random.Generator, width: int, height: int, parts: list[int | None]) -> list[Blob]:
    """The shapes at random places that barely overlap: each takes, of 24 random places, the first that is free, else the freest."""
    side = min(width, height)
    blobs: list[Blob] = []
    for part in parts:
        radius = side * (rng.uniform(0.13, 0.18) if part is not None else rng.uniform(0.05, 0.09))
        places = rng.uniform(0.9 * radius, np.array([width, height]) - 0.9 * radius, (24, 2))
        gaps = [min((math.hypot(x - b.x, y - b.y) - radius - b.radius for b in blobs), default=0.0) for x, y in places]
        best = next((i for i, gap in enumerate(gaps) if gap >= -1.0), int(np.argmax(gaps)))
        blobs.append(Blob(float(places[best, 0]), float(places[best, 1]), radius, part))
    return blobs


def _paint(rng: np.random.Generator, canvas: Plane, blob: Blob) -> None:
    """Paints one shape into the canvas: a rotated disc or rounded square, with antialiased texture and rim."""
    height, width = canvas.shape[:2]
    reach = blob.radius + 2.0
    x0, x1 = max(0, int(blob.x - reach)), min(width, int(blob.x + reach) + 2)
    y0, y1 = max(0, int(blob.y - reach)), min(height, int(blob.y + reach) + 2)
    dx = ((np.arange(x0, x1) - blob.x) / blob.radius).astype(np.float32)[None, :]
    dy = ((np.arange(y0, y1) - blob.y) / blob.radius).astype(np.float32)[:, None]
    turn, phase = rng.uniform(0.0, 2.0 * math.pi, 2)
    u = np.float32(math.cos(turn)) * dx + np.float32(math.sin(turn)) * dy
    v = np.float32(math.cos(turn)) * dy - np.float32(math.sin(turn)) * dx
    rim = np.sqrt(u * u + v * v) if rng.random() < 0.5 else np.sqrt(np.sqrt(u**4 + v**4)) * np.float32(1.08)
    inside = np.clip((1.0 - rim) * blob.radius + 0.5, 0.0, 1.0)[..., None]
    middle, half = rng.uniform(0.42, 0.58), rng.uniform(0.22, 0.36) * rng.choice((-1.0, 1.0))
    ink, ground = _colour(rng, middle + half, 0.14), _colour(rng, middle - half, 0.14)
    if blob.part is None:
        paint = ink[None, None, :]
    else:
        texture = list(PARTS.values())[blob.part](u, v, np.float32(phase))
        mix = np.clip(0.5 + 1.5 * texture, 0.0, 1.0)[..., None]
        paint = ground + mix * (ink - ground)
    patch = canvas[y0:y1, x0:x1]
    patch += inside * (paint - patch)


def picture(seed: int, split: int, index: int) -> NDArray[np.uint8]:
    """Picture `index` of a split (0 train, 1 val) as `[h w 3]`; its class is block `index % 10`. A pure function of its three arguments."""
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, split, index]))
    width, height = (int(n) for n in rng.integers(SIDE_PX[0], SIDE_PX[1] + 1, 2))
    parts: list[int | None] = list(BLOCKS[index % len(BLOCKS)])
    canvas = _background(rng, width, height)
    rng.shuffle(parts)
    for blob in _place(rng, width, height, parts + [None] * int(rng.integers(1, 4))):
        _paint(rng, canvas, blob)
    return (np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _write(root: Path, seed: int, counts: tuple[int, int]) -> Iterator[Path]:
    """Writes both splits below `root`, yielding each file as it is done."""
    names = list(PARTS)
    folders = ["-".join(names[p] for p in block) for block in BLOCKS]
    for split, (folder, count) in enumerate(zip(("train", "val"), counts, strict=True)):
        for name in folders:
            (root / folder / name).mkdir(parents=True)
        for index in range(count):
            path = root / folder / folders[index % len(folders)] / f"{index:05d}.jpg"
            buffer = io.BytesIO()
            Image.fromarray(picture(seed, split, index)).save(buffer, "JPEG", quality=JPEG_QUALITY)
            path.write_bytes(buffer.getvalue())
            yield path


def _sweep(cache: Path) -> None:
    """Removes what killed runs left behind; a young folder may belong to a run that is still writing."""
    for left in cache.glob(".demo-*.part"):
        if time.time() - left.stat().st_mtime > STALE_S:
            shutil.rmtree(left, ignore_errors=True)


def make_demo_set(cache: Path, seed: int = 0, count: tuple[int, int] = (TRAIN_COUNT, VAL_COUNT)) -> Path:
    """The folder `<cache>/demo-v1-…/{train,val}/<class>/<index>.jpg`, generated on the first call and returned at once on later ones.

    `count` is (train, val) pictures, each a multiple of the number of classes so that the classes are balanced, else ValueError.
    Written under another name and renamed when whole: what stands under the final name is always complete, whoever was killed or came second.
    """
    if seed < 0 or any(n <= 0 or n % len(BLOCKS) for n in count):
        raise ValueError(f"demo set: seed={seed} must be >= 0 and count={count} positive multiples of {len(BLOCKS)}")
    final = cache / f"demo-{VERSION}-seed{seed}-{count[0]}+{count[1]}"
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    partial = cache / f".{final.name}.{uuid.uuid4().hex}.part"
    quiet = not sys.stderr.isatty()
    if quiet:
        print(f"demo set: generating {sum(count)} pictures in {final}", file=sys.stderr)
    start = time.perf_counter()
    try:
        for _ in tqdm(_write(partial, seed, count), total=sum(count), desc="demo set", unit="picture", disable=quiet):
            pass
        try:
            os.rename(partial, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if quiet:
        print(f"demo set: {sum(count)} pictures in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return final
