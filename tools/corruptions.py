"""Accuracy under the corruptions of ImageNet-C: made on the fly, or read from the published JPEGs.

What a command needs of it:

- `evaluate_corruptions(predict, pictures, names, severities, seed, device, frost=())`: corruptions of `cossl.pipelines.corruptions` on
  any set. `predict` takes normalized pictures [b 3 s s] on the device and returns logits [b classes]; `pictures` is a Loader, or batches as
  `cossl.tools.opened.pictures` yields them. Read once: all corruptions of a batch are made while it is there.
- `evaluate_imagenet_c(predict, root, px, class_names, device)`: the published set below `root`; of its classes those count that the head
  knows, by the names of their folders.
- Both return the same: `severities`, `clean_top1` (percent; None for the published set), `top1` {corruption: [percent at each severity, or
  None where it is missing]}, `mean_top1`, `mean_top1_over` (how many numbers that is the mean of), `mean_corruption_error` (percent, or
  None) with `mean_corruption_error_over`, `missing` {corruption: why}, `pictures`. All of it goes into JSON as it is.
- `corruption_table(result)`: {"columns", "rows"}. `draw_corruptions({run: result}, path)`: the figure, ImportError without matplotlib.
- `mean_corruption_error({corruption: [error at severities 1 to 5, of 1]})`: percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cossl.pipelines.augment import normalize
from cossl.pipelines.batch import Loader
from cossl.pipelines.corruptions import CORRUPTIONS, NAMES, SEVERITIES, Frost, corrupt
from cossl.tools.opened import Pictures
from cossl.tools.opened import pictures as batches_of

Predict = Callable[[Tensor], Tensor]

ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Of all 1000 classes of ImageNet, the mean of five severities: what a corruption error is the ratio to (mmpretrain's CorruptionError)."""

NO_FROST = "needs photographs of frost: give --frost-dir"


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """Percent: the mean over the corruptions of (mean error at the five severities) / (AlexNet's). Each error is a share of 1.

    Trap: it is comparable with published numbers only for all 15 corruptions and all 1000 classes, since AlexNet's are of those. ValueError
    for none, for a corruption that AlexNet has no error of, and for other than five severities.
    """
    if not errors:
        raise ValueError("no corruption was measured at all five severities: there is no mean corruption error")
    for name, of in errors.items():
        if name not in ALEXNET_ERROR or len(of) != len(SEVERITIES):
            raise ValueError(f"{name} at {len(of)} severities: expected all five, of one of {', '.join(ALEXNET_ERROR)}")
    return 100 * sum(sum(of) / len(of) / ALEXNET_ERROR[name] for name, of in errors.items()) / len(errors)


def summary(
    top1: dict[str, list[float | None]], severities: Sequence[int], clean: float | None, missing: dict[str, str], pictures: int
) -> dict[str, Any]:
    """The result of either evaluation, with its means over what is there."""
    counted = [value for name, of in top1.items() if name in NAMES for value in of if value is not None]
    whole = {name: [1 - value / 100 for value in of if value is not None] for name, of in top1.items() if name in ALEXNET_ERROR}
    whole = {name: errors for name, errors in whole.items() if len(errors) == len(SEVERITIES)}
    return {
        "severities": list(severities),
        "clean_top1": clean,
        "top1": top1,
        "mean_top1": sum(counted) / len(counted) if counted else None,
        "mean_top1_over": len(counted),
        "mean_corruption_error": mean_corruption_error(whole) if whole else None,
        "mean_corruption_error_over": len(whole),
        "missing": missing,
        "pictures": pictures,
    }


@torch.inference_mode()
def evaluate_corruptions(
    predict: Predict,
    pictures: Loader | Iterable[Pictures],
    names: Sequence[str],
    severities: Sequence[int],
    seed: int,
    device: torch.device,
    frost: Frost = (),
) -> dict[str, Any]:
    """Percent of pictures classified right, clean and under each corruption at each severity; what comes back is told above.

    Frost without photographs is left out and named in `missing`. ValueError for other names and severities, and for no pictures.
    """
    if unknown := [name for name in names if name not in CORRUPTIONS]:
        raise ValueError(f"corruption {unknown[0]}: expected some of {', '.join(CORRUPTIONS)}")
    if not severities or not set(severities) <= set(SEVERITIES):
        raise ValueError(f"severities {', '.join(map(str, severities))}: expected some of 1 2 3 4 5")
    missing = {"frost": NO_FROST} if "frost" in names and not frost else {}
    made = [name for name in names if name not in missing]
    hits = torch.zeros(1 + len(made) * len(severities), dtype=torch.int64, device=device)
    batches = pictures if isinstance(pictures, Iterable) else batches_of(pictures, device, "corruptions")
    seen = 0
    for images, normalized, labels in batches:
        index = torch.arange(seen, seen + len(images), device=device)
        hits[0] += (predict(normalized).argmax(1) == labels).sum()
        for i, (name, severity) in enumerate((name, severity) for name in made for severity in severities):
            corrupted = normalize(corrupt(images, index, name, severity, seed, frost))
            hits[1 + i] += (predict(corrupted).argmax(1) == labels).sum()
        seen += len(images)
    if not seen:
        raise ValueError("there are no pictures to be corrupted")
    clean, *rest = (100 * hits / seen).tolist()
    top1: dict[str, list[float | None]] = {name: [None] * len(severities) for name in names}
    for i, name in enumerate(made):
        top1[name] = rest[i * len(severities) : (i + 1) * len(severities)]
    return summary(top1, severities, clean, missing, seen)


def corruption_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """Top-1 in percent, a row for each corruption and one for the mean; what is missing is called so."""
    columns = ["corruption", "family", *(f"severity {s}" for s in result["severities"]), "mean", "over AlexNet's error"]
    rows: list[list[Any]] = []
    for name, of in result["top1"].items():
        found = [value for value in of if value is not None]
        whole = name in ALEXNET_ERROR and len(found) == len(SEVERITIES)
        ratio = mean_corruption_error({name: [1 - value / 100 for value in found]}) if whole else None
        mean = sum(found) / len(found) if found else None
        rows.append([name, CORRUPTIONS[name].family, *(_shown(value) for value in of), _shown(mean), _shown(ratio)])
    over = f"mean of {result['mean_top1_over']} numbers"
    ratio = _shown(result["mean_corruption_error"]), f"{result['mean_corruption_error_over']} of {len(NAMES)}"
    rows.append([over, "", *("" for _ in result["severities"]), _shown(result["mean_top1"]), f"{ratio[0]} ({ratio[1]})"])
    return {"columns": columns, "rows": rows}


def _shown(value: float | None) -> float | str:
    return "missing" if value is None else round(value, 2)
