"""Each corruption of one picture, in float64 by numpy, scipy, Pillow and OpenCV, as it was published; the random numbers are handed in."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from cossl.pipelines.corruption_draws import Draws
from cossl.pipelines.geometry import uniform

PX = 96  # of every picture here
Picture = np.ndarray  # [s s 3], float64 in [0, 1]


def drawn(draws: Draws, kind: str, which: int, *shape: int) -> np.ndarray:
    return getattr(draws, kind)(which, *shape)[0].double().numpy()


def gaussian(x: np.ndarray, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> np.ndarray:
    by_axis = (sigma, sigma, 0)[: x.ndim]
    return ndimage.gaussian_filter(x, by_axis, mode=mode, truncate=truncate)


def clipped_zoom(x: np.ndarray, factor: float) -> np.ndarray:
    size = len(x)
    cut = math.ceil(size / factor)
    top = (size - cut) // 2
    part = x[top : top + cut, top : top + cut]
    large = ndimage.zoom(part, (factor, factor, 1)[: x.ndim], order=1, mode="nearest")
    trim = (len(large) - size) // 2
    return large[trim : trim + size, trim : trim + size]


def smeared(x: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """ImageMagick's MotionBlurImage: out(p) = sum of weight i times in(p + offset i), the edge repeated; stored with 8 bits."""
    size, taps = len(x), 2 * radius + 1
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(taps)]
    out = np.zeros_like(x)
    rows, columns = np.mgrid[:size, :size]
    for i, weight in enumerate(weights):
        down, right = math.ceil(i * math.sin(math.radians(angle)) - 0.5), math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        out += weight / sum(weights) * x[(rows + down).clip(0, size - 1), (columns + right).clip(0, size - 1)]
    return np.rint(out * 255) / 255


def by_hsv(x: Picture, change: Callable[[np.ndarray], None]) -> Picture:
    """A change of (hue, saturation, value), by the textbook's formulas of the six sextants."""
    value, span = x.max(2), np.ptp(x, axis=2)
    with np.errstate(all="ignore"):
        r, g, b = x.transpose(2, 0, 1)
        hue = np.where(value == r, ((g - b) / span) % 6, np.where(value == g, (b - r) / span + 2, (r - g) / span + 4))
        hsv = np.stack([np.where(span == 0, 0, hue), np.where(value == 0, 0, span / value), value], 2)
    change(hsv)
    hue, saturation, value = hsv.transpose(2, 0, 1)
    sector, part = np.floor(hue) % 6, hue - np.floor(hue)
    p, q, t = value * (1 - saturation), value * (1 - part * saturation), value * (1 - (1 - part) * saturation)
    table = [(value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value), (value, p, q)]
    return np.select([sector[..., None] == i for i in range(6)], [np.stack(colours, 2) for colours in table])


def gaussian_noise(x: Picture, c: float, d: Draws) -> Picture:
    return x + c * drawn(d, "normal", 0, 3, PX, PX).transpose(1, 2, 0)


def speckle_noise(x: Picture, c: float, d: Draws) -> Picture:
    return x + x * c * drawn(d, "normal", 0, 3, PX, PX).transpose(1, 2, 0)


def shot_noise(x: Picture, c: float, d: Draws) -> Picture:
    u = drawn(d, "uniform", 0, 3, PX, PX).transpose(1, 2, 0)
    return stats.poisson.ppf(np.nextafter(u, 1), x * c).clip(0) / c  # ppf(u) has at least u below it, inversion has more


def impulse_noise(x: Picture, c: float, d: Draws) -> Picture:
    u = drawn(d, "uniform", 0, 3, PX, PX).transpose(1, 2, 0)
    x = x.copy()
    x[u < c] = 0
    x[u < c / 2] = 1
    return x


def defocus_blur(x: Picture, c: tuple[int, float], d: Draws) -> Picture:
    radius, sigma = c
    reach, half = (8, 1) if radius <= 8 else (radius, 2)
    Y, X = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (radius**2 >= X**2 + Y**2) / (radius**2 >= X**2 + Y**2).sum()
    disk = ndimage.gaussian_filter(disk, sigma, mode="mirror", radius=half)
    return np.stack([ndimage.correlate(x[..., i], disk, mode="mirror") for i in range(3)], 2)


