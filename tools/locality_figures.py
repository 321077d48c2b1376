"""The figures of `cossl locality`, of one run or of several side by side. matplotlib is imported only to draw them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from cossl.models.locality import field_box
from cossl.models.rf_resnet import PositionGrid
from cossl.pipelines.figure import plain, save_figure

Results = dict[str, dict[str, Any]]
"""{run: result}."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, told apart by the colour-blind too; with the markers, 56 different looks."""
MARKERS = "osD^vPX*"
IN_A_ROW = 8
TILE_IN, LABEL_IN, GAP_IN, BAND_IN = 1.15, 1.25, 0.06, 0.12
WORDS_IN = 6.8
"""Width of the longest line at the foot of the sheet."""
NETWORKS = ("trained", "untrained")


def draw_similarity(path: Path, results: Results, pictures: UInt8[Tensor, "b 3 s s"]) -> None:
    """Writes a PNG: pictures, and below each the cosines of its positions, a row for every run and space, in the colours of the space.

    Outlined is the receptive field, and dotted the centre, of the position most like the global vector; on the picture itself those of the
    first row below it.
    The number is the mean of the picture's positions. ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    rows = [(run, space, found) for run, result in results.items() for space, found in result["spaces"].items()]
    columns, bands = min(IN_A_ROW, len(pictures)), -(-len(pictures) // IN_A_ROW)
    names = list(dict.fromkeys(space for _, space, _ in rows))
    line, foot = TILE_IN + GAP_IN, 0.6 + 0.2 * len(names)
    width, height = max(WORDS_IN, LABEL_IN + columns * line), GAP_IN + bands * ((1 + len(rows)) * line + BAND_IN) + foot
    figure = Figure(figsize=(width, height))

    def tile(band: int, row: int, column: int) -> Any:
        top = GAP_IN + band * ((1 + len(rows)) * line + BAND_IN) + row * line
        left = (LABEL_IN + column * line) / width
        return figure.add_axes((left, 1 - (top + TILE_IN) / height, TILE_IN / width, TILE_IN / height))

    limits = {space: _limits([found for _, name, found in rows if name == space]) for space in names}
    for i, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        band, column = divmod(i, IN_A_ROW)
        axes = tile(band, 0, column)
        axes.imshow(picture, extent=(0, 1, 1, 0))
        _outline(axes, rows[0][2], i)
        _bare(axes, "picture" if column == 0 else "")
        for row, (run, space, found) in enumerate(rows, 1):
            axes = tile(band, row, column)
            _draw_map(axes, picture, found, i, limits[space])
            _bare(axes, (f"{plain(run)}\n" if len(results) > 1 else "") + space if column == 0 else "")
    _similarity_foot(figure, {space: next(found for _, name, found in rows if name == space) for space in names}, limits, foot)
    save_figure(figure, path)


def _limits(spaces: list[dict[str, Any]]) -> tuple[float, float]:
    """Of the colours, for all but the outermost hundredth of the cosines on either side."""
    low, high = np.percentile(np.concatenate([np.ravel(found["maps"]) for found in spaces]), (1, 99))
    return float(low), float(max(high, low + 1e-3))


def _draw_map(axes: Any, picture: np.ndarray, found: dict[str, Any], i: int, limits: tuple[float, float]) -> None:
    from matplotlib.patheffects import withStroke

    grid, cosines = PositionGrid(**found["grid"]), np.array(found["maps"][i])
    axes.imshow(picture @ np.array([0.299, 0.587, 0.114]), cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
    start = (grid.offset_px - grid.stride_px / 2) / grid.view_px
    end = start + grid.size * grid.stride_px / grid.view_px
    square = cosines.reshape(grid.size, grid.size)
    axes.imshow(
        square, cmap="cividis", vmin=limits[0], vmax=limits[1], extent=(start, end, end, start), alpha=0.65, interpolation="nearest"
    )
    _outline(axes, found, i)
    axes.set(xlim=(0, 1), ylim=(1, 0))
    text = axes.text(0.05, 0.95, f"{cosines.mean():.2f}", fontsize=9, color="white", va="bottom")
    text.set_path_effects([withStroke(linewidth=2, foreground="black")])


def _outline(axes: Any, found: dict[str, Any], i: int) -> None:
    """The receptive field of the position most like the global vector, as far as it lies in the view."""
    from matplotlib.patches import Rectangle

    grid = PositionGrid(**found["grid"])
    row, column = divmod(int(np.argmax(found["maps"][i])), grid.size)
    (top, bottom), (left, right) = field_box(grid, row), field_box(grid, column)
    for colour, line in (("black", 2.4), ("white", 1.2)):
        corner, wide, high = (left / grid.view_px, top / grid.view_px), (right - left) / grid.view_px, (bottom - top) / grid.view_px
        axes.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=colour, linewidth=line))
        at = [(grid.offset_px + place * grid.stride_px) / grid.view_px for place in (column, row)]
        axes.plot(*at, "o", color=colour, markersize=1.5 * line)


def _bare(axes: Any, label: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center", labelpad=6)


def _similarity_foot(figure: Any, spaces: dict[str, dict[str, Any]], limits: dict[str, tuple[float, float]], foot_in: float) -> None:
    """A colour bar for each space, and what is compared there."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width, height = figure.get_size_inches()
    each = (width - LABEL_IN) / len(spaces)
    for i, (space, found) in enumerate(spaces.items()):
        axes = figure.add_axes(((LABEL_IN + i * each) / width, (foot_in - 0.25) / height, 0.82 * each / width, 0.12 / height))
        figure.colorbar(ScalarMappable(Normalize(*limits[space]), "cividis"), cax=axes, orientation="horizontal")
        axes.tick_params(labelsize=9)
        axes.locator_params(nbins=4)
        axes.set_title(f"cosine, {space}", fontsize=9, pad=2)
        words = f"{space}: {found['what']}"
        figure.text(0.1 / width, (foot_in - 0.62 - 0.2 * i) / height, words, fontsize=9, va="center")


