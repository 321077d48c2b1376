"""The demo pictures: an ImageFolder of small JPEGs whose class is the set of textured parts that occur together.

Source: CO-SSL's subject (arXiv 2501.02860), spatial co-occurrence, in miniature. Each of the 10 classes is a pair out of five part types:
every type is in 4 classes, so one type leaves four of them and only both tell. Each type occurs four times in a picture.

Traps, both seen. Whatever else than the types two crops of a picture share, BYOL learns instead: one dark or bright piece of clutter in
each picture became 84 % of the variance of its features. So clutter differs from the ground by its colour alone, and the colours of the
nine shapes lie evenly around the hue circle: no picture is redder than another, and hardly brighter. And whatever tells the class to
12 x 12 pixels spoils the comparison: contrast, size, rotation, phase, shape, place, colour, background and clutter are drawn without
looking at the class, and a part's mean is the same whatever its texture.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from cossl.pipelines.convert import convert

Plane = NDArray[np.float32]

VERSION = "v3"  # part of the folder's name: raise it with every change that alters a pixel
TRAIN_COUNT, VAL_COUNT = 2400, 600
SIDE_PX = (104, 120)
JPEG_QUALITY = 90
STALE_S = 3600.0

GRID = 3
RADIUS = (0.42, 0.5)  # of a grid cell's side; a part is 0.28 to 0.33 of the picture's
SHAKE = 0.08
TURN = 0.35  # radians, to either side
REACH = 0.4  # of light from a part's mean; clipping at black and white instead would shift the mean of some textures
TINT = 0.10
BACKGROUND = 0.03
MARGIN = 24  # the largest radius in pixels and the soft rim

PAIRS = tuple(itertools.combinations(range(5), 2))  # the part types of each class; every type is in four of them


def _stripes(u: Plane, v: Plane, phase: Plane) -> Plane:
    return np.sin(5.5 * u + phase)


def _checker(u: Plane, v: Plane, phase: Plane) -> Plane:
    return 2.0 * np.sin(4.4 * u + phase) * np.sin(4.4 * v + phase)


def _dots(u: Plane, v: Plane, phase: Plane) -> Plane:
    s, h = 6.0 * u + phase, 5.196 * v
    return np.cos(s) + np.float32(2.0) * np.cos(0.5 * s) * np.cos(h) - 0.6


def _rings(u: Plane, v: Plane, phase: Plane) -> Plane:
    return np.sin(7.5 * np.sqrt(u * u + v * v) + phase)


def _rays(u: Plane, v: Plane, phase: Plane) -> Plane:
    angle: Plane = np.arctan2(v, u)
    return 1.5 * np.sin(4.0 * angle + phase)


# Each takes coordinates in units of the part's radius and returns about -1..1; its sign is ink or ground.
PARTS: dict[str, Callable[[Plane, Plane, Plane], Plane]] = {
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "rings": _rings,
    "rays": _rays,
}


class Shapes(NamedTuple):
    """The shapes of one picture, one row each: place and radius in pixels, part type (-1: plain clutter), looks."""

    x: Plane
    y: Plane
    radius: Plane
    part: NDArray[np.int64]
    turn: Plane
    phase: Plane
    square: NDArray[np.bool_]
    middle: Plane
    contrast: Plane
    tint: Plane  # [shape, ink or ground, rgb], each of zero mean over rgb


def class_names() -> list[str]:
    """The ten folder names in ImageFolder's (sorted) order: the class's part types joined by a hyphen."""
    names = list(PARTS)
    return sorted("-".join(names[p] for p in pair) for pair in PAIRS)


def _background(rng: np.random.Generator, width: int, height: int) -> Plane:
    """`[h w 3]`, grey with faint coloured clouds whose mean is the same in all pictures."""
    coarse = rng.uniform(-1.0, 1.0, (3, 4, 4)).astype(np.float32)
    clouds = [Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC) for c in coarse - coarse.mean((1, 2), keepdims=True)]
    return np.float32(0.5) + np.float32(BACKGROUND) * np.stack([np.asarray(c) for c in clouds], -1)


def _shapes(rng: np.random.Generator, pair: tuple[int, int], width: int, height: int) -> Shapes:
    """Nine shapes on a shaken grid: each type of the pair four times, and one plain shape as clutter."""
    part = np.array([*pair] * 4 + [-1])
    cell = rng.permutation(GRID * GRID)
    draw = rng.random((GRID * GRID, 8)).astype(np.float32)
    shake_x, shake_y, size, turn, phase, square, middle, contrast = draw.T
    column, row = np.divmod(cell, GRID)
    across = math.sqrt(width * height) / GRID
    wheel = np.stack([rng.permutation(GRID * GRID) + rng.random() for _ in range(2)], 1)[..., None] / (GRID * GRID)
    hue = (2.0 * math.pi * (wheel + np.arange(3) / 3.0)).astype(np.float32)
    size_low, size_high = RADIUS
    return Shapes(
        x=(column + 0.5 + SHAKE * (2.0 * shake_x - 1.0)).astype(np.float32) * np.float32(width / GRID),
        y=(row + 0.5 + SHAKE * (2.0 * shake_y - 1.0)).astype(np.float32) * np.float32(height / GRID),
        radius=across * (size_low + (size_high - size_low) * size) * np.where(part < 0, np.float32(0.6), np.float32(1.0)),
        part=part,
        turn=TURN * (2.0 * turn - 1.0),
        phase=2.0 * math.pi * phase,
        square=square < 0.5,
        middle=0.47 + 0.06 * middle,
        contrast=0.76 + 0.14 * contrast,
        tint=np.float32(TINT) * np.cos(hue),
    )


def _textures(shapes: Shapes, u: Plane, v: Plane) -> Plane:
    """`[shape side side]`, 1 where ink is and 0 where ground is."""
    mix = np.zeros_like(u)
    for part, texture in enumerate(PARTS.values()):
        rows = np.flatnonzero(shapes.part == part)
        if rows.size:
            value = texture(u[rows], v[rows], shapes.phase[rows, None, None])
            mix[rows] = np.clip(0.5 + 2.0 * value, 0.0, 1.0)
    return mix


def _centred(values: Plane, inside: Plane) -> Plane:
    """Each shape's values less their mean over the shape."""
    mean = (values * inside).sum((1, 2)) / inside.sum((1, 2))
    return values - mean[:, None, None]