def glass_blur(x: Picture, c: tuple[float, int, int], d: Draws) -> Picture:
    sigma, reach, times = c
    levels = np.floor(gaussian(x, sigma) * 255 + 1e-3)
    key, slot = np.uint64(d.keys(0)[0]), 0
    for _ in range(times):
        for h in range(PX - reach, reach, -1):
            for w in range(PX - reach, reach, -1):
                dx, dy = (math.floor(uniform(key, slot + i, -reach, reach)) for i in range(2))
                slot += 2
                levels[h, w] = levels[h + dy, w + dx]
    return gaussian(levels / 255, sigma)


def motion_blur(x: Picture, c: tuple[int, float], d: Draws) -> Picture:
    return smeared(x, *c, uniform(np.uint64(d.keys(0)[0]), 0, -45, 45))


def zoom_blur(x: Picture, c: tuple[float, float], d: Draws) -> Picture:
    layers = [x, *(clipped_zoom(x, factor) for factor in np.arange(1, *c))]
    return np.mean(layers, axis=0)


def gaussian_blur(x: Picture, c: float, d: Draws) -> Picture:
    return gaussian(x, c)


def snow(x: Picture, c: tuple, d: Draws) -> Picture:
    flakes = clipped_zoom(c[0] + c[1] * drawn(d, "normal", 0, PX, PX), c[2])
    flakes[flakes < c[3]] = 0
    flakes = smeared(np.floor(flakes.clip(0, 1) * 255) / 255, c[4], c[5], uniform(np.uint64(d.keys(1)[0]), 0, -135, -45))[..., None]
    white = np.maximum(x, (x @ (0.299, 0.587, 0.114))[..., None] * 1.5 + 0.5)
    return c[6] * x + (1 - c[6]) * white + flakes + np.rot90(flakes, 2)


def frosted(frost: list[np.ndarray]) -> Callable[..., Picture]:
    def reference(x: Picture, c: tuple[float, float], d: Draws) -> Picture:
        which, down, right = (uniform(np.uint64(d.keys(0)[0]), slot, 0, 1) for slot in range(3))
        photograph = frost[int(3 * which)]
        top, left = int(down * (photograph.shape[0] - PX)), int(right * (photograph.shape[1] - PX))
        return c[0] * x + c[1] * photograph[top : top + PX, left : left + PX] / 255

    return reference


