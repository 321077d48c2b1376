"""The pictures of a measurement: one set of q90 JPEGs of at most 500 px, as an image folder and as a beton of the same bytes.

Whoever has no picture set at hand gets a generated one. It is made to cost what a photograph costs to decode: 500 x 375 px, about 54 KB
at quality 90 with 4:2:0 chroma, as ImageNet's pictures have at that size (57 KB there, 80 pictures of it).
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from cossl.pipelines.beton import list_image_folder
from cossl.pipelines.convert import convert
from cossl.pipelines.demo_set import whole_folder

VERSION = "v1"  # part of the folder's name: raise it with every change that alters a pixel
LONGEST_SIDE_PX, JPEG_QUALITY = 500, 90
WIDTH, HEIGHT, CLASSES, SHAPES = 500, 375, 10, 400
LARGEST_SET = 300  # different pictures

T = TypeVar("T")


@dataclass(frozen=True)
class Pictures:
    """The same JPEG bytes twice; `beton` is None where it was not asked for. `source` names where they are from."""

    folder: Path
    beton: Path | None
    source: str
    count: int
    different: int
    mean_bytes: int


def picture(index: int) -> UInt8[np.ndarray, "375 500 3"]:
    """Generated picture `index`: overlapping shapes of all sizes (the "dead leaves" model of photographs), light, and sensor noise."""
    rng = np.random.Generator(np.random.Philox(key=[11, index]))
    image = Image.new("RGB", (WIDTH, HEIGHT), tuple(rng.integers(60, 180, 3).tolist()))
    draw = ImageDraw.Draw(image)
    radius = 6 / rng.uniform(6 / 150, 1, SHAPES)  # as many shapes of each size as cover the same area
    colour = np.clip(rng.uniform(20, 235, (SHAPES, 1)) + rng.normal(0, 30, (SHAPES, 3)), 0, 255).astype(int)
    places, aspects = rng.random((SHAPES, 2)) * (WIDTH, HEIGHT), rng.uniform(0.6, 1.6, SHAPES)
    for (x, y), r, aspect, fill in zip(places, radius, aspects, colour.tolist(), strict=True):
        draw.ellipse((x - r * aspect, y - r / aspect, x + r * aspect, y + r / aspect), fill=tuple(fill))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    coarse = Image.fromarray(rng.uniform(0.5, 1.2, (4, 5)).astype(np.float32))
    light = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))[..., None]
    noise = rng.standard_normal((HEIGHT, WIDTH, 1), np.float32) * np.float32(rng.uniform(2, 7))
    return np.clip(pixels * light + noise, 0, 255).astype(np.uint8)


def _in_parallel(do: Callable[[int], T], count: int) -> list[T]:
    """Threads suffice: numpy and the JPEG encoder let go of the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(do, range(count)))


def generated_folder(cache: Path, count: int) -> Path:
    """`<cache>/bench-…/<class>/<index>.jpg`, written on the first call: complete under this name, or not there."""
    final = cache / f"bench-{VERSION}-{count}"
    if final.is_dir():
        return final
    names = [f"class-{i}" for i in range(min(CLASSES, count))]
    with whole_folder(final) as partial:
        for name in names:
            (partial / name).mkdir(parents=True)
        _in_parallel(lambda i: _save(Image.fromarray(picture(i)), partial / names[i % len(names)] / f"{i:05d}.jpg"), count)
    return final


def _save(image: Image.Image, path: Path) -> None:
    image.save(path, "JPEG", quality=JPEG_QUALITY)


def _shrink(source: Path, target: Path) -> bool:
    """Writes the picture upright, at most 500 px long, at quality 90. False, and nothing written, if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a broken EXIF block does not touch the pixels
            with Image.open(source) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return False
    if max(image.size) > LONGEST_SIDE_PX:
        scale = LONGEST_SIDE_PX / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BOX)
    target.parent.mkdir(parents=True, exist_ok=True)
    _save(image, target)
    return True


def shrunk_folder(source: Path, count: int, folder: Path) -> Path:
    """`count` pictures of the image folder `source`, evenly spread, each shrunk to 500 px and encoded at quality 90.

    Raises ValueError when some of those chosen cannot be read.
    """
    files, labels, names = list_image_folder(source)
    chosen: list[int] = np.linspace(0, len(files) - 1, count).astype(int).tolist()
    written = _in_parallel(lambda i: _shrink(files[chosen[i]], folder / names[labels[chosen[i]]] / f"{i:05d}.jpg"), count)
    if not all(written):
        first = files[chosen[written.index(False)]]
        raise ValueError(f"{written.count(False)} of {count} pictures in {source} cannot be read, the first is {first}: remove them")
    return folder


def repeated_folder(folder: Path, count: int, target: Path) -> Path:
    """`count` files, each in its class: pictures of `folder` evenly spread over it, or all of them again and again."""
    files, labels, names = list_image_folder(folder)
    for i in range(count):
        which = i * len(files) // count if count < len(files) else i % len(files)
        (target / names[labels[which]]).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[which], target / names[labels[which]] / f"{i:05d}.jpg")
    return target


def default_source() -> Path | None:
    """$COSSL_DATA/imagenet-sample/train where it is there; None means the generated pictures."""
    sample = Path(os.environ.get("COSSL_DATA", "")) / "imagenet-sample" / "train"
    return sample if "COSSL_DATA" in os.environ and sample.is_dir() else None


def prepare(source: Path | None, count: int, cache: Path, scratch: Path, with_beton: bool) -> Pictures:
    """A set of `count` pictures of `source`, or generated ones, which `cache` keeps; the rest goes to `scratch`.

    At most 300 different ones are taken: a larger set holds them several times, which is no different to a loader.
    """
    different = LARGEST_SET if source is None else min(count, LARGEST_SET, len(list_image_folder(source)[0]))
    folder = generated_folder(cache, different) if source is None else shrunk_folder(source, different, scratch / "pictures")
    if count != different:
        folder = repeated_folder(folder, count, scratch / "repeated")
    beton = scratch / "pictures.beton" if with_beton else None
    if beton is not None:
        convert(folder, beton, num_workers=min(2, count), progress=False)
    sizes = [file.stat().st_size for file in list_image_folder(folder)[0]]
    where = f"generated ({VERSION}, {WIDTH} x {HEIGHT} px)" if source is None else f"{source.resolve().parent.name}/{source.resolve().name}"
    return Pictures(folder, beton, where, count, min(count, different), sum(sizes) // len(sizes))
