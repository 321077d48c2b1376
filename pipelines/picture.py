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


def draw_curves(metrics: Path, path: Path) -> None:
    """Writes a PNG of every loss term, the spread and the learning rate over the epochs, from the lines of metrics.jsonl."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: matplotlib is missing, pip install -c constraints.txt -e '.[log]'")
        return
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [k for k in ("loss", "global", "local_to_global", "global_to_local") if k in records[0]]
    panels = [losses, ["std"], ["lr"]]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, names in zip(figure.subplots(1, 3), panels, strict=True):
        for name in names:
            axes.plot([r["epoch"] for r in records], [r[name] for r in records], label=name)
        axes.set_xlabel("epoch")
        axes.legend()
    figure.savefig(path, dpi=110)
