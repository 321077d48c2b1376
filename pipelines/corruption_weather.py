"""The corruptions of `cossl.pipelines.corruptions` that lay something over the picture: snow, frost, fog, spatter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from cossl.pipelines.corruption_blurs import motion, smooth, to_bytes, zoomed
from cossl.pipelines.corruption_draws import Draws
from cossl.pipelines.simd import compiled

Pixels = Float[Tensor, "b 3 s s"]
Frost = Sequence[UInt8[np.ndarray, "h w 3"]]

SNOW = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
"""Mean and deviation of the flakes' noise, its zoom, the threshold of a flake, radius and deviation of its fall, the picture's weight."""

SPATTER = (
    (0.65, 0.3, 4, 0.69, 0.6, False),
    (0.65, 0.3, 3, 0.68, 0.6, False),
    (0.65, 0.3, 2, 0.68, 0.5, False),
    (0.65, 0.3, 1, 0.65, 1.5, True),
    (0.67, 0.4, 1, 0.65, 1.5, True),
)
"""Mean and deviation of the drops' noise, the deviation of its blur, the threshold of a drop, then of water its weight, of mud its blur."""

_WATER, _MUD = (175 / 255, 238 / 255, 238 / 255), (63 / 255, 42 / 255, 20 / 255)


def snow(x: Pixels, how: tuple[float, float, float, float, int, float, float], draws: Draws) -> Pixels:
    """Flakes, that is large noise above a threshold, smeared downwards; laid twice on a whitened picture, once turned by 180 degrees."""
    mean, deviation, zoom, threshold, radius, sigma, ours = how
    size = x.shape[-1]
    flakes = zoomed(mean + deviation * draws.normal(0, 1, size, size), zoom)
    flakes = torch.floor(torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1) * 255) / 255
    flakes = to_bytes(motion(flakes, radius, sigma, draws.few(1, 1, -135, -45)[:, 0]))
    grey = (0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]) * 1.5 + 0.5
    return ours * x + (1 - ours) * torch.maximum(x, grey) + flakes + flakes.flip(2, 3)


def plasma(u: Float[Tensor, "b n n"], decay: float) -> Float[Tensor, "b n n"]:
    """Fractal clouds in [0, 1], by diamonds and squares on a torus; n a power of two, u uniform in [0, 1): the draw of each point.

    Each point is the mean of four known ones around it and a random number; from one size of step to the next half of it, the
    numbers' range, 100 ** 2 at first, falls by decay ** 2.
    """
    step, wobble = u.shape[-1], 100.0
    field = torch.zeros_like(u)
    while step >= 2:
        half, noise = step // 2, wobble**2 * (2 * u - 1)
        corners = field[:, ::step, ::step]
        across = corners + corners.roll(-1, 1)
        centres = (across + across.roll(-1, 2)) / 4 + noise[:, half::step, half::step]
        field[:, half::step, half::step] = centres
        field[:, ::step, half::step] = (centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)) / 4 + noise[:, ::step, half::step]
        field[:, half::step, ::step] = (centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)) / 4 + noise[:, half::step, ::step]
        step, wobble = half, wobble / decay
    field = field - field.amin((1, 2), keepdim=True)
    return field / field.amax((1, 2), keepdim=True)


def fog(x: Pixels, how: tuple[float, float], draws: Draws) -> Pixels:
    """Clouds added, and the whole made darker until its lightest value is at most the picture's own."""
    thickness, decay = how
    size = x.shape[-1]
    side = max(256, 1 << (size - 1).bit_length())
    clouds = plasma(draws.uniform(0, side, side), decay)[:, None, :size, :size]
    lightest = x.amax((1, 2, 3), keepdim=True)
    return (x + thickness * clouds) * lightest / (lightest + thickness)