def _paint(canvas: Plane, shapes: Shapes, margin: int) -> None:
    """Paints the shapes onto a canvas that has `margin` pixels to spare on each side, with soft rims and textures of equal means."""
    side = 2 * margin
    left, top = np.floor(shapes.x).astype(int), np.floor(shapes.y).astype(int)
    span = np.arange(side, dtype=np.float32)
    dx = ((span + (left - margin - shapes.x)[:, None].astype(np.float32)) / shapes.radius[:, None])[:, None, :]
    dy = ((span + (top - margin - shapes.y)[:, None].astype(np.float32)) / shapes.radius[:, None])[:, :, None]
    cos, sin = np.cos(shapes.turn)[:, None, None], np.sin(shapes.turn)[:, None, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    uu, vv = u * u, v * v
    rim = np.where(shapes.square[:, None, None], np.float32(1.08) * np.sqrt(np.sqrt(uu * uu + vv * vv)), np.sqrt(uu + vv))
    inside = np.clip((1.0 - rim) * shapes.radius[:, None, None] + 0.5, 0.0, 1.0)
    mix = _textures(shapes, u, v)
    light = _centred(np.clip(_centred(mix, inside) * shapes.contrast[:, None, None], -REACH, REACH), inside) + shapes.middle[:, None, None]
    ink, ground = shapes.tint[:, 0, None, None, :], shapes.tint[:, 1, None, None, :]
    paint = light[..., None] + ground + mix[..., None] * (ink - ground)
    for i in range(len(left)):
        patch = canvas[top[i] : top[i] + side, left[i] : left[i] + side]
        patch += inside[i, :, :, None] * (paint[i] - patch)


def picture(seed: int, split: int, index: int) -> NDArray[np.uint8]:
    """Picture `index` of a split (0 train, 1 val) as `[h w 3]`; its class is pair `index % 10`. A pure function of its three arguments."""
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, split, index]))
    width, height = (int(n) for n in rng.integers(SIDE_PX[0], SIDE_PX[1] + 1, 2))
    canvas = np.zeros((height + 2 * MARGIN, width + 2 * MARGIN, 3), np.float32)
    inner = canvas[MARGIN:-MARGIN, MARGIN:-MARGIN]
    inner[...] = _background(rng, width, height)
    _paint(canvas, _shapes(rng, PAIRS[index % len(PAIRS)], width, height), MARGIN)
    return (np.clip(inner, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _write(root: Path, seed: int, counts: tuple[int, int]) -> Generator[Path, None, None]:
    """Writes both splits below `root`, yielding each file as it is done. Threads suffice: numpy and the JPEG encoder let go of the GIL."""
    names = list(PARTS)
    folders = ["-".join(names[p] for p in pair) for pair in PAIRS]
    splits = ("train", "val")
    for folder, name in itertools.product(splits, folders):
        (root / folder / name).mkdir(parents=True)

    def write(job: tuple[int, int]) -> Path:
        split, index = job
        path = root / splits[split] / folders[index % len(folders)] / f"{index:05d}.jpg"
        buffer = io.BytesIO()
        Image.fromarray(picture(seed, split, index)).save(buffer, "JPEG", quality=JPEG_QUALITY)
        path.write_bytes(buffer.getvalue())
        return path

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(write, [(split, index) for split, count in enumerate(counts) for index in range(count)])


def _sweep(cache: Path) -> None:
    """Removes what killed runs left behind; a young folder may belong to a run that is still writing."""
    for left in cache.glob(".*.part"):
        if time.time() - left.stat().st_mtime > STALE_S:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A name, not yet a folder, to be written under; renamed to `final` at the end, unless somebody else has put a whole one there.

    Under the final name stands a complete folder or none. What is raised inside leaves nothing.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep(final.parent)
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}.part")
    try:
        yield partial
        try:
            os.rename(partial, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_demo_set(cache: Path, seed: int = 0, count: tuple[int, int] = (TRAIN_COUNT, VAL_COUNT)) -> Path:
    """The folder `<cache>/demo-…/{train,val}/<class>/<index>.jpg`, generated on the first call and returned at once on later ones.

    `count` is (train, val) pictures, each a multiple of the number of classes: they are balanced, else ValueError.
    Written under another name and renamed when whole: under the final name stands a complete set or none,
    whoever was killed or came second.
    """
    if seed < 0 or any(n <= 0 or n % len(PAIRS) for n in count):
        raise ValueError(f"demo set: seed={seed} must be >= 0 and count={count} positive multiples of {len(PAIRS)}")
    final = cache / f"demo-{VERSION}-seed{seed}-{count[0]}+{count[1]}"
    if final.is_dir():
        return final
    quiet = not sys.stderr.isatty()
    if quiet:
        print(f"demo set: generating {sum(count)} pictures in {final}", file=sys.stderr)
    start = time.perf_counter()
    with whole_folder(final) as partial, closing(_write(partial, seed, count)) as written:
        for _ in tqdm(written, total=sum(count), desc="demo set", unit="picture", disable=quiet):
            pass
    if quiet:
        print(f"demo set: {sum(count)} pictures in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return final


def cache_dir() -> Path:
    """Where generated pictures are kept: $COSSL_CACHE, else ~/.cache/cossl."""
    return Path(os.environ.get("COSSL_CACHE") or "~/.cache/cossl").expanduser()


def demo_data() -> Path:
    """Folder of the demo pictures, generated and converted the first time."""
    root = make_demo_set(cache_dir())
    for split in ("train", "val"):
        if not (root / f"{split}.beton").is_file():
            convert(root / split, root / f"{split}.beton", num_workers=os.cpu_count() or 1)
    return root
