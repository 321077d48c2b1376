"""The figures of `cossl eval`. matplotlib is imported only to draw them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cossl.pipelines.figure import plain, save_figure

NAMED = 40
"""Up to so many classes every row and column has its name, up to NUMBERED every cell its number."""
NUMBERED = 20
POOLED = 100
"""Of more classes than this, neighbours by name are counted together, in so many groups at most: single ones would be dots."""
CONFUSED = 20
COLOURS = "cividis"  # from dark to light for the colour-blind too


def draw_confusion(path: Path, confusion: Int[Tensor, "m m"] | None, names: Sequence[str], most: Sequence[Sequence[Any]]) -> None:
    """Writes a PNG: how often pictures of each class (rows) are taken for each (columns), in percent of the row, and the worst pairs.

    The colour goes with the square root, so that a few percent show. ImportError without matplotlib.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    assert confusion is not None
    m, each = len(names), -(-len(names) // POOLED)
    counts = _pooled(confusion, each)
    shares = (100 * counts / counts.sum(1, keepdim=True)).nan_to_num(0)
    side = min(14.0, max(5.0, 0.5 * m if m <= NUMBERED else 0.24 * m if m <= NAMED else 8.0))
    figure = Figure(figsize=(side + 6.5, side + 0.8), layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=[side, 4.5])
    image = axes.imshow(shares.numpy(), cmap=COLOURS, norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    axes.set(xlabel="said to be", ylabel="is", title=f"{m} classes, percent of each row" + f", {each} a dot" * (each > 1))
    if m <= NAMED:
        shown = [plain(name) for name in names]
        axes.set_xticks(range(m), shown, rotation=90, fontsize=9)
        axes.set_yticks(range(m), shown, fontsize=9)
    else:
        places = range(0, len(shares), 10)
        axes.set_xticks(places, [str(each * at) for at in places], fontsize=9)
        axes.set_yticks(places, [str(each * at) for at in places], fontsize=9)
        axes.set(xlabel="said to be (number of the class, by name)", ylabel="is (number of the class, by name)")
    if m <= NUMBERED:
        for row in range(m):
            for column in range(m):
                share = float(shares[row, column])
                if share >= 0.5:
                    colour = "black" if share > 25 else "white"
                    axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=9, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.7, label="percent")
    _draw_pairs(bars, most[:CONFUSED])
    save_figure(figure, path, dpi=120)


def _pooled(confusion: Int[Tensor, "m m"], each: int) -> Int[Tensor, "g g"]:
    """Counts of groups of so many neighbouring classes."""
    wide = torch.nn.functional.pad(confusion, (0, -len(confusion) % each, 0, -len(confusion) % each))
    return wide.view(len(wide) // each, each, len(wide) // each, each).sum((1, 3))


def _draw_pairs(axes: Any, most: Sequence[Sequence[Any]]) -> None:
    places = range(len(most))
    axes.barh(places, [share for _, _, share in most], color="#0072b2")
    axes.set_yticks(places, [plain(f"{_short(true)} as {_short(said)}") for true, said, _ in most], fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="percent of the class's pictures", title="most often mistaken")
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def draw_map(path: Path, top1: Sequence[Sequence[float]]) -> None:
    """Writes a PNG: top-1 of the probe of each position of the feature map, where it lies. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    values = torch.tensor(top1)
    n = len(values)
    figure = Figure(figsize=(max(4.5, 0.5 * min(n, 24)) + 1.3, max(4.5, 0.5 * min(n, 24))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values.numpy(), cmap=COLOURS, interpolation="nearest")
    middle = float(values.min() + values.max()) / 2
    for row in range(n if n <= 16 else 0):
        for column in range(n):
            value = float(values[row, column])
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color="black" if value > middle else "white")
    axes.set_xticks(range(0, n, max(1, n // 8)))
    axes.set_yticks(range(0, n, max(1, n // 8)))
    axes.set(xlabel="column of the feature map", ylabel="row", title=f"one linear probe a position, mean {float(values.mean()):.1f} %")
    figure.colorbar(image, ax=axes, label="top-1, percent")
    save_figure(figure, path, dpi=120)