def read_frost(folder: Path) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The photographs of frost in a folder, sorted by name. ValueError if there are none, or one cannot be read.

    Of the six that come with the script of the published set (frost1.png to frost6.jpg) the last is left out, as that script never draws
    it: its index is `np.random.randint(5)` (hendrycks/robustness, make_imagenet_c.py).
    """
    found = []
    names = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")) if folder.is_dir() else []
    if [path.stem for path in names] == [f"frost{number}" for number in range(1, 7)]:
        names.pop()
    for path in names:
        try:
            with Image.open(path) as picture:
                found.append(np.asarray(picture.convert("RGB")))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
    if not found:
        raise ValueError(f"{folder} holds no pictures of frost: give a folder with some (.jpg, .jpeg, .png)")
    return found


def frost(x: Pixels, how: tuple[float, float], draws: Draws, frost: Frost) -> Pixels:
    """The picture and a random cut of a photograph, added up by two weights."""
    ours, theirs = how
    size = x.shape[-1]
    if min(min(photograph.shape[:2]) for photograph in frost) <= size:
        raise ValueError(f"a picture of frost is no larger than the {size} px of the pictures: give larger ones")
    cuts = []
    for which, down, right in draws.few(0, 3, 0, 1):
        photograph = frost[int(which * len(frost))]
        top, left = int(down * (photograph.shape[0] - size)), int(right * (photograph.shape[1] - size))
        cuts.append(photograph[top : top + size, left : left + size])
    layer = torch.from_numpy(np.stack(cuts)).to(x.device).permute(0, 3, 1, 2).float() / 255
    return ours * x + theirs * layer


# -------------------------------------------------------------------------------------------------------------- spatter


def spatter(x: Pixels, how: tuple[float, float, float, float, float, bool], draws: Draws) -> Pixels:
    """Drops of water, whose rims shine, or of mud; they are blurred noise above a threshold."""
    mean, deviation, sigma, threshold, last, muddy = how
    size = x.shape[-1]
    drops = smooth(mean + deviation * draws.normal(0, 1, size, size), sigma)
    if muddy:
        share = smooth((drops > threshold).float(), last)
        share = torch.where(share < 0.8, 0.0, share)
        return x * (1 - share) + share * x.new_tensor(_MUD).view(3, 1, 1)
    levels = torch.where(drops < threshold, 0.0, drops * 255).byte().cpu().numpy()[:, 0]
    shine = torch.from_numpy(np.stack([_shine(level) for level in levels])).to(x)[:, None]
    shine = shine / shine.amax((2, 3), keepdim=True).clamp(min=1e-9) * last
    return x + shine * x.new_tensor(_WATER).view(3, 1, 1)


def _shine(level: UInt8[np.ndarray, "s s"]) -> Float[np.ndarray, "s s"]:
    """The drops, brighter where the distance from their rims falls to the lower right: an emboss filter over that distance."""
    far = np.minimum(_distances(_edges(np.pad(level.astype(np.int64), 1, mode="edge"), 50, 150)), 20.0)
    near = _box(np.pad(far, 1, mode="reflect")).astype(np.uint8)
    relief = _correlated(np.pad(_equalized(near).astype(np.int64), 1, mode="reflect"), ((-2, -1, 0), (-1, 1, 1), (0, 1, 2)))
    relief = relief.clip(0, 255)
    return level * np.rint(_box(np.pad(relief, 1, mode="reflect")))


def _correlated(wide: np.ndarray, kernel: tuple[tuple[int, ...], ...]) -> np.ndarray:
    size = wide.shape[0] - 2
    return np.sum([kernel[i][j] * wide[i : i + size, j : j + size] for i in range(3) for j in range(3)], axis=0)


def _box(wide: np.ndarray) -> np.ndarray:
    """Means of 3 x 3 pixels; `wide` has a margin of one."""
    return _correlated(wide, ((1,) * 3,) * 3) / 9


def _equalized(level: UInt8[np.ndarray, "s s"]) -> UInt8[np.ndarray, "s s"]:
    """Each level goes where its share of the pixels below it is, the lowest to 0."""
    counts = np.bincount(level.ravel(), minlength=256)
    lowest = int(np.flatnonzero(counts)[0])
    rest = level.size - counts[lowest]
    if not rest:
        return level
    above = counts.cumsum() - counts[lowest]
    return np.rint(above.clip(0) * np.float32(255 / rest)).astype(np.uint8)[level]


_TAN_22, _BITS = 13573, 15  # the tangent of 22.5 degrees in units of 2 ** -15, as OpenCV has it


@compiled
def _gradient(wide, right, down, size):  # type: ignore[no-untyped-def]
    """Magnitude |dx| + |dy| by Sobel's filter, with a margin of zeros; `wide` has a margin of one. Fills right and down."""
    magnitude = np.zeros((size + 2, size + 2), np.int64)
    for i in range(size):
        for j in range(size):
            a, b, c = wide[i, j], wide[i, j + 1], wide[i, j + 2]
            d, e = wide[i + 1, j], wide[i + 1, j + 2]
            f, g, h = wide[i + 2, j], wide[i + 2, j + 1], wide[i + 2, j + 2]
            right[i, j] = c + 2 * e + h - a - 2 * d - f
            down[i, j] = f + 2 * g + h - a - 2 * b - c
            magnitude[i + 1, j + 1] = abs(right[i, j]) + abs(down[i, j])
    return magnitude


