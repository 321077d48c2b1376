"""Each corruption against a plain float64 reference of one picture, written from the published description, with the same draws."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from corruption_references import PUBLISHED, PX, REFERENCES, frosted
from PIL import Image
from scipy import ndimage, stats

from cossl.pipelines.corruption_blurs import affine_maps, shuffled, zoomed
from cossl.pipelines.corruption_draws import Draws
from cossl.pipelines.corruption_weather import _distances, _edges, read_frost
from cossl.pipelines.corruptions import CORRUPTIONS, EXTRA, NAMES, SEVERITIES, corrupt
from cossl.pipelines.geometry import stream, uniform

SEED = 3


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth colours, sharp edges, grey, black, white, and noise: [2 3 PX PX]."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:PX, :PX] / PX
    first = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x * y)], 2)
    first[20:40, 30:70] = (0.9, 0.1, 0.2)
    first[50:60, 10:20], first[60:70, 10:20], first[70:80, 10:20] = 0, 0.5, 1
    second = ndimage.gaussian_filter(random.random((PX, PX, 3)), (2, 2, 0)) * 3 - 1 + 0.1 * random.random((PX, PX, 3))
    both = (np.stack([first, second]).clip(0, 1) * 255).round().astype(np.uint8)
    return torch.from_numpy(both).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def frost() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((PX + 1, PX + 40), (PX + 30, PX + 1), (PX + 60, PX + 50))]


def draws_of(name: str, severity: int, index: int) -> Draws:
    return Draws(SEED, list(CORRUPTIONS).index(name), severity, torch.tensor([index]))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_equals_an_independent_reference(name: str, severity: int, images: torch.Tensor, frost: list[np.ndarray]) -> None:
    """To one level of 255, in all pixels but one of 1,000."""
    done = corrupt(images, torch.tensor([5, 11]), name, severity, SEED, frost).permute(0, 2, 3, 1).numpy()
    assert done.dtype == np.uint8
    reference = frosted(frost) if name == "frost" else REFERENCES[name]
    for picture, index, ours in zip(images.permute(0, 2, 3, 1).numpy(), (5, 11), done, strict=True):
        wanted = reference(picture / 255, PUBLISHED[name][severity - 1], draws_of(name, severity, index))
        wanted = np.floor(wanted.clip(0, 1) * 255 + 1e-3)
        away = np.abs(ours - wanted)
        assert (away > 0).mean() < 1e-2, f"{(away > 0).mean():.2%} of the values are others"
        assert (away > 1).mean() < 1e-3, f"{(away > 1).mean():.2%} of the values are others by more than a level, at most {away.max():g}"
        assert not np.array_equal(ours, picture)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_batch_changes_nothing(name: str, images: torch.Tensor, frost: list[np.ndarray]) -> None:
    """Neither its size nor its order; and what a GPU does at once for all pictures is what a CPU does for each."""
    index = torch.tensor([5, 11])
    both = corrupt(images, index, name, 3, SEED, frost)
    assert torch.equal(both.flip(0), corrupt(images.flip(0), index.flip(0), name, 3, SEED, frost))
    assert torch.equal(both[1:], corrupt(images[1:].contiguous(memory_format=torch.channels_last), index[1:], name, 3, SEED, frost))
    extra = {"frost": frost} if name == "frost" else {}
    number, (_, render, parameters) = list(CORRUPTIONS).index(name), CORRUPTIONS[name]
    at_once = render(images.float() / 255, parameters[2], Draws(SEED, number, 3, index), **extra)
    assert ((at_once.clamp(0, 1) * 255 + 1e-3).floor() - both.float()).abs().mean() < 1e-3


RANDOM = set(CORRUPTIONS) - {
    "defocus_blur",
    "zoom_blur",
    "gaussian_blur",
    "brightness",
    "contrast",
    "saturate",
    "pixelate",
    "jpeg_compression",
}


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_random_ones_depend_on_seed_and_index(name: str, images: torch.Tensor, frost: list[np.ndarray]) -> None:
    same = images[:1].expand(2, -1, -1, -1)
    first = corrupt(same, torch.tensor([5, 11]), name, 2, SEED, frost)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], corrupt(same, torch.tensor([5, 11]), name, 2, SEED + 1, frost)[0])


def test_draws_are_the_counter_based_ones_of_the_crops() -> None:
    draws = Draws(7, 4, 2, torch.tensor([9, 3]))
    keys = [stream(7, 2, index, 4, 16 + 1) for index in (9, 3)]
    wanted = np.array([[uniform(key, slot, 0, 1) for slot in range(50)] for key in keys])
    np.testing.assert_array_equal(draws.few(1, 50, 0, 1), wanted)
    np.testing.assert_array_equal(draws.uniform(1, 5, 10).flatten(1), np.floor(wanted * 2**24) / 2**24)
    assert draws.uniform(0, 50).sub(draws.uniform(1, 50)).abs().min() > 0


def test_draws_have_their_distributions() -> None:
    draws = Draws(1, 0, 1, torch.arange(4))
    normal, even = draws.normal(0, 3, 50, 51), draws.uniform(0, 3, 50, 51)
    assert normal.shape == even.shape == (4, 3, 50, 51)
    assert stats.kstest(normal.flatten(), "norm").pvalue > 0.01
    assert stats.kstest(even.flatten(), "uniform").pvalue > 0.01
    neighbours = np.corrcoef(normal.flatten(1)[:, :-1].flatten(), normal.flatten(1)[:, 1:].flatten())[0, 1]
    assert abs(neighbours) < 0.02


def test_noises_of_grey_have_the_published_moments() -> None:
    """On a grey of 0.4: far from both ends, so that hardly a value is cut off at them."""
    grey = torch.full((4, 3, 128, 128), 102, dtype=torch.uint8)
    share = {"gaussian_noise": 0.08, "speckle_noise": 0.4 * 0.15, "shot_noise": math.sqrt(0.4 / 60)}
    for name, deviation in share.items():
        x = corrupt(grey, torch.arange(4), name, 1, SEED).double() / 255
        assert x.mean().item() == pytest.approx(0.4 - 0.5 / 255 * (name != "shot_noise"), abs=2e-3)  # cut and not rounded
        assert x.std().item() == pytest.approx(deviation, rel=0.02)
    x = corrupt(grey, torch.arange(4), "impulse_noise", 5, SEED)
    assert [(x == value).double().mean().item() for value in (0, 255)] == pytest.approx([0.135, 0.135], abs=3e-3)


def test_severities_hurt_more_and_more(images: torch.Tensor) -> None:
    """Published ones that are made so; motion, zoom and glass blur, frost, snow, saturate and spatter change in kind between severities."""
    for name in (
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "speckle_noise",
        "defocus_blur",
        "gaussian_blur",
        "contrast",
        "brightness",
    ):
        away = [(corrupt(images, torch.arange(2), name, s, SEED).float() - images).abs().mean().item() for s in SEVERITIES]
        assert away == sorted(away), name


def test_names_are_those_of_the_published_set() -> None:
    families = [CORRUPTIONS[name].family for name in NAMES]
    assert families == ["noise"] * 3 + ["blur"] * 4 + ["weather"] * 4 + ["digital"] * 4
    assert EXTRA == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    assert all(len(corruption.severities) == 5 for corruption in CORRUPTIONS.values())


def test_a_shuffle_moves_pixels_within_reach() -> None:
    source = shuffled(Draws(0, 0, 1, torch.arange(2)), 40, 2, 1)
    rows, columns = np.divmod(source, 40)
    here = np.divmod(np.arange(1600), 40)
    assert not np.array_equal(source[0], source[1])
    assert np.abs(columns - here[1])[:, :40].max() == 0  # the first row stays
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 39, 0, 39)


def test_rims_of_drops_are_opencv_s() -> None:
    """Canny's edges pixel by pixel, in all four directions; distances from them to a ten-thousandth, which is OpenCV's own rounding."""
    cv2 = pytest.importorskip("cv2")
    random = np.random.default_rng(0)
    for sigma in (0.8, 1.5, 3.0):
        level = ndimage.gaussian_filter(random.random((90, 90)), sigma)
        level = ((level - level.min()) / np.ptp(level) * 255).astype(np.uint8)
        edge = _edges(np.pad(level.astype(np.int64), 1, mode="edge"), 50, 150)
        wanted = cv2.Canny(level, 50, 150)
        assert 0.02 < edge.mean() < 0.5
        np.testing.assert_array_equal(edge, wanted > 0)
        np.testing.assert_allclose(_distances(edge), cv2.distanceTransform(255 - wanted, cv2.DIST_L2, 5), rtol=1e-4)


def test_an_affine_map_carries_the_moved_points_back() -> None:
    moves = np.random.default_rng(0).uniform(-5, 5, (3, 6))
    points = np.array([(80, 80), (80, 16), (16, 16)])  # of 96 px: the middle 48, a third 32
    for map_back, move in zip(affine_maps(96, moves), moves, strict=True):
        np.testing.assert_allclose(map_back @ np.c_[points + move.reshape(3, 2), np.ones(3)].T, points.T, atol=1e-9)


def test_a_zoom_enlarges_the_middle() -> None:
    """A ramp stays a ramp, of so much less steepness, and its middle stays in the middle to a pixel."""
    ramp = torch.arange(65.0).expand(1, 1, 65, 65)
    for factor in (1, 1.5, 3, 4.5):
        zoom = zoomed(ramp, factor)
        assert zoom.shape == ramp.shape
        step = zoom[0, 0, 0].diff()
        assert step.max() - step.min() < 1e-4
        assert step.mean().item() == pytest.approx(1 / factor, rel=0.07)
        assert zoom[0, 0, 0, 32].item() == pytest.approx(32, abs=1)


def test_frost_is_drawn_from_the_five_photographs_that_the_published_set_has(tmp_path: Path) -> None:
    for number, ending in enumerate(("png", "png", "png", "jpg", "jpg", "jpg"), 1):
        Image.new("RGB", (PX, PX), (number, 0, 0)).save(tmp_path / f"frost{number}.{ending}", quality=95)
    assert len(read_frost(tmp_path)) == 5
    assert [round(float(photograph[..., 0].mean())) for photograph in read_frost(tmp_path)[:3]] == [1, 2, 3]
    (tmp_path / "frost7.png").write_bytes((tmp_path / "frost1.png").read_bytes())
    assert len(read_frost(tmp_path)) == 7  # some other collection


def test_mistakes_are_told(images: torch.Tensor, tmp_path: Path) -> None:
    index = torch.arange(2)
    for name, severity, what in (("snowfall", 1, "expected one of"), ("snow", 0, "severity 1 to 5"), ("frost", 1, "photographs")):
        with pytest.raises(ValueError, match=what):
            corrupt(images, index, name, severity, SEED)
    with pytest.raises(ValueError, match="32 or more"):
        corrupt(images[..., :31, :31], index, "snow", 1, SEED)
    with pytest.raises(ValueError, match="no pictures of frost"):
        read_frost(tmp_path)
    Image.new("RGB", (PX, PX)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="give larger ones"):
        corrupt(images, index, "frost", 1, SEED, read_frost(tmp_path))
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read"):
        read_frost(tmp_path)
