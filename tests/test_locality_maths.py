"""Cosines, ranks, pooled positions and receptive fields in use, against closed forms and brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cossl.models import locality as maths
from cossl.models.co_ssl import CoSsl, LossConfig, ModelConfig
from cossl.models.rf_resnet import PositionGrid, ResNet, bagnet, position_grid, rf_resnet18, rf_resnet50

SMALL = ModelConfig(backbone="rf_resnet18", receptive_field=29, width=8, mlp_after_pool=2, hidden_dim=16, out_dim=12)


def vectors(*shape: int, seed: int = 0) -> Tensor:
    """Not centred, as features after a ReLU are not."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def brute_cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1))


# ------------------------------------------------------------------------------------------------- cosines and ranks


def test_equal_positions_have_cosine_and_rank_1() -> None:
    x = vectors(3, 1, 20).expand(3, 9, 20) * torch.arange(1, 10)[None, :, None]  # lengths do not matter
    torch.testing.assert_close(maths.pairwise_cosine(x), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(maths.effective_ranks(x), torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)


def test_orthogonal_positions_have_cosine_0_and_full_rank() -> None:
    x = 7 * torch.linalg.qr(vectors(2, 20, 9).double()).Q.mT
    torch.testing.assert_close(maths.pairwise_cosine(x), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(maths.effective_ranks(x), torch.full((2,), 9.0, dtype=torch.float64))


def test_cosine_of_a_simplex_and_of_single_positions() -> None:
    simplex = torch.eye(5) - 0.2
    assert float(maths.pairwise_cosine(simplex[None])) == pytest.approx(-1 / 4)
    assert float(maths.effective_ranks(simplex[None])) == pytest.approx(4)
    assert torch.isnan(maths.pairwise_cosine(vectors(2, 1, 4))).all()


@pytest.mark.parametrize("shape", [(2, 9, 30), (2, 30, 9)])
def test_ranks_are_those_of_numpys_singular_values(shape: tuple[int, int, int]) -> None:
    x = vectors(*shape)
    for group, rank in zip(x.double().numpy(), maths.effective_ranks(x).tolist(), strict=True):
        s = np.linalg.svd(group / np.linalg.norm(group, axis=1, keepdims=True), compute_uv=False)
        assert rank == pytest.approx(math.exp(-(s / s.sum() * np.log(s / s.sum())).sum()))


def measured(x: Tensor, batch: int, seed: int = 0) -> dict[str, float]:
    redundancy = maths.Redundancy(len(x), seed)
    for some in x.split(batch):
        redundancy.add(some)
    return redundancy.result()


def test_redundancy_is_that_of_all_pairs() -> None:
    x = vectors(6, 4, 10)
    pairs = itertools.combinations(itertools.product(range(6), range(4)), 2)
    within, across = [], []
    for (a, i), (b, j) in pairs:
        (within if a == b else across).append(brute_cosine(x[a, i], x[b, j]))
    found = measured(x, 6)
    assert found["cosine_within"] == pytest.approx(np.mean(within))
    assert found["cosine_across"] == pytest.approx(np.mean(across))
    assert found["rank_within"] == pytest.approx(float(maths.effective_ranks(x).mean()))
    assert found["rank_all"] == pytest.approx(float(maths.effective_ranks(x.reshape(1, 24, 10))))
    assert (found["positions"], found["width"]) == (4, 10)


@pytest.mark.parametrize("pictures", [7, 3])  # more and fewer than positions
def test_redundancy_does_not_depend_on_batches(pictures: int) -> None:
    x = vectors(pictures, 5, 8)
    whole = measured(x, pictures)
    assert measured(x, 1) == pytest.approx(whole)
    assert measured(x, 2) == pytest.approx(whole)
    assert measured(x, 2, seed=1)["rank_mixed"] != pytest.approx(whole["rank_mixed"])


def test_the_baseline_mixes_pictures() -> None:
    """Pictures whose positions are all alike, and unlike those of any other picture."""
    x = torch.eye(6)[:, None].expand(6, 6, 6)
    found = measured(x, 4)
    assert found["cosine_within"] == pytest.approx(1)
    assert found["cosine_across"] == pytest.approx(0)
    assert found["rank_within"] == pytest.approx(1, rel=1e-4)
    assert found["rank_mixed"] == pytest.approx(6)
    assert measured(x[:3], 2)["rank_mixed"] == pytest.approx(3, rel=1e-4)  # each picture twice


def test_likeness_is_that_of_all_pairs_and_of_any_batches() -> None:
    local, pooled = vectors(5, 4, 10), vectors(5, 10, seed=1)
    found = []
    for batch in (5, 2):
        likeness = maths.Likeness()
        for some in zip(local.split(batch), pooled.split(batch), strict=True):
            likeness.add(maths.Vectors(*some))
        found.append(likeness.result())
    own = np.array([[brute_cosine(local[a, i], pooled[a]) for i in range(4)] for a in range(5)])
    other = [brute_cosine(local[a, i], pooled[b]) for a in range(5) for b in range(5) for i in range(4) if a != b]
    assert found[0] == pytest.approx({"cosine": own.mean(), "deviation": own.std(1).mean(), "cosine_other": np.mean(other)})
    assert found[1] == pytest.approx(found[0])


# ------------------------------------------------------------------------------------------------- spaces


def model(config: ModelConfig, loss: LossConfig) -> CoSsl:
    """With statistics that are not those of a fresh batch norm."""
    torch.manual_seed(0)
    found = CoSsl(config, loss).double()
    for module in found.online.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    found.target.load_state_dict(found.online.state_dict(), strict=False)
    return found.eval()


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        (SMALL, LossConfig()),
        (SMALL, LossConfig(local_target="local_head")),
        (SMALL, LossConfig(local_to_global=0.0)),
        (replace(SMALL, local_stage=3, local_grid=3), LossConfig()),
        (replace(SMALL, shared_heads=True), LossConfig()),
        (replace(SMALL, local_head="conv3x3"), LossConfig()),
    ],
)
def test_cosines_through_the_heads_are_what_the_loss_compares(config: ModelConfig, loss: LossConfig) -> None:
    """With a target like the online network and both views the same picture, BYOL's local term is 2 * (2 - 2 cosine)."""
    co_ssl, x = model(config, loss), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    grid = maths.space_grids(co_ssl.online, config, loss, 32)["heads"]
    terms = co_ssl([x, x], torch.arange(grid.size**2).expand(3, 2, -1))
    likeness = maths.Likeness()
    likeness.add(maths.local_vectors(co_ssl.online, config, loss, x)["heads"])
    term = terms["local_to_global" if loss.local_to_global else "global_to_local"].detach()
    assert float(term) == pytest.approx(2 * (2 - 2 * likeness.result()["cosine"]))


