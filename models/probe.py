"""How much a frozen representation says about labels: weighted kNN and a linear probe, in percent of top-1."""

from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

PROTOCOL: dict[str, Any] = {
    "knn_k": 20,
    "knn_temperature": 0.07,
    "linear_l2_strengths": [1e-4, 1e-3, 1e-2, 1e-1, 1.0],
    "linear_held_out_frac": 0.1,
    "linear_chosen_by": "cross-entropy on the held-out part",
    "linear_seed": 0,
    "linear_max_iterations": 200,
    "linear_features": "standardised by the train set's mean and deviation",
    "pixels_grid": 12,
}
"""What the numbers of this file depend on, to be printed beside them."""


def pixels(images: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b c"]:
    """The floor of every table: the picture itself, area-averaged to 12 x 12, as 432 numbers in [0, 1]."""
    return F.adaptive_avg_pool2d(images.float() / 255, PROTOCOL["pixels_grid"]).flatten(1)


@torch.no_grad()
def knn_top1(
    train_x: Float[Tensor, "train c"],
    train_y: Int[Tensor, " train"],
    test_x: Float[Tensor, "test c"],
    test_y: Int[Tensor, " test"],
    k: int = PROTOCOL["knn_k"],
    temperature: float = PROTOCOL["knn_temperature"],
) -> float:
    """Percent of test samples whose k nearest train samples, each voting with exp(cos / temperature), elect the right class.

    Wu et al. 2018 (arXiv 1805.01978, section 3.4), on unit vectors. Fewer than k train samples: all of them vote.
    """
    train, test = F.normalize(train_x.float(), dim=1), F.normalize(test_x.float(), dim=1)
    k, classes, hits = min(k, len(train)), int(train_y.max()) + 1, 0
    for x, label in zip(test.split(1024), test_y.split(1024), strict=True):
        cosine, neighbour = (x @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(x), classes, device=x.device)
        # The largest cosine is taken off so that exp stays finite at any temperature; the election is the same.
        votes.scatter_add_(1, train_y[neighbour], ((cosine - cosine[:, :1]) / temperature).exp())
        hits += int((votes.argmax(1) == label).sum())
    return 100 * hits / len(test)


def linear_top1(
    train_x: Float[Tensor, "train c"],
    train_y: Int[Tensor, " train"],
    test_x: Float[Tensor, "test c"],
    test_y: Int[Tensor, " test"],
) -> float:
    """Percent of test samples that a softmax regression on the frozen features gets right.

    The l2 strength is the one of PROTOCOL's list with the lowest cross-entropy on a seeded tenth of the train set (accuracy on so few
    samples is mostly luck); the regression is then fitted to all of it. Full-batch L-BFGS: no learning rate, no order of samples,
    the same number every time.
    """
    train_x, test_x = train_x.float(), test_x.float()
    mean, deviation = train_x.mean(0), train_x.std(0, correction=0)
    # A feature that never changes says nothing; dividing by its deviation would blow rounding up to the size of a signal.
    scale = torch.where(deviation > 1e-6 * mean.abs(), 1 / deviation.clamp(min=1e-12), 0.0)
    train_x, test_x = (train_x - mean) * scale, (test_x - mean) * scale
    classes = int(train_y.max()) + 1
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(PROTOCOL["linear_seed"])).to(train_x.device)
    held = max(1, int(len(order) * PROTOCOL["linear_held_out_frac"]))
    out, rest = order[:held], order[held:]
    model, lowest, best_l2 = None, float("inf"), 0.0
    for l2 in sorted(PROTOCOL["linear_l2_strengths"], reverse=True):  # from strong to weak, each fit starting at the one before
        model = fit_softmax(train_x[rest], train_y[rest], classes, l2, model)
        loss = float(F.cross_entropy(F.linear(train_x[out], *model), train_y[out]))
        if loss >= lowest:  # past the minimum the fits only get longer and the loss higher
            break
        lowest, best_l2 = loss, l2
    model = fit_softmax(train_x, train_y, classes, best_l2)
    return 100 * float((F.linear(test_x, *model).argmax(1) == test_y).double().mean())


Softmax = tuple[Float[Tensor, "m c"], Float[Tensor, " m"]]
"""Weights and biases, as `F.linear` takes them: three times as fast as the transposed layout on a CPU."""


def fit_softmax(x: Float[Tensor, "b c"], y: Int[Tensor, " b"], classes: int, l2: float, start: Softmax | None = None) -> Softmax:
    """The weights and biases that minimise mean cross-entropy + l2 / 2 * |weights|^2; biases are not punished.

    sklearn's LogisticRegression with C = 1 / (l2 * samples). `start` only saves iterations: the problem is convex.
    """
    weight, bias = start if start is not None else (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(True), bias.clone().requires_grad_(True)
    iterations = PROTOCOL["linear_max_iterations"]
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(objective)
    return weight.detach(), bias.detach()
