"""View recipes as data: how large each view is, which boxes it may take, and how its colours may change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from cossl.pipelines.cut import SMALLEST_PX


@dataclass(frozen=True)
class ViewSpec:
    """One view of a picture. Area fractions in (0, 1], probabilities in [0, 1], blur sigmas in pixels of the view."""

    size_px: int
    area_frac: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    centre_frac: float = 0.0
    """Above 0: no random crop but the central square, this fraction of the shorter side (evaluation)."""

    def __post_init__(self) -> None:
        low, high = self.area_frac
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop area {self.area_frac}: expected 0 < smallest <= largest <= 1")
        if not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise ValueError(f"crop aspect {self.aspect}: expected 0 < narrowest <= widest")
        for name in ("flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p", "centre_frac"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to 1")
        if self.size_px < SMALLEST_PX:
            raise ValueError(f"view size {self.size_px} px: expected at least {SMALLEST_PX}")

    def row(self) -> np.ndarray:
        """The same as one float64 row, in the order that `geometry.sample_views` reads."""
        jitter = (self.jitter_p, self.brightness, self.contrast, self.saturation, self.hue)
        rest = (self.grayscale_p, self.blur_p, *self.blur_sigma_px, self.solarize_p, self.centre_frac)
        return np.array([*self.area_frac, *self.aspect, self.flip_p, *jitter, *rest])


def _blurred(size_px: int, crop_min: float, jitter: float) -> ViewSpec:
    """The common ground of the recipes. Sigma 0.1 to 2.0 px is meant for 224 px and shrinks with the view."""
    if not 0 <= jitter <= 2.5:
        raise ValueError(f"colour jitter {jitter}: expected 0 (none) to 2.5 times BYOL's, where brightness reaches 0")
    shrink, s = size_px / 224, jitter
    view = ViewSpec(size_px, area_frac=(crop_min, 1.0), blur_p=1.0, blur_sigma_px=(0.1 * shrink, 2.0 * shrink))
    return replace(view, brightness=s * view.brightness, contrast=s * view.contrast, saturation=s * view.saturation, hue=s * view.hue)


def byol(size_px: int = 224, crop_min: float = 0.08, jitter: float = 1.0) -> tuple[ViewSpec, ...]:
    """BYOL's asymmetric pair: view 1 always blurred, view 2 blurred 1 in 10 and solarized 1 in 5.

    Source: Grill et al. 2020 (arXiv:2006.07733), table 6. Trap: crops here are antialiased bilinear, there bicubic.
    """
    view = _blurred(size_px, crop_min, jitter)
    return (view, replace(view, blur_p=0.1, solarize_p=0.2))


def symmetric(size_px: int = 224, crop_min: float = 0.08, jitter: float = 1.0) -> tuple[ViewSpec, ...]:
    """Two views of one distribution, each blurred half of the time and never solarized (as SimCLR, arXiv:2002.05709)."""
    view = replace(_blurred(size_px, crop_min, jitter), blur_p=0.5)
    return (view, view)


def multi_crop(
    size_px: int = 224, crop_min: float = 0.14, jitter: float = 1.0, local_px: int | None = None, local_crops_number: int = 6
) -> tuple[ViewSpec, ...]:
    """Two global views of `crop_min` to all of the picture, and local ones of 0.05 to `crop_min` of it, blurred half of the time.

    Sizes, number and areas are SwAV's (arXiv:2006.09882) and those of DINO's ResNet-50 command (arXiv:2104.14294); as in DINO view 1 is
    always blurred, view 2 blurred 1 in 10 and solarized 1 in 5. local_px: 96 for global views of 224 px, and in proportion.
    Trap: DINO's own default is eight local views.
    """
    if crop_min <= 0.05:
        raise ValueError(f"crops from {crop_min} of the picture: with local views expected more than their smallest, 0.05")
    first, second = byol(size_px, crop_min, jitter)
    local = replace(_blurred(local_px or round(size_px * 96 / 224), crop_min, jitter), blur_p=0.5, area_frac=(0.05, crop_min))
    return (first, second, *[local] * local_crops_number)


def evaluation(size_px: int = 224, centre_frac: float = 224 / 256) -> tuple[ViewSpec, ...]:
    """The central square, unchanged: what resizing the shorter side to 256 and cutting the central 224 gives."""
    return (ViewSpec(size_px, flip_p=0, jitter_p=0, grayscale_p=0, centre_frac=centre_frac),)


# (size_px, crop_min, jitter) to the views; the crop-size ablation varies crop_min from 0.05 to 1.
RECIPES: dict[str, Callable[..., tuple[ViewSpec, ...]]] = {
    "byol": byol,
    "symmetric": symmetric,
    "multi_crop": multi_crop,
}

if TYPE_CHECKING:
    RecipeName = str
else:
    RecipeName = Literal[tuple(RECIPES)]


@dataclass(frozen=True)
class ViewsConfig:
    """The views of a picture."""

    recipe: RecipeName = "byol"
    """byol: one view always blurred, the other sometimes solarized. symmetric: both alike. multi_crop: byol's two and small ones."""
    size_px: int = 224
    """Side of the two global views."""
    crop_min: float = 0.08
    """Smallest crop, as a fraction of the picture's area, in (0, 1]; with multi_crop the largest of a small view too (DINO's: 0.14)."""
    jitter: float = 1.0
    """Strength of brightness, contrast, saturation and hue jitter: 1 is BYOL's 0.4, 0.4, 0.2, 0.1; 0 to 2.5."""
    local_crops_number: int = 6
    """Small views of multi_crop: SwAV has 6, DINO 8."""
    local_crops_px: int = 0
    """Side of multi_crop's small views; 0 means 96 for global views of 224, and in proportion."""

    def specs(self) -> tuple[ViewSpec, ...]:
        """The views themselves."""
        if self.local_crops_number < 1:
            raise ValueError(
                f"--views.local-crops-number {self.local_crops_number}: expected 1 or more; without small views use recipe byol"
            )
        small = {"local_px": self.local_crops_px or None, "local_crops_number": self.local_crops_number}
        extra = small if self.recipe == "multi_crop" else {}
        return RECIPES[self.recipe](self.size_px, self.crop_min, self.jitter, **extra)