def test_spaces_of_a_map_and_of_the_mlp() -> None:
    loss = LossConfig()
    co_ssl, x = model(SMALL, loss), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    y = co_ssl.online.backbone(x)
    found = maths.local_vectors(co_ssl.online, SMALL, loss, x)
    torch.testing.assert_close(found["map"].local[1, 2], y[1, :, 0, 2])
    torch.testing.assert_close(found["map"].pooled, y.mean((2, 3)))
    torch.testing.assert_close(found["mlp"].pooled, co_ssl.represent(x))
    torch.testing.assert_close(found["mlp"].local[:, 3], co_ssl.online.after_pool(y[:, :, 0, 3]))


def test_spaces_that_a_run_lacks_are_left_out() -> None:
    plain, dino = replace(SMALL, mlp_after_pool=0), replace(SMALL, method="dino", prototypes=8)
    assert list(maths.spaces(plain, LossConfig(local_weight=0))) == ["map"]
    assert list(maths.spaces(SMALL, LossConfig())) == ["map", "mlp", "heads"]
    assert "before the prototypes" in maths.spaces(dino, LossConfig())["heads"]
    assert "heads" not in maths.spaces(replace(dino, local_stage=3), LossConfig())
    co_ssl = model(dino, LossConfig())
    found = maths.local_vectors(co_ssl.online, dino, LossConfig(), torch.randn(2, 3, 32, 32, dtype=torch.float64))["heads"]
    assert found.local.shape == (2, 16, 12)
    assert found.pooled.shape == (2, 12)


