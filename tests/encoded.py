"""Small pictures as bytes of any kind, for the tests that convert and refuse files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def picture(seed: int = 0, width: int = 48, height: int = 32) -> Image.Image:
    """A smooth picture that differs in every corner, so that a rotation shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """The bytes of its file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int) -> bytes:
    """A JPEG whose EXIF orientation says to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), exif=exif, quality=95)