def draw_redundancy(path: Path, results: Results) -> None:
    """Writes a PNG: mean cosine and effective rank of the positions of one picture and of different pictures. ImportError as above."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(space for result in results.values() for space in result["spaces"]))
    lines = 2 * len(results)
    figure = Figure(figsize=(9, len(names) * (0.3 * lines + 1.0) + 0.5), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False)
    for (left, right), space in zip(panels, names, strict=True):
        rows = [
            (_row_name(run, which, results), result["spaces"][space][which])
            for run, result in results.items()
            for which in NETWORKS
            if space in result["spaces"]
        ]
        _pairs(left, rows, ("cosine_within", "cosine_across"), "cosine_within_spread")
        _pairs(right, rows, ("rank_within", "rank_mixed"), "rank_within_spread")
        left.set_xlabel(f"mean pairwise cosine, {space}")
        most = [min(row["positions"], row["width"]) for _, row in rows]
        right.set_xlabel(f"effective rank of a picture's positions, {space} (at most {' or '.join(map(str, dict.fromkeys(most)))})")
        right.set_yticklabels([])
        right.set_xlim(left=0)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path)


def _row_name(run: str, which: str, results: Results) -> str:
    return which if len(results) == 1 else plain(run) if which == "trained" else "  untrained"


def _pairs(axes: Any, rows: list[tuple[str, dict[str, Any]]], keys: tuple[str, str], spread: str) -> None:
    """A line for each network, from its value in a picture to that across pictures."""
    for y, (_, row) in enumerate(rows):
        within, across = (float("nan") if row[key] is None else row[key] for key in keys)
        axes.plot([within, across], [y, y], "-", color="0.8", linewidth=2, zorder=1)
        words = ("in a picture (bar: deviation over pictures)", "positions of different pictures") if y == 0 else (None, None)
        axes.errorbar(within, y, xerr=row[spread], fmt="o", color=COLOURS[0], capsize=3, markersize=7, label=words[0])
        axes.plot(across, y, "D", color=COLOURS[1], markersize=7, markerfacecolor="white", markeredgewidth=1.5, label=words[1])
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def draw_positions(path: Path, results: Results) -> None:
    """Writes a PNG: top-1 of the linear probe and of 20-NN against the number of positions that are averaged. ImportError as above."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(space for result in results.values() for space in result["spaces"]))
    figure = Figure(figsize=(9, 3.3 * len(names) + 0.4), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False)
    for axes_of, space in zip(panels, names, strict=True):
        for axes, (key, probe) in zip(axes_of, {"linear_top1": "linear", "knn_top1": "20-NN"}.items(), strict=True):
            ticks: set[int] = set()
            for i, (run, result) in enumerate(results.items()):
                if space in result["spaces"]:
                    _accuracy_line(axes, result["counts"], result["spaces"][space][key], plain(run), i)
                    ticks |= set(result["counts"])
            axes.set_xscale("log", base=2)
            axes.set_xticks([k for k in sorted(ticks) if k == max(ticks) or k * 1.4 < max(ticks)])
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            where = {"map": "mean of k positions", "mlp": "the MLP's output for it"}[space]
            axes.set(xlabel="positions k", ylabel=f"{probe} top-1, percent", title=f"{space}: {where}")
            axes.grid(color="0.9")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, min(4, len(handles))), frameon=False, fontsize=9)
    save_figure(figure, path)