def test_a_3x3_head_sees_two_strides_more() -> None:
    network = model(SMALL, LossConfig()).online
    grids = maths.space_grids(network, replace(SMALL, local_head="conv3x3"), LossConfig(), 64)
    assert (grids["map"].receptive_field_px, grids["heads"].receptive_field_px) == (29, 29 + 2 * 8)


# ------------------------------------------------------------------------------------------------- k positions


def test_the_mean_of_all_positions_is_the_global_mean() -> None:
    y = vectors(4, 6, 3, 3)
    local = maths.positions_first(y)
    counts = maths.position_counts(9)
    assert counts == [1, 2, 4, 8, 9]
    assert maths.position_counts(16) == [1, 2, 4, 8, 16]
    assert maths.position_counts(1) == [1]
    means = maths.first_means(local, maths.random_orders(4, 9, 0, 0), counts)
    torch.testing.assert_close(means[-1], y.mean((2, 3)))


def test_the_mean_of_k_positions_is_that_of_the_first_k() -> None:
    local, order = vectors(4, 9, 6), maths.random_orders(4, 9, 3, 1)
    means = maths.first_means(local, order, [1, 4])
    torch.testing.assert_close(means[0, 2], local[2, order[2, 0]])
    torch.testing.assert_close(means[1, 3], local[3, order[3, :4]].mean(0))
    parts = [maths.first_means(x, o, [1, 4]) for x, o in zip(local.split(3), order.split(3), strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), means)


def test_orders_are_permutations_that_differ_by_picture_draw_and_seed() -> None:
    order = maths.random_orders(50, 16, 0, 0)
    assert torch.equal(order.sort(1).values, torch.arange(16).expand(50, -1))
    assert not torch.equal(order[0], order[1])
    for other in (maths.random_orders(50, 16, 0, 1), maths.random_orders(50, 16, 1, 0)):
        assert not torch.equal(order, other)
    assert torch.equal(order, maths.random_orders(50, 16, 0, 0))
    first = torch.bincount(maths.random_orders(4000, 4, 0, 0)[:, 0], minlength=4)
    assert (first - 1000).abs().max() < 5 * math.sqrt(4000 * 0.25 * 0.75)


# ------------------------------------------------------------------------------------------------- receptive fields in use


def test_energy_of_a_convolution_is_its_squared_kernel() -> None:
    kernel = vectors(1, 3, 5, 5)
    conv = nn.Conv2d(3, 1, 5, padding=2, bias=False)
    conv.weight.data = kernel
    energy = maths.gradient_energy(conv, torch.randn(2, 3, 11, 11), (4, 6), maths.random_signs(2, 3, 1, 0))
    expected = torch.zeros(11, 11, dtype=torch.float64)
    expected[2:7, 4:9] = kernel[0].double().square().sum(0)
    torch.testing.assert_close(energy, expected.expand(2, -1, -1))


def test_projections_average_to_the_sum_over_channels() -> None:
    """All sign patterns of three channels are the expectation."""
    conv = nn.Conv2d(3, 3, 3, bias=False)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))[None]
    energy = maths.gradient_energy(conv, torch.randn(1, 3, 3, 3), (0, 0), signs)
    torch.testing.assert_close(energy[0], conv.weight.detach().double().square().sum((0, 1)))
    drawn = maths.random_signs(40, 50, 3, 0)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert drawn.mean((0, 1)).abs().max() < 5 / math.sqrt(2000)
    assert torch.equal(maths.random_signs(40, 50, 3, 0)[:7], drawn[:7])