@compiled
def _is_crest(magnitude, i, j, dx, dy):  # type: ignore[no-untyped-def]
    """Whether the gradient is largest here along its own direction, one of four."""
    m = magnitude[i + 1, j + 1]
    y, low = abs(dy) << _BITS, abs(dx) * _TAN_22
    if y < low:
        return m > magnitude[i + 1, j] and m >= magnitude[i + 1, j + 2]
    if y > low + (abs(dx) << (_BITS + 1)):
        return m > magnitude[i, j + 1] and m >= magnitude[i + 2, j + 1]
    side = -1 if (dx ^ dy) < 0 else 1
    return m > magnitude[i, j + 1 - side] and m > magnitude[i + 2, j + 1 + side]


@compiled
def _edges(wide, low, high):  # type: ignore[no-untyped-def]
    """Canny's edges: crests of the gradient above `high`, and those above `low` that touch them, directly or by others."""
    size = wide.shape[0] - 2
    right, down = np.zeros((size, size), np.int64), np.zeros((size, size), np.int64)
    magnitude = _gradient(wide, right, down, size)
    crest = np.zeros((size, size), np.bool_)
    edge = np.zeros((size, size), np.bool_)
    stack = np.empty((size * size, 2), np.int64)
    top = 0
    for i in range(size):
        for j in range(size):
            m = magnitude[i + 1, j + 1]
            crest[i, j] = m > low and _is_crest(magnitude, i, j, right[i, j], down[i, j])
            if crest[i, j] and m > high:
                edge[i, j] = True
                stack[top, 0], stack[top, 1] = i, j
                top += 1
    while top:
        top -= 1
        at_i, at_j = stack[top, 0], stack[top, 1]
        for i in range(max(0, at_i - 1), min(size, at_i + 2)):
            for j in range(max(0, at_j - 1), min(size, at_j + 2)):
                if crest[i, j] and not edge[i, j]:
                    edge[i, j] = True
                    stack[top, 0], stack[top, 1] = i, j
                    top += 1
    return edge


@compiled
def _distances(edge):  # type: ignore[no-untyped-def]
    """Of each pixel from the nearest edge, in px, by steps of 1, of 1.4 to a diagonal neighbour and of 2.1969 by a knight's move.

    Borgefors 1986. A picture without edges: far from everywhere.
    """
    size = edge.shape[0]
    far = np.full((size + 4, size + 4), 1e6)
    for i in range(size):
        for j in range(size):
            if edge[i, j]:
                far[i + 2, j + 2] = 0.0
    for back in range(2):
        sign = -1 if back else 1
        for i in range(size + 1, 1, -1) if back else range(2, size + 2):
            for j in range(size + 1, 1, -1) if back else range(2, size + 2):
                up = i - sign
                best = min(far[i, j], far[i, j - sign] + 1, far[up, j] + 1)
                best = min(best, min(far[up, j - 1], far[up, j + 1]) + 1.4)
                best = min(best, min(far[up - sign, j - 1], far[up - sign, j + 1]) + 2.1969)
                far[i, j] = min(best, min(far[up, j - 2], far[up, j + 2]) + 2.1969)
    return far[2:-2, 2:-2]
