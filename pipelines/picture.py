"""Pictures of a run: a batch as the network sees it, and the curves of its metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cossl.pipelines.augment import IMAGENET_MEAN, IMAGENET_STD, augment
from cossl.pipelines.batch import Batch
from cossl.pipelines.figure import save_figure
from cossl.pipelines.positions import PositionSpec, source_points

TILE_PX, GAP_PX, ROWS, FIELDS_SHOWN = 256, 8, 4, 3
COLOURS = ("#ffd21f", "#27c4ff")  # view 1, view 2


def _pixels(view: Float[Tensor, "3 s s"]) -> UInt8[np.ndarray, "s s 3"]:
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((view.float().cpu().permute(1, 2, 0) * std + mean).clamp(0, 1) * 255).round().byte().numpy()


def _source_tile(
    picture: np.ndarray, boxes: np.ndarray, flips: np.ndarray, positions: np.ndarray, spec: PositionSpec | None
) -> Image.Image:
    image = Image.fromarray(picture)
    scale = TILE_PX / max(image.size)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    tile = Image.new("RGB", (TILE_PX, TILE_PX), "white")
    tile.paste(image.resize((width, height), Image.Resampling.BILINEAR))
    draw = ImageDraw.Draw(tile)
    for v, colour in zip(range(len(boxes)), COLOURS, strict=False):
        corners = boxes[v] * (width, height, width, height)
        draw.rectangle((*np.maximum(corners[:2], 0), *np.minimum(corners[2:], (width, height)) - 1), outline=colour, width=3)
        if spec is not None:
            chosen = positions[v][positions[v] >= 0]
            for x, y in source_points(spec, chosen, boxes[v], bool(flips[v])) * (width, height):
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    return tile


def _view_tile(view: Tensor, positions: np.ndarray, spec: PositionSpec | None, colour: str) -> Image.Image:
    tile = Image.fromarray(_pixels(view)).resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(tile)
    if spec is not None:
        scale, half = TILE_PX / spec.view_px, spec.receptive_field_px / 2
        chosen = positions[positions >= 0]
        centres = [
            ((spec.offset_px + spec.stride_px * (p % spec.size)), (spec.offset_px + spec.stride_px * (p // spec.size))) for p in chosen
        ]
        for x, y in centres[:: max(1, len(centres) // FIELDS_SHOWN)][:FIELDS_SHOWN]:
            draw.rectangle([scale * c for c in (x - half, y - half, x + half, y + half)], outline="white")
        for x, y in centres:
            draw.ellipse((scale * x - 3, scale * y - 3, scale * x + 3, scale * y + 3), fill=colour, outline="black")
    draw.rectangle((0, 0, TILE_PX - 1, TILE_PX - 1), outline=colour, width=3)
    return tile


def draw_batch(
    path: Path,
    batch: Batch,
    picture: Callable[[int], UInt8[np.ndarray, "h w 3"]],
    spec: PositionSpec | None,
) -> None:
    """Writes a PNG with a row for each of the first four samples: source, view 1, view 2.

    On the source: each view's box in its colour, and the centres of its sampled positions. On the views, augmented as the
    network gets them: the same positions, and the whole receptive field of some of them as white squares.
    """
    rows = min(ROWS, len(batch.index))
    views = [augment(view[:rows], batch.photometry[:rows, v]) for v, view in enumerate(batch.split())]
    step = TILE_PX + GAP_PX
    sheet = Image.new("RGB", (step * (1 + len(COLOURS)) + GAP_PX, step * rows + GAP_PX), "white")
    boxes, flips, positions = batch.boxes.cpu().numpy(), batch.flips.cpu().numpy(), batch.positions.cpu().numpy()
    for b in range(rows):
        tiles = [_source_tile(picture(int(batch.index[b])), boxes[b], flips[b], positions[b], spec)]
        tiles += [_view_tile(views[v][b], positions[b, v], spec, colour) for v, colour in enumerate(COLOURS)]
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (GAP_PX + step * column, GAP_PX + step * b))
    sheet.save(path)


def draw_side_by_side(path: Path, batches: dict[str, Batch], picture: Callable[[int], UInt8[np.ndarray, "h w 3"]], rows: int) -> None:
    """Writes a PNG with a row for each of the first `rows` samples: the source with the boxes of its views, then each loader's views.

    Every batch must hold the same samples in the same order.
    """
    step, margin = TILE_PX + GAP_PX, 24
    first = next(iter(batches.values()))
    views = len(first.split())
    sheet = Image.new("RGB", (step * (1 + views * len(batches)) + GAP_PX, margin + step * rows), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    boxes, flips = first.boxes.cpu().numpy(), first.flips.cpu().numpy()
    for column, name in enumerate(["source", *(f"{name}, view {v + 1}" for name in batches for v in range(views))]):
        draw.text((GAP_PX + step * column, 2), name, "black", font)
    for b in range(rows):
        tiles = [_source_tile(picture(int(first.index[b])), boxes[b], flips[b], np.empty((views, 0), np.int64), None)]
        for batch in batches.values():
            for v, view in enumerate(batch.split()):
                tile = Image.fromarray(view[b].permute(1, 2, 0).cpu().numpy()).resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST)
                ImageDraw.Draw(tile).rectangle((0, 0, TILE_PX - 1, TILE_PX - 1), outline=COLOURS[v % len(COLOURS)], width=3)
                tiles.append(tile)
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (GAP_PX + step * column, margin + step * b))
    sheet.save(path)


CURVES = {
    "loss": ("loss", "global", "local_to_global", "global_to_local"),
    "top-1, percent": ("knn_top1", "probe_top1"),
    "pictures/s": ("images_per_s",),
    "spread": ("std",),
    "effective rank": ("rank",),
}
LINES_DRAWN = 500


def draw_curves(metrics: Path, path: Path) -> None:
    """Writes a PNG of loss terms, kNN and online probe, throughput, spread and effective rank over the epochs, as far as there are any.

    From the lines of metrics.jsonl, of a long file about 500 and all those with a kNN. A run draws this after every epoch, so whatever goes
    wrong is said in one line and no error. Trap: `images_per_s` of a line is the mean of the run so far, so it
    follows a slow loader late.
    """
    try:
        _draw_curves(metrics, path)
    except ImportError:
        print(f"no {path.name}: matplotlib is missing, pip install -c constraints.txt -e '.[log]'")
    except Exception as error:
        print(f"no {path.name}: {type(error).__name__}: {error}")


def _draw_curves(metrics: Path, path: Path) -> None:
    from matplotlib.figure import Figure

    lines = metrics.read_text().splitlines()
    every = -(-len(lines) // LINES_DRAWN)
    records = [json.loads(line) for i, line in enumerate(lines) if (len(lines) - 1 - i) % every == 0 or '"knn_top1"' in line]
    if not records:
        raise ValueError(f"{metrics} has no lines yet")
    curves = {title: [name for name in names if any(name in r for r in records)] for title, names in CURVES.items()}
    curves = {title: names for title, names in curves.items() if names}
    figure = Figure(figsize=(4 * len(curves), 3.2))
    figure.subplots_adjust(0.25 / len(curves), 0.15, 1 - 0.05 / len(curves), 0.9, 0.3)
    for axes, (title, names) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name in names:
            points = [(r["epoch"], r[name]) for r in records if name in r]
            axes.plot(*zip(*points, strict=True), label=name, marker="." if name == "knn_top1" or len(points) == 1 else None)
        axes.set(title=title, xlabel="epoch")
        if len(names) > 1:
            axes.legend()
    save_figure(figure, path, dpi=100)
