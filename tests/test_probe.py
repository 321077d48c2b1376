"""Probes against sklearn, brute force and autograd."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cossl.models import probe
from cossl.models.parallel import Ranks
from cossl.models.probe import OnlineProbe


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


class Watch(TorchDispatchMode):
    """The largest tensor that was made, and every operation that makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.waits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor) and not t._is_view()]
        self.largest = max([self.largest, *(t.numel() for t in made)])
        self.waits += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
        return out


@pytest.mark.parametrize("chunks", [(7, 30), (64, 19), (1000, 3)])
def test_knn_is_the_same_in_chunks_and_its_memory_bounded(monkeypatch: pytest.MonkeyPatch, chunks: tuple[int, int]) -> None:
    (x, y), (test_x, test_y) = blobs(500), blobs(400, seed=1)
    whole = probe.knn_top1(x, y, test_x, test_y)
    monkeypatch.setattr(probe, "CHUNKS", chunks)
    with Watch() as watch:
        assert probe.knn_top1(x, y, test_x, test_y) == whole
    assert watch.waits == 2  # the number of classes, the hits
    assert watch.largest <= min(chunks[0], 400) * max(chunks[1] + 40, 46) < 500 * 400
    assert probe.knn_top1(x.bfloat16(), y, test_x.bfloat16(), test_y) == pytest.approx(whole, abs=2)


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


# ------------------------------------------------------------------------------------------------- the online probe


def views(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[v b c] and [b]: two noisy vectors of each sample, far from zero mean and of unlike scales."""
    (x, y), noise = blobs(samples, seed), torch.randn(2, samples, 6, generator=torch.Generator().manual_seed(seed))
    return (x + noise) * 10.0 ** torch.arange(-2, 4) + 5, y


def test_online_probe_takes_the_steps_of_torchs_sgd() -> None:
    ours, layer, norm = OnlineProbe(6, 4), nn.Linear(6, 4), nn.BatchNorm1d(6, affine=False)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    oracle = torch.optim.SGD(layer.parameters(), lr=probe.PROTOCOL["online_lr"], momentum=probe.PROTOCOL["online_momentum"])
    for step in range(20):
        x, y = views(32, step)
        logits = layer(norm(x.flatten(0, 1)) / 6**0.5)
        loss = F.cross_entropy(logits, y.repeat(2))
        oracle.zero_grad()
        loss.backward()
        oracle.step()
        said = ours.step_(x, y)
        torch.testing.assert_close(said["probe_loss"], loss.detach(), rtol=1e-4, atol=1e-5)
        assert said["probe_top1"].item() == pytest.approx(100 * float((logits.argmax(1) == y.repeat(2)).float().mean()), abs=4)
    torch.testing.assert_close(ours.weight, torch.cat([layer.weight, layer.bias[:, None]], 1).detach(), rtol=1e-3, atol=1e-3)


def test_online_probe_learns_what_the_linear_probe_finds() -> None:
    online = OnlineProbe(6, 4)
    tops = [online.step_(*views(256, step))["probe_top1"] for step in range(60)]
    (x, y), (test_x, test_y) = views(1000), views(1000, seed=1)
    best = probe.linear_top1(x.flatten(0, 1), y.repeat(2), test_x.flatten(0, 1), test_y.repeat(2))
    assert torch.stack(tops[20:]).mean().item() == pytest.approx(best, abs=3)
    assert best > 50


def test_online_probe_gives_the_network_no_gradient_and_no_parameters() -> None:
    backbone, online = nn.Linear(6, 6), OnlineProbe(6, 4)
    x, y = views(16)
    features = backbone(x)
    (features.square().mean()).backward(retain_graph=True)
    before = copy.deepcopy([p.grad for p in backbone.parameters()])
    said = online.step_(features, y)
    assert not any(value.requires_grad or value.dim() for value in said.values())
    for parameter, gradient in zip(backbone.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert list(online.parameters()) == []
    assert online.weight.abs().sum() > 0


def test_online_probe_goes_on_bitwise_from_its_state(tmp_path: Path) -> None:
    one = OnlineProbe(6, 4)
    for step in range(5):
        one.step_(*views(16, step))
    torch.save(one.state_dict(), tmp_path / "probe.pt")
    other = OnlineProbe(6, 4)
    other.load_state_dict(torch.load(tmp_path / "probe.pt", weights_only=True))
    for step in range(5, 8):
        said, again = one.step_(*views(16, step)), other.step_(*views(16, step))
        assert all(torch.equal(said[name], again[name]) for name in said)
    assert torch.equal(one.weight, other.weight)


def test_online_probe_is_float32_under_autocast_and_never_waits() -> None:
    plain, mixed, (x, y) = OnlineProbe(6, 4), OnlineProbe(6, 4), views(16)
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        said = mixed.step_(x, y)
    assert watch.waits == 0
    assert said["probe_loss"].dtype == torch.float32
    plain.step_(x, y)
    assert torch.equal(plain.weight, mixed.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_online_probe_survives_a_step_that_is_not_finite(value: float) -> None:
    online, (x, y) = OnlineProbe(6, 4), views(16)
    online.step_(x, y)
    before = copy.deepcopy(online.state_dict())
    assert not online.step_(x.index_fill(1, torch.tensor([3]), value), y)["probe_loss"].isfinite()
    assert all(torch.equal(before[name], tensor) for name, tensor in online.state_dict().items())


def test_online_probes_of_two_ranks_make_the_step_of_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, joint = [OnlineProbe(6, 4) for _ in range(2)], OnlineProbe(6, 4, Ranks(0, 2))
    for rank, online in enumerate(alone):
        online.step_(*views(16, rank))  # the momentum of a first step is its gradient
    monkeypatch.setattr(distributed, "all_reduce", lambda gradient: gradient.add_(alone[1].momentum))
    joint.step_(*views(16, 0))
    torch.testing.assert_close(joint.weight, (alone[0].weight + alone[1].weight) / 2)
    assert not torch.equal(alone[0].weight, alone[1].weight)


def test_online_probe_of_one_class_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="an online probe of 1 classes: expected 2 or more"):
        OnlineProbe(6, 1)
