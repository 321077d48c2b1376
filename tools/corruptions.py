"""Accuracy under the corruptions of ImageNet-C: made on the fly, or read from the published JPEGs.

What a command needs of it:

- `evaluate_corruptions(predict, pictures, names, severities, seed, device, frost=())`: corruptions of `cossl.pipelines.corruptions` on
  any set. `predict` takes normalized pictures [b 3 s s] on the device and returns logits [b classes]; `pictures` is a Loader, or batches as
  `cossl.tools.opened.pictures` yields them: of some pictures of a set add a fourth, their index in it, which their random numbers go by.
  Read once: all corruptions of a batch are made while it is there.
- `evaluate_imagenet_c(predict, root, px, class_names, device)`: the published set below `root`, as it is or resized to px; of its classes
  those count that the head knows, by the names of their folders.
- Both return the same: `severities`, `clean_top1` (percent; None for the published set), `top1` {corruption: [percent at each severity, or
  None where it is missing]}, `mean_top1`, `mean_top1_over` (how many numbers that is the mean of), `mean_corruption_error` (percent; None
  for other than the 1000 classes of ImageNet) with `mean_corruption_error_over`, `missing` {corruption: why}, `pictures`, `classes` that
  the head tells apart. All of it goes into JSON as it is.
- `corruption_table(result)`: {"columns", "rows"}. `draw_corruptions({run: result}, path)`: the figure, ImportError without matplotlib.
- `mean_corruption_error({corruption: [error at severities 1 to 5, of 1]})`: percent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from cossl.pipelines.augment import normalize
from cossl.pipelines.batch import Loader
from cossl.pipelines.corruption_weather import Frost
from cossl.pipelines.corruptions import CORRUPTIONS, FAMILIES, NAMES, SEVERITIES, corrupt
from cossl.pipelines.figure import plain, save_figure
from cossl.pipelines.imagenet_c import Published
from cossl.tools.opened import pictures as batches_of
from cossl.train import EVAL_BATCH


class Predict(Protocol):
    """Logits [b classes] of normalized pictures [b 3 s s]."""

    def __call__(self, normalized: Tensor, /) -> Tensor: ...


Batches = Iterable[tuple[Tensor, ...]]
"""(pictures uint8, the same normalized, labels), and where the pictures are some of a set their index in it as well."""

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
"""Of all classes of ImageNet, the mean of five severities: what a corruption error is the ratio to (mmpretrain's CorruptionError)."""
ALEXNET_CLASSES = 1000
"""Of other classes there is no corruption error: ten are easier to tell apart than a thousand, for AlexNet too."""

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
    top1: dict[str, list[float | None]],
    severities: Sequence[int],
    clean: float | None,
    missing: dict[str, str],
    pictures: int,
    classes: int,
) -> dict[str, Any]:
    """The result of either evaluation, with its means over what is there; `classes` that the head tells apart and the pictures are of."""
    counted = [value for name, of in top1.items() if name in NAMES for value in of if value is not None]
    whole = {name: [1 - value / 100 for value in of if value is not None] for name, of in top1.items() if name in ALEXNET_ERROR}
    comparable = sorted(severities) == list(SEVERITIES) and classes == ALEXNET_CLASSES
    whole = {name: errors for name, errors in whole.items() if comparable and len(errors) == len(SEVERITIES)}
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
        "classes": classes,
    }


