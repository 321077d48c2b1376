"""Stock ffcv, the benchmark's peer and the tests' second opinion: nothing is trained with it. The only file that imports ffcv."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

INSTALL_FFCV = "sudo apt-get install pkg-config libturbojpeg0-dev libopencv-dev && pip install -c constraints.txt -e '.[ffcv]'"


class FfcvMissing(ImportError):
    """ffcv cannot be imported; the message holds the line that installs it."""


class _ReadOnly:
    """A scalar type of numba's, subscripted as such: gives the array type, read-only."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __getitem__(self, axes: slice) -> Any:
        return self.kind[axes].copy(readonly=True)


def require_ffcv() -> Any:
    """The ffcv module. Raises FfcvMissing with the one line that installs it.

    Importing ffcv sets torch to one thread for the whole process; the count is put back here. ffcv also keeps two names in a numba typed
    Dict that only plain Python reads; compiling that dict is most of the import (4.5 of 6 s of CPU), so it gets an ordinary one instead.

    Trap that this avoids: ffcv's page cache assigns `mutable = False` to `uint8[::1]`, of which numba has a single instance, and so
    changes the hash of every signature already compiled with it: the next compilation in the process ends in a KeyError. Here ffcv
    gets the read-only type, which is an instance of its own.
    """
    import numba
    import numba.typed

    threads, typed_dict = torch.get_num_threads(), numba.typed.Dict
    try:
        with warnings.catch_warnings():
            # ffcv 1.0.2 imports distutils (gone in Python 3.12) and has invalid escapes in docstrings; neither touches its results.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", SyntaxWarning)
            numba.typed.Dict = dict
            import ffcv
        ffcv.memory_managers.os_cache.nb = SimpleNamespace(uint8=_ReadOnly(numba.uint8), uint64=numba.uint64, types=numba.types)
    except ImportError as error:
        raise FfcvMissing(f"ffcv is not installed ({error}); install it with: {INSTALL_FFCV}") from error
    finally:
        numba.typed.Dict = typed_dict
        torch.set_num_threads(threads)
    return ffcv


Decode = Callable[[NDArray[np.uint8], int, int, NDArray[np.uint8]], bool]


def decode_function() -> Decode:
    """decode(payload, height, width, out) -> True when the JPEG decoded cleanly into out, C-contiguous uint8 [height, width, 3].

    libffcv's imdecode: TurboJPEG with the fast DCT, a few grey levels from Pillow's slow one. False for a damaged payload *and* for one
    that libjpeg only warns about (out is then filled as far as it came). ctypes drops the GIL for the call: threads decode in parallel.
    Trap: TurboJPEG handles live as long as the process, one per thread that ever decoded: use a fixed pool of threads.
    """
    require_ffcv()
    from ffcv.libffcv import ctypes_imdecode

    def decode(payload: NDArray[np.uint8], height: int, width: int, out: NDArray[np.uint8]) -> bool:
        # The C code writes height * width * 3 bytes at out, whatever out is.
        if out.nbytes < height * width * 3 or not out.flags.c_contiguous or not payload.flags.c_contiguous:
            raise ValueError(f"decode needs C-contiguous arrays and {height * width * 3} bytes of room, got {out.nbytes}")
        source, target = payload.ctypes.data, out.ctypes.data
        status: int = ctypes_imdecode(source, payload.size, height, width, target, height, width, 0, 0, 1, 1, False, False)
        return status == 0

    return decode


def stock_ffcv(
    path: Path, batch_size: int, workers: int, sizes: Sequence[int], scales: Sequence[tuple[float, float]]
) -> Iterable[tuple[Any, ...]]:
    """ffcv's own Loader over a beton; each iteration is an epoch of tuples: view 0 uint8 [b 3 s s], label, the other views.

    The first output of the field `image` and a PipelineSpec for each further one, as ffcv documents it; every output decodes the JPEG
    again, cuts with cv::INTER_AREA and draws its own crops. Random order, page cache, the last incomplete batch dropped.
    Traps: the first iteration compiles for 6 to 17 s; an epoch that is not iterated to its end leaves a thread, which may abort the
    interpreter at exit; batches alias five buffers; torch's thread count becomes `workers`.
    """
    ffcv = require_ffcv()
    decoder, transforms = ffcv.fields.rgb_image.RandomResizedCropRGBImageDecoder, ffcv.transforms

    def operations(view: int) -> tuple[Any, list[Any]]:
        crop = decoder((sizes[view], sizes[view]), scale=scales[view])
        return crop, [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.ToTorchImage()]

    first, rest = operations(0)
    pipelines: dict[str, Any] = {"image": [first, *rest]}
    for view in range(1, len(sizes)):
        crop, rest = operations(view)
        pipelines[f"image_{view}"] = ffcv.pipeline.pipeline_spec.PipelineSpec("image", decoder=crop, transforms=rest)
    order = ffcv.loader.OrderOption.RANDOM
    loader: Iterable[tuple[Any, ...]] = ffcv.loader.Loader(
        str(path), batch_size=batch_size, num_workers=workers, order=order, os_cache=True, drop_last=True, pipelines=pipelines
    )
    return loader