def clouds(u: np.ndarray, decay: float) -> np.ndarray:
    """Diamond-square point by point on a torus."""
    n = len(u)
    field, step, wobble = np.zeros((n, n)), n, 100.0
    while step >= 2:
        half = step // 2
        known = {0: [(-half, -half), (-half, half), (half, -half), (half, half)], 1: [(-half, 0), (half, 0), (0, -half), (0, half)]}
        places = [(i, j) for i in range(half, n, step) for j in range(half, n, step)]
        places += [(i, j) for i in range(0, n, half) for j in range(0, n, half) if (i // half + j // half) % 2]
        for i, j in places:
            around = known[0 if i % step and j % step else 1]
            mean = sum(field[(i + di) % n, (j + dj) % n] for di, dj in around) / 4
            field[i, j] = mean + wobble * (2 * u[i, j] - 1) * wobble
        step, wobble = half, wobble / decay
    field -= field.min()
    return field / field.max()


def fog(x: Picture, c: tuple[float, float], d: Draws) -> Picture:
    layer = clouds(drawn(d, "uniform", 0, 256, 256), c[1])[:PX, :PX, None]
    return (x + c[0] * layer) * x.max() / (x.max() + c[0])


def brightness(x: Picture, c: float, d: Draws) -> Picture:
    def change(hsv: np.ndarray) -> None:
        hsv[..., 2] = (hsv[..., 2] + c).clip(0, 1)

    return by_hsv(x, change)


def saturate(x: Picture, c: tuple[float, float], d: Draws) -> Picture:
    def change(hsv: np.ndarray) -> None:
        hsv[..., 1] = (hsv[..., 1] * c[0] + c[1]).clip(0, 1)

    return by_hsv(x, change)


def contrast(x: Picture, c: float, d: Draws) -> Picture:
    return (x - x.mean((0, 1))) * c + x.mean((0, 1))


def elastic_transform(x: Picture, c: tuple[float, float, float], d: Draws) -> Picture:
    middle, side = PX // 2, PX // 3
    points = np.array([(middle + side, middle + side), (middle + side, middle - side), (middle - side, middle - side)], float)
    moves = np.array([uniform(np.uint64(d.keys(0)[0]), slot, -c[2], c[2]) for slot in range(6)]).reshape(3, 2)
    forth = np.linalg.lstsq(np.c_[points, np.ones(3)], points + moves, rcond=None)[0].T  # (x, y, 1) to (x, y)
    back = np.linalg.inv(np.r_[forth, [[0, 0, 1]]])
    rows, columns = np.mgrid[:PX, :PX].astype(float)
    source = np.tensordot(back, np.stack([columns, rows, np.ones_like(rows)]), 1)
    turned = [ndimage.map_coordinates(x[..., i], [source[1], source[0]], order=1, mode="mirror") for i in range(3)]
    noise = drawn(d, "uniform", 1, 2, PX, PX) * 2 - 1
    right, down = (gaussian(field, c[1], "reflect", 3.0) * c[0] for field in noise)
    return np.stack([ndimage.map_coordinates(part, [rows + down, columns + right], order=1, mode="reflect") for part in turned], 2)


def whole(x: Picture) -> Image.Image:
    return Image.fromarray(np.rint(x * 255).astype(np.uint8))


def pixelate(x: Picture, c: float, d: Draws) -> Picture:
    small = whole(x).resize((int(PX * c), int(PX * c)), Image.Resampling.BOX)
    return np.asarray(small.resize((PX, PX), Image.Resampling.BOX)) / 255


def jpeg_compression(x: Picture, c: int, d: Draws) -> Picture:
    memory = io.BytesIO()
    whole(x).save(memory, "JPEG", quality=c)
    return np.asarray(Image.open(memory)) / 255


def spatter(x: Picture, c: tuple, d: Draws) -> Picture:
    drops = gaussian(c[0] + c[1] * drawn(d, "normal", 0, PX, PX), c[2])
    drops[drops < c[3]] = 0
    if c[5]:
        share = gaussian((drops > c[3]).astype(float), c[4])
        share[share < 0.8] = 0
        return x * (1 - share[..., None]) + share[..., None] * np.array((63, 42, 20)) / 255
    cv2 = pytest.importorskip("cv2")
    level = (drops * 255).astype(np.uint8)
    far = cv2.distanceTransform(255 - cv2.Canny(level, 50, 150), cv2.DIST_L2, 5)
    near = cv2.equalizeHist(cv2.blur(np.minimum(far, 20), (3, 3)).astype(np.uint8))
    relief = cv2.filter2D(near, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    shine = level * cv2.blur(relief, (3, 3)).astype(np.float64)
    return x + (shine / shine.max() * c[4])[..., None] * np.array((175, 238, 238)) / 255


NOISES = (gaussian_noise, shot_noise, impulse_noise, speckle_noise)
BLURS = (defocus_blur, glass_blur, motion_blur, zoom_blur, gaussian_blur)
OTHERS = (snow, fog, spatter, brightness, contrast, saturate, elastic_transform, pixelate, jpeg_compression)
REFERENCES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (*NOISES, *BLURS, *OTHERS)}

PUBLISHED: dict[str, list[Any]] = {
    "gaussian_noise": [0.08, 0.12, 0.18, 0.26, 0.38],
    "shot_noise": [60, 25, 12, 5, 3],
    "impulse_noise": [0.03, 0.06, 0.09, 0.17, 0.27],
    "defocus_blur": [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    "glass_blur": [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
    "motion_blur": [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    "zoom_blur": [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
    "snow": [
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ],
    "frost": [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    "fog": [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    "brightness": [0.1, 0.2, 0.3, 0.4, 0.5],
    "contrast": [0.4, 0.3, 0.2, 0.1, 0.05],
    "elastic_transform": [(488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)],
    "pixelate": [0.6, 0.5, 0.4, 0.3, 0.25],
    "jpeg_compression": [25, 18, 15, 10, 7],
    "speckle_noise": [0.15, 0.2, 0.35, 0.45, 0.6],
    "gaussian_blur": [1, 2, 3, 4, 6],
    "spatter": [
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ],
    "saturate": [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)],
}
"""The severities once more, so that a slip in the table of the code is one."""
