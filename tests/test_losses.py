"""Loss terms against their formulas in a few lines of float64."""

import pytest
import torch
from torch import Tensor

from cossl.models import losses

F64 = torch.float64


def reference_distance(p: Tensor, z: Tensor) -> Tensor:
    """2 - 2 cos, one pair of vectors."""
    return 2 - 2 * (p @ z) / ((p @ p).sqrt() * (z @ z).sqrt())


def test_cosine_distance_and_its_gradient_equal_the_formula() -> None:
    p = torch.randn(3, 4, 5, dtype=F64, requires_grad=True)
    z = torch.randn(3, 1, 5, dtype=F64)
    ours = losses.cosine_distance(p, z)
    reference = torch.stack([torch.stack([reference_distance(p[i, j], z[i, 0]) for j in range(4)]) for i in range(3)])
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), p), torch.autograd.grad(reference.sum(), p))


def test_cosine_distance_closed_forms() -> None:
    p = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    distance = losses.cosine_distance(p, torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(distance, torch.tensor([0.0, 2.0, 4.0, 2.0]))
    (gradient,) = torch.autograd.grad(distance.sum(), p)
    assert gradient.isfinite().all()


def test_target_gets_no_gradient() -> None:
    p, z = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    losses.cosine_distance(p, z).sum().backward()
    assert p.grad is not None
    assert z.grad is None


def test_half_precision_is_raised_to_single() -> None:
    p, z = torch.randn(4, 64), torch.randn(4, 64)
    low = losses.cosine_distance(p.bfloat16(), z.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, losses.cosine_distance(p.bfloat16().float(), z.bfloat16().float()), rtol=0, atol=0)


def test_masked_mean_weighs_pictures_alike_and_leaves_out_empty_ones() -> None:
    distance = torch.randn(4, 3, dtype=F64, requires_grad=True)
    valid = torch.tensor([[True, True, True], [False, True, False], [False, False, False], [True, False, True]])
    mean = losses.masked_mean(distance, valid)
    reference = (distance[0].mean() + distance[1, 1] + distance[3, ::2].mean()) / 3
    torch.testing.assert_close(mean, reference)
    torch.testing.assert_close(torch.autograd.grad(mean, distance), torch.autograd.grad(reference, distance))
    everything = losses.masked_mean(distance, torch.ones_like(valid))
    torch.testing.assert_close(everything, distance.mean())


def test_masked_mean_of_nothing_is_zero_and_masked_values_cannot_spoil_it() -> None:
    distance = torch.tensor([[1.0, torch.nan], [torch.inf, torch.nan]], requires_grad=True)
    nothing = losses.masked_mean(distance, torch.zeros(2, 2, dtype=torch.bool))
    one = losses.masked_mean(distance, torch.tensor([[True, False], [False, False]]))
    assert (nothing.item(), one.item()) == (0.0, 1.0)
    (gradient,) = torch.autograd.grad(one, distance)
    assert torch.equal(gradient, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize(("share", "expected"), [(0.5, 5.0 + 3.0), (1.0, 10.0), (0.0, 6.0), (0.2, 2 * (0.2 * 5 + 0.8 * 3))])
def test_local_term_at_one_half_is_the_plain_sum(share: float, expected: float) -> None:
    assert losses.local_term(torch.tensor(5.0), torch.tensor(3.0), share).item() == pytest.approx(expected)  # type: ignore[union-attr]


def test_total_combines_both_ways() -> None:
    global_, local = torch.tensor(5.0), torch.tensor(3.0)
    assert losses.total(global_, local, 0.3, "convex").item() == pytest.approx(0.7 * 5 + 0.3 * 3)
    assert losses.total(global_, local, 0.3, "additive").item() == pytest.approx(5 + 0.3 * 3)
    assert losses.total(global_, 0.0, 0.0, "convex").item() == 5