@torch.inference_mode()
def evaluate_corruptions(
    predict: Predict,
    pictures: Loader | Batches,
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
    batches: Batches = pictures if isinstance(pictures, Iterable) else batches_of(pictures, device, "corruptions")
    seen = classes = 0
    for images, normalized, labels, *indexed in batches:
        index = indexed[0].cpu() if indexed else torch.arange(seen, seen + len(images))
        logits = predict(normalized)
        classes = logits.shape[1]
        hits[0] += (logits.argmax(1) == labels).sum()
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
    return summary(top1, severities, clean, missing, seen, classes)


@torch.inference_mode()
def evaluate_imagenet_c(
    predict: Predict, root: Path, px: int, class_names: Sequence[str], device: torch.device, batch_size: int = EVAL_BATCH
) -> dict[str, Any]:
    """The same of the published pictures: with px 0 as they are, all of 224 x 224, else each resized whole to px x px.

    `class_names` are the head's, in the order of its logits: names of class folders (wnid). Pictures of other classes are passed over.
    Beside the common fields: `classes_found`, how many of the head's, of how many `class_folders`, and `pictures_each` {corruption: [at
    each severity]}. There is no mean corruption error unless all the head's are found.
    What is not there, or not whole, is named in `missing`. ValueError for none, for classes of which none is known, for damage, and with
    px 0 for pictures of another size than the published ones.
    """
    published = Published(root, class_names)
    numbers = {name: i for i, name in enumerate(CORRUPTIONS)}
    hits, seen = (torch.zeros(len(numbers), len(SEVERITIES), dtype=torch.int64, device=device) for _ in range(2))
    with tqdm(desc="ImageNet-C", unit="pictures", disable=not sys.stderr.isatty(), leave=False) as bar:
        for batch in published.batches(batch_size, px):
            right = predict(normalize(batch.images.to(device))).argmax(1) == batch.label.to(device)
            at = torch.tensor([[numbers[name] for name in batch.corruption], [s - 1 for s in batch.severity]], device=device)
            hits.index_put_((at[0], at[1]), right.long(), accumulate=True)
            seen.index_put_((at[0], at[1]), torch.ones_like(right, dtype=torch.int64), accumulate=True)
            bar.update(len(right))
    if not seen.any():
        known = f"the head knows {', '.join(list(class_names)[:3])}, ..."
        others = f"found are {', '.join(sorted(published.class_folders)[:3]) or 'none'}"
        raise ValueError(f"{root} has no picture of a class that the head knows: {known}; {others}")
    each = {name: seen[i].tolist() for name, i in numbers.items() if name in NAMES or seen[i].any()}
    of = {name: hits[numbers[name]].tolist() for name in each}
    top1 = {name: [100 * h / n if n else None for h, n in zip(of[name], each[name], strict=True)] for name in each}
    folders = published.class_folders
    found = {"classes_found": len(folders & set(class_names)), "class_folders": len(folders)}
    classes = len(class_names) if found["classes_found"] == len(class_names) else 0
    result = summary(top1, SEVERITIES, None, _gaps(each), int(seen.sum()), classes)
    return result | {"classes": len(class_names), **found, "pictures_each": each}


def _gaps(each: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """What is missing of a set that has the same number of pictures at every severity of every corruption."""
    most = max(count for counts in each.values() for count in counts)
    gaps = {}
    for name, counts in each.items():
        absent = [str(s) for s, count in zip(SEVERITIES, counts, strict=True) if not count]
        partial = [
            f"severity {s} has {count:,} of {most:,} pictures" for s, count in zip(SEVERITIES, counts, strict=True) if 0 < count < most
        ]
        if absent or partial:
            gaps[name] = "; ".join([*([f"no pictures at severity {' '.join(absent)}"] if absent else []), *partial])
    return gaps


def corruption_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """Top-1 in percent, a row for each corruption and one for the mean; what is missing is called so. CE only where there is one."""
    over = result["mean_corruption_error_over"]
    columns = ["corruption", "family", *(f"severity {s}" for s in result["severities"]), "mean", *(["CE, percent"] if over else [])]
    rows: list[list[Any]] = []
    for name, of in result["top1"].items():
        found = [value for value in of if value is not None]
        whole = name in ALEXNET_ERROR and len(found) == len(SEVERITIES)
        ratio = mean_corruption_error({name: [1 - value / 100 for value in found]}) if whole else None
        mean = sum(found) / len(found) if found else None
        rows.append([name, CORRUPTIONS[name].family, *map(_shown, of), _shown(mean), *([_shown(ratio)] if over else [])])
    what = f"mean of {result['mean_top1_over']} numbers" + (f", of mCE {over} of {len(NAMES)}" if over else "")
    last = [_shown(result["mean_top1"]), *([_shown(result["mean_corruption_error"])] if over else [])]
    rows.append([what, "", *("" for _ in result["severities"]), *last])
    return {"columns": columns, "rows": rows}


def _shown(value: float | None) -> float | str:
    return "missing" if value is None else round(value, 2)


# --------------------------------------------------------------------------------------------------------------- figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, told apart by the colour-blind too."""
MARKERS = "osD^vPX*"


def draw_corruptions(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG: a panel for each family with the mean top-1 of its corruptions against the severity, a line for each run.

    Severity 0 is the clean picture. A panel's mean is over the corruptions that all runs have whole; it names them. ImportError without
    matplotlib; ValueError where the runs have no corruption in common.
    """
    from matplotlib.figure import Figure

    names = {family: _common(results, family) for family in (*FAMILIES, "extra")}
    names = {family: found for family, found in names.items() if found}
    if not names:
        raise ValueError("there is no corruption that every run has at all of its severities: nothing to draw")
    columns = 3 if len(names) > 4 else min(2, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, 3.4 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for empty in panels[len(names) :]:
        empty.remove()
    for axes, (family, found) in zip(panels, names.items(), strict=False):
        for which, (run, result) in enumerate(results.items()):
            means = [sum(at) / len(at) for at in zip(*(result["top1"][name] for name in found), strict=True)]
            clean = [] if result["clean_top1"] is None else [(0, result["clean_top1"])]
            look = {"marker": MARKERS[which % len(MARKERS)], "color": COLOURS[which % len(COLOURS)]}
            axes.plot(*zip(*clean, *zip(result["severities"], means, strict=True), strict=True), label=plain(run), **look)
        axes.set_title(family, fontsize=11, pad=30)  # room for two lines of names
        axes.text(0.5, 1.02, _wrapped(found), transform=axes.transAxes, ha="center", va="bottom", fontsize=9, color="0.35")
        axes.set(xlabel="severity", ylabel="top-1, percent" if axes in panels[::columns] else "")
        axes.set_xticks(sorted({0, *(s for result in results.values() for s in result["severities"])}))
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)
    save_figure(figure, path)


def _common(results: Mapping[str, Mapping[str, Any]], family: str) -> list[str]:
    """Corruptions of a family that every run has at all its severities."""
    of_family = [name for name, corruption in CORRUPTIONS.items() if corruption.family == family]
    return [name for name in of_family if all(None not in result["top1"].get(name, [None]) for result in results.values())]


def _wrapped(names: Sequence[str]) -> str:
    """In two lines."""
    words = [name.replace("_noise", "").replace("_blur", "").replace("_", " ") for name in names]
    half = -(-len(words) // 2)
    return ", ".join(words[:half]) + (",\n" + ", ".join(words[half:]) if words[half:] else "")