def _accuracy_line(axes: Any, counts: list[int], tops: list[list[float]], label: str, which: int) -> None:
    means = [float(np.mean(draws)) for draws in tops]
    spreads = [float(np.std(draws, ddof=1)) if len(draws) > 1 else 0.0 for draws in tops]
    colour = COLOURS[which % len(COLOURS)]
    words = f"{label} (bar: deviation over {len(tops[0])} draws of positions)" if len(tops[0]) > 1 else label
    axes.errorbar(
        counts, means, spreads, color=colour, marker=MARKERS[which % len(MARKERS)], capsize=3, label=words if which == 0 else label
    )


def draw_fields(path: Path, results: Results) -> None:
    """Writes a PNG: the gradient of the central position, trained and untrained, and its energy by the side of a square around it.

    ImportError without matplotlib.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    count = len(results)
    figure = Figure(figsize=(2.6 * count + 5.6, 5.4), layout="constrained")
    spec = figure.add_gridspec(2, count + 1, width_ratios=[1] * count + [1.6])
    maps: list[Any] = []
    for column, (run, result) in enumerate(results.items()):
        for row, which in enumerate(NETWORKS):
            axes = figure.add_subplot(spec[row, column])
            gradient = result["energies"][which].double().sqrt().numpy()
            relative = np.ma.masked_equal(gradient / gradient.max(), 0)
            axes.imshow(relative, cmap="inferno", norm=LogNorm(1e-3, 1), extent=(0, len(gradient), len(gradient), 0))
            axes.set_facecolor("black")
            _squares(axes, result, which)
            axes.set_title(f"{plain(run)}\n{which}" if row == 0 else which, fontsize=10)
            axes.tick_params(labelsize=9)
            maps.append(axes)
    figure.colorbar(maps[0].images[0], ax=maps, shrink=0.7, label="root mean square gradient, share of the largest", extend="min")
    curves = figure.add_subplot(spec[:, count])
    _energy_curves(curves, results)
    save_figure(figure, path)


def _squares(axes: Any, result: dict[str, Any], which: str) -> None:
    from matplotlib.patches import Rectangle

    (first, last), grid = result["box"], PositionGrid(**result["grid"])
    axes.add_patch(Rectangle((first, first), last - first, last - first, fill=False, edgecolor=COLOURS[5], linewidth=1.8, clip_on=False))
    side = result[which]["side95_px"]
    corner = grid.offset_px + result["position"] * grid.stride_px - side / 2
    margin = 0.1 * (last - first)
    shown = max(0, first - margin), min(grid.view_px, last + margin)
    axes.set(xlim=shown, ylim=shown[::-1])
    axes.add_patch(Rectangle((corner, corner), side, side, fill=False, edgecolor="white", linewidth=1.5, linestyle=(0, (3, 2))))


def _energy_curves(axes: Any, results: Results) -> None:
    """The share of the energy in squares around the position's centre, a line for each network."""
    from matplotlib.lines import Line2D

    for i, (run, result) in enumerate(results.items()):
        colour = COLOURS[i % len(COLOURS)]
        for which, style in zip(NETWORKS, ("-", ":"), strict=True):
            found = result[which]
            label = f"{plain(run)}, {which}: {found['side95_px']:g} px"
            axes.plot(found["sides_px"], found["shares"], style, color=colour, label=label)
        axes.axvline(result["grid"]["receptive_field_px"], color=colour, linewidth=0.9, linestyle="--", alpha=0.7)
    axes.axhline(0.95, color="0.6", linewidth=0.8)
    wide = max(min(r["grid"]["receptive_field_px"], r["grid"]["view_px"]) for r in results.values())
    axes.set(xlabel="side of the square, px", ylabel="share of the squared gradient in it", xlim=(0, 1.15 * wide), ylim=(0, 1.02))
    handles, _ = axes.get_legend_handles_labels()
    handles += [
        Line2D([], [], color="0.3", linewidth=0.9, linestyle="--", label="theoretical receptive field"),
        Line2D([], [], color=COLOURS[5], linewidth=1.8, label="the same on the maps, px of the view"),
        Line2D([], [], color="0.6", linestyle=(0, (3, 2)), label="square of 95 % on the maps (white)"),
    ]
    axes.legend(handles=handles, loc="lower right", fontsize=9)
    axes.grid(color="0.92")


FIGURES: dict[str, Callable[[Path, Results], None]] = {
    "redundancy": draw_redundancy,
    "positions": draw_positions,
    "receptive-field": draw_fields,
}
