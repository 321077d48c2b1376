"""Stock ffcv as its users write it for several views: one decoder per view. The benchmark's peer; nothing is trained with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cossl.pipelines.ffcv_loader import require_ffcv


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
