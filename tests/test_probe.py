"""Probes against sklearn and against brute force."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from cossl.models import probe


def blobs(samples: int, seed: int = 0, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(99))
    y = torch.randint(0, 4, (samples,), generator=generator)
    return centres[y] + spread * torch.randn(samples, 6, generator=generator), y


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (5, 1.0), (20, 1e-3)])
def test_knn_equals_sklearns(k: int, temperature: float) -> None:
    (x, y), (test_x, test_y) = blobs(200), blobs(1500, seed=1)
    unit, test_unit = (a.double().numpy() / np.linalg.norm(a.double().numpy(), axis=1, keepdims=True) for a in (x, test_x))
    oracle = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2 - 1) / temperature), algorithm="brute")
    expected = 100 * oracle.fit(unit, y.numpy()).score(test_unit, test_y.numpy())
    assert probe.knn_top1(x, y, test_x, test_y, k, temperature) == pytest.approx(expected, abs=0.15)
    assert 30 < expected < 99


def test_knn_weighs_by_similarity_and_ignores_length() -> None:
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    y = torch.tensor([0, 1, 1])
    question = torch.tensor([[50.0, 0.0]])
    assert probe.knn_top1(x, y, question, torch.tensor([0]), k=3, temperature=0.07) == 100
    assert probe.knn_top1(x, y, question, torch.tensor([1]), k=3, temperature=10.0) == 100
    assert probe.knn_top1(x * torch.tensor([[1.0], [9.0], [0.1]]), y, question, torch.tensor([0])) == 100


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_softmax_regression_equals_sklearns(l2: float) -> None:
    x, y = blobs(300)
    weight, bias = probe.fit_softmax(x.double(), y, 4, l2)
    oracle = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=1000).fit(x.double().numpy(), y.numpy())
    ours = torch.softmax(x.double() @ weight.T + bias, dim=1)
    np.testing.assert_allclose(ours.numpy(), oracle.predict_proba(x.double().numpy()), atol=2e-3)


def test_linear_probe_is_as_good_as_sklearns_best() -> None:
    (x, y), (test_x, test_y) = blobs(400), blobs(1000, seed=1)
    scores = []
    for l2 in (0.001, 0.01, 0.1):
        oracle = LogisticRegression(C=1 / (l2 * len(x))).fit(x.numpy(), y.numpy())
        scores.append(100 * oracle.score(test_x.numpy(), test_y.numpy()))
    assert probe.linear_top1(x, y, test_x, test_y) == pytest.approx(max(scores), abs=1.5)


def test_linear_probe_does_not_depend_on_scale_offset_or_constant_features() -> None:
    (x, y), (test_x, test_y) = blobs(300), blobs(500, seed=1)
    plain = probe.linear_top1(x, y, test_x, test_y)
    assert plain == probe.linear_top1(x, y, test_x, test_y)
    scale, offset = 10.0 ** torch.arange(-3, 3), 7 * 10.0 ** torch.arange(-3, 3)
    constant = torch.full((500, 1), 0.1)

    def change(a: Tensor) -> Tensor:
        return torch.cat([a * scale + offset, constant[: len(a)]], dim=1)

    assert probe.linear_top1(change(x), y, change(test_x), test_y) == pytest.approx(plain, abs=0.5)


def test_linear_probe_chooses_strong_regularisation_where_features_are_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 noise features for 200 samples, then plenty of samples without noise: neither end of the list suits both."""
    generator = torch.Generator().manual_seed(5)
    (x, y), (test_x, test_y) = blobs(200), blobs(1000, seed=1)
    noisy = torch.cat([x, torch.randn(200, 300, generator=generator)], dim=1)
    noisy_test = torch.cat([test_x, torch.randn(1000, 300, generator=generator)], dim=1)
    (much_x, much_y), (much_test_x, much_test_y) = blobs(2000, spread=0.5), blobs(1000, seed=1, spread=0.5)
    chosen = [probe.linear_top1(noisy, y, noisy_test, test_y), probe.linear_top1(much_x, much_y, much_test_x, much_test_y)]
    monkeypatch.setitem(probe.PROTOCOL, "linear_l2_strengths", [1e-4])
    assert chosen[0] > probe.linear_top1(noisy, y, noisy_test, test_y) + 2
    monkeypatch.setitem(probe.PROTOCOL, "linear_l2_strengths", [10.0])
    assert chosen[1] > probe.linear_top1(much_x, much_y, much_test_x, much_test_y) + 0.5


def test_pixels_are_area_averages_in_unit_range() -> None:
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    x = probe.pixels(images)
    assert x.shape == (2, 432)
    expected = images.float().reshape(2, 3, 12, 4, 12, 4).mean((3, 5)).flatten(1) / 255
    torch.testing.assert_close(x, expected)
    assert probe.pixels(images[:, :, :31, :31]).shape == (2, 432)


def test_protocol_is_plain_values() -> None:
    for value in probe.PROTOCOL.values():
        assert isinstance(value, str | int | float | list)