@pytest.mark.parametrize(
    ("build", "receptive_field", "view_px"),
    [(rf_resnet18, 29, 64), (rf_resnet18, 13, 40), (rf_resnet50, 35, 96), (bagnet, 9, 48)],
)
def test_no_energy_lies_outside_a_bounded_field(build: Callable[..., ResNet], receptive_field: int, view_px: int) -> None:
    torch.manual_seed(0)
    backbone = build(receptive_field, width=4).eval()
    grid = position_grid(backbone, view_px)
    at = maths.central_position(grid)
    signs = maths.random_signs(2, 2, backbone.out_channels, 0)
    energies = maths.gradient_energy(backbone, torch.randn(2, 3, view_px, view_px), (at, at), signs)
    energy = maths.mean_energy(energies)
    assert float(energy.sum()) == pytest.approx(1)
    assert maths.field_of(energy, grid, at).inside == pytest.approx(1, abs=1e-12)
    narrower = maths.field_of(energy, grid._replace(receptive_field_px=receptive_field // 4), at).inside
    assert narrower < 0.9
    first, last = maths.field_box(grid, at)
    assert last - first == receptive_field
    assert float(energy.sum() - energy[first:last, first:last].sum()) == pytest.approx(0, abs=1e-12)
    for other in (at - 1, at + 1):  # the neighbour's square is another one
        assert maths.field_of(energy, grid, other).inside < 0.999


def test_energy_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    backbone, x = rf_resnet18(29, width=8).eval(), torch.randn(5, 3, 40, 40)
    signs = maths.random_signs(5, 2, backbone.out_channels, 0)
    whole = maths.gradient_energy(backbone, x, (2, 2), signs)
    parts = [maths.gradient_energy(backbone, a, (2, 2), b) for a, b in zip(x.split(2), signs.split(2), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-9 * float(whole.max()))
    assert all(p.grad is None for p in backbone.parameters())


def test_pictures_count_alike_and_those_without_gradient_not_at_all() -> None:
    energies = torch.zeros(3, 2, 2, dtype=torch.float64)
    energies[0, 0, 0], energies[1, 1, 1] = 1e6, 1e-6
    torch.testing.assert_close(maths.mean_energy(energies), torch.tensor([[0.5, 0], [0, 0.5]], dtype=torch.float64))


def test_sizes_of_a_gaussian_field() -> None:
    """The gradient exp(-r^2 / 2 s^2) exceeds 4.55 % within r = s sqrt(2 ln(1 / 0.0455)), and a square of side a holds erf(a / 2 s)^2."""
    s, px, at = 6.0, 101, 50
    r2 = (torch.arange(px, dtype=torch.float64) - at).square()
    energy = torch.exp(-(r2[:, None] + r2[None]) / s**2)
    field = maths.field_of(energy, PositionGrid(px, 1, 21, 0.5, px), at)
    assert field.root_area_px == pytest.approx(s * math.sqrt(2 * math.pi * math.log(1 / 0.0455)), rel=0.01)
    assert field.inside == pytest.approx(math.erf(10.5 / s) ** 2, rel=1e-3)
    assert math.erf(field.side95_px / 2 / s) ** 2 >= 0.95 > math.erf((field.side95_px - 2) / 2 / s) ** 2


def test_squares_grow_by_two_pixels_up_to_the_view() -> None:
    sides, shares = maths.cumulative_energy(torch.ones(5, 5), (2.5, 2.5))
    assert sides == [1, 3, 5]
    assert shares == pytest.approx([1 / 25, 9 / 25, 1])
    sides, shares = maths.cumulative_energy(torch.ones(4, 4), (2.0, 2.0))  # between two pixels
    assert sides == [2, 4]
    assert shares == pytest.approx([4 / 16, 1])
    assert maths.cumulative_energy(torch.ones(4, 4), (0.5, 0.5))[0] == [1, 3, 5, 7]


def test_a_field_that_hangs_over_the_border_is_cut() -> None:
    grid = PositionGrid(8, 8, 29, 0.5, 64)
    assert maths.field_box(grid, 0) == (0, 15)
    assert maths.field_box(grid, 4) == (18, 47)
    assert maths.field_box(grid, 7) == (42, 64)
    assert maths.field_box(grid._replace(receptive_field_px=427), 4) == (0, 64)
