"""Betons, ffcv's one-file data sets: reading them with plain numpy, making them from a folder of pictures, proving them whole.

Policy of `convert`, picture by picture (the contents decide, never the suffix):
  stored as it is      mode jpg: a three-component JPEG that needs no rotation and no resize and that TurboJPEG decodes without a warning keeps
                       its ORIGINAL BYTES: no second generation of JPEG loss, and its pixels are those of the source file.
  converted            PNG, GIF and WebP (first frame), BMP; grayscale, CMYK, YCCK, palette, alpha (dropped, as torchvision's ImageFolder
                       does); EXIF rotation (applied); larger than --max-side-px (area average); a JPEG that libjpeg only warns about.
                       They become 8-bit RGB, then JPEG of --jpeg-quality or raw pixels.
  quarantined          empty, truncated or damaged files, 12-bit JPEG, 16-bit or floating-point samples, any other kind of file, more than
                       179 million pixels, a side over 65,535 px: left out, named with the reason in the manifest and at the end.
  kept                 every other picture, however small.
A file that cannot be read at all (permission, vanished, input/output error) stops the conversion: the disk is at fault, not the picture.

The manifest beside the beton (`<beton>.json`) holds options, class names, quarantine list and a SHA-256 per 64 MiB of the beton.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import mmap
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from cossl.pipelines import ffcv_loader

# ffcv 1.0.2's layout (ffcv/types.py, version 2): header, field descriptors, one metadata row per picture, pages of payloads, allocation table.
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table_ptr", "<u8")], align=True
)
FIELD = np.dtype([("type_id", "u1"), ("name", "u1", (16,)), ("arguments", "u1", (1024,))], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
FIELD_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE}  # float, int, image: the ones that need no second allocation

Mode = Literal["jpg", "raw", "proportion"]
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP")
EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
CHUNK_BYTES = 1 << 26
MANIFEST_FORMAT = "cossl beton manifest 1"


def manifest_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")
