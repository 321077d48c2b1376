"""How much a representation says about labels, in percent of top-1: weighted kNN and a linear probe when it is frozen, and an online
probe while it is trained."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from cossl.models.parallel import ALONE, Ranks

PROTOCOL: dict[str, Any] = {
    "knn_k": 20,
    "knn_temperature": 0.07,
    "linear_l2_strengths": [1e-4, 1e-3, 1e-2, 1e-1, 1.0],
    "linear_held_out_frac": 0.1,
    "linear_chosen_by": "cross-entropy on the held-out part",
    "linear_seed": 0,
    "linear_max_iterations": 200,
    "linear_features": "standardised by the train set's mean and deviation",
    "online_lr": 3.0,
    "online_momentum": 0.9,
    "pixels_grid": 12,
}
"""What the numbers of this file depend on, to be printed beside them."""


def pixels(images: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b c"]:
    """The floor of every table: the picture itself, area-averaged to 12 x 12, as 432 numbers in [0, 1]."""
    return F.adaptive_avg_pool2d(images.float() / 255, PROTOCOL["pixels_grid"]).flatten(1)


CHUNKS = 1024, 16384
"""Test and train samples whose cosines are in memory at once: 64 MiB, and 128 MiB for 2048 features of the train samples."""


def knn_top1(
    train_x: Float[Tensor, "train c"],
    train_y: Int[Tensor, " train"],
    test_x: Float[Tensor, "test c"],
    test_y: Int[Tensor, " test"],
    k: int = PROTOCOL["knn_k"],
    temperature: float = PROTOCOL["knn_temperature"],
) -> float:
    """Percent of test samples whose k nearest train samples, each voting with exp(cos / temperature), elect the right class.

    Wu et al. 2018 (arXiv 1805.01978, section 3.4), on unit vectors. Fewer than k train samples: all of them vote. Features of any float
    type, on any one device, are compared in float32 and a chunk at a time, so beside them it takes less than half a GiB for any number of
    samples. Trap: at the end the host waits for the device, once. A train set that is a part of one sorted by class lacks classes.
    """
    return knn_top1s(train_x, train_y, test_x, test_y, (k,), (temperature,))[k, temperature]


Progress = Callable[[list[Any]], Iterable[Any]]
"""What goes through a list and shows how far it is, such as tqdm."""


@torch.no_grad()
def knn_top1s(
    train_x: Float[Tensor, "train c"],
    train_y: Int[Tensor, " train"],
    test_x: Float[Tensor, "test c"],
    test_y: Int[Tensor, " test"],
    ks: Sequence[int],
    temperatures: Sequence[float],
    ranks: Ranks = ALONE,
    progress: Progress = iter,
) -> dict[tuple[int, float], float]:
    """{(k, temperature): `knn_top1`} of all pairs, from one search for the neighbours.

    Of several ranks, each with all samples, every one takes a part of the test samples, and all get the result: every rank has to call it.
    ValueError for a k below 1, a temperature of 0 or less, or no samples.
    """
    if not ks or not temperatures or min(ks) < 1 or min(temperatures) <= 0 or not len(train_x) or not len(test_x):
        raise ValueError(
            f"kNN of {list(ks)} among {len(train_x)} for {len(test_x)} samples at {list(temperatures)}: all have to be above 0"
        )
    ks, classes = sorted(set(ks)), int(train_y.max()) + 1
    first, end = (rank * len(test_x) // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    hits = torch.zeros(len(temperatures), len(ks), dtype=torch.int64, device=test_x.device)
    for start in progress(list(range(first, end, CHUNKS[0]))):
        x, label = (some[start : min(start + CHUNKS[0], end)] for some in (test_x, test_y))
        cosine, vote = _neighbours(F.normalize(x.float(), dim=1), train_x, train_y, ks[-1])
        for t, temperature in enumerate(temperatures):
            # The largest cosine is taken off so that exp stays finite at any temperature; the election is the same.
            weight, votes, before = ((cosine - cosine[:, :1]) / temperature).exp(), torch.zeros(len(x), classes, device=x.device), 0
            for i, k in enumerate(ks):
                votes.scatter_add_(1, vote[:, before:k], weight[:, before:k])
                hits[t, i] += (votes.argmax(1) == label).sum()
                before = k
    found = ranks.gather(hits[None]).sum(0).cpu()
    each = {(k, temperature): int(found[t, i]) for t, temperature in enumerate(temperatures) for i, k in enumerate(ks)}
    return {pair: 100 * count / len(test_x) for pair, count in each.items()}


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32: TF32 keeps ten bits, and near neighbours differ by less."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@_exact_products()
def _neighbours(
    x: Float[Tensor, "b c"], train_x: Float[Tensor, "train c"], train_y: Int[Tensor, " train"], k: int
) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """Cosines, the largest first, and labels of the k train samples nearest to each of these unit vectors."""
    nearest, labels = x.new_empty(len(x), 0), train_y.new_empty(len(x), 0)
    for some_x, some_y in zip(train_x.split(CHUNKS[1]), train_y.split(CHUNKS[1]), strict=True):
        cosine, which = (x @ F.normalize(some_x.float(), dim=1).T).topk(min(k, len(some_x)), dim=1)
        both, both_labels = torch.cat([nearest, cosine], 1), torch.cat([labels, some_y[which]], 1)
        nearest, which = both.topk(min(k, both.shape[1]), dim=1)
        labels = both_labels.gather(1, which)
    return nearest, labels


class OnlineProbe(nn.Module):
    """A linear classifier that is trained beside the network, on vectors through which it passes the network no gradient.

    As in BYOL's public code, a classifier on `stop_gradient(embeddings)` (Grill et al. 2020; deepmind-research/byol,
    byol_experiment.py). Deviation: there it is trained by the run's own LARS, here by SGD with momentum on vectors standardised by the
    batch and divided by sqrt(c), at a learning rate that is stable for any such vectors (below 7.6: momentum 0.9, and the curvature is at
    most 1/2), so its number does not depend on the run's optimizer. Its whole state, momentum included, is two buffers: they are in
    state_dict, and no optimizer or weight decay takes them for the network's parameters.

    Trap: its accuracy is that on augmented views while both learn; it says how a run goes and replaces no evaluation.
    """

    weight: Float[Tensor, "m c1"]
    """The last column is the bias."""
    momentum: Float[Tensor, "m c1"]

    def __init__(self, features: int, classes: int, ranks: Ranks = ALONE) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"an online probe of {classes} classes: expected 2 or more")
        self.ranks = ranks
        self.register_buffer("weight", torch.zeros(classes, features + 1))
        self.register_buffer("momentum", torch.zeros(classes, features + 1))

    @torch.no_grad()
    def step_(self, features: Float[Tensor, "v b c"], label: Int[Tensor, " b"]) -> dict[str, Float[Tensor, ""]]:
        """probe_loss (cross-entropy, nats) and probe_top1 (percent) on these pooled vectors before the step that they make.

        In float32 whatever autocast says, without waiting for the device. Vectors that are not finite leave the probe as it was. Of several
        ranks, each with as many pictures, all make one step of their mean, so every rank has to call it.
        """
        with torch.autocast(features.device.type, enabled=False):
            x, y = features.float().flatten(0, 1), label.repeat(len(features))
            variance, mean = torch.var_mean(x, 0, correction=0)
            x = (x - mean) * (variance + 1e-5).rsqrt() * x.shape[1] ** -0.5
            log_p = F.linear(x, self.weight[:, :-1], self.weight[:, -1]).log_softmax(1)
            error = log_p.exp().scatter_add(1, y[:, None], log_p.new_full((len(y), 1), -1.0))
            self._descend(error.T @ F.pad(x, (0, 1), value=1.0) / len(y))
            return {"probe_loss": F.nll_loss(log_p, y), "probe_top1": 100 * (log_p.argmax(1) == y).float().mean()}

    def _descend(self, gradient: Float[Tensor, "m c1"]) -> None:
        if self.ranks.world_size > 1:
            distributed.all_reduce(gradient)
            gradient /= self.ranks.world_size
        momentum = PROTOCOL["online_momentum"] * self.momentum + gradient
        fine = momentum.isfinite().all()
        self.momentum.copy_(torch.where(fine, momentum, self.momentum))
        self.weight.sub_(torch.where(fine, PROTOCOL["online_lr"] * momentum, 0.0))


class LinearProbe(NamedTuple):
    """A softmax regression on vectors standardised by the mean and deviation of those it was fitted to."""

    mean: Float[Tensor, " c"]
    scale: Float[Tensor, " c"]
    """1 / deviation; 0 for a feature that never changed."""
    weight: Float[Tensor, "m c"]
    bias: Float[Tensor, " m"]

    def logits(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "b m"]:
        """Differentiable with respect to x, in float32."""
        return F.linear((x.float() - self.mean) * self.scale, self.weight, self.bias)


def linear_top1(
    train_x: Float[Tensor, "train c"],
    train_y: Int[Tensor, " train"],
    test_x: Float[Tensor, "test c"],
    test_y: Int[Tensor, " test"],
) -> float:
    """Percent of test samples that a softmax regression on the frozen features gets right: that of `fit_probe`."""
    return 100 * float((fit_probe(train_x, train_y).logits(test_x).argmax(1) == test_y).double().mean())


def fit_probe(train_x: Float[Tensor, "train c"], train_y: Int[Tensor, " train"]) -> LinearProbe:
    """The softmax regression on frozen features that `linear_top1` judges.

    The l2 strength is the one of PROTOCOL's list with the lowest cross-entropy on a seeded tenth of the train set (accuracy on so few
    samples is mostly luck); the regression is then fitted to all of it. Full-batch L-BFGS: no learning rate, no order of samples,
    the same number every time.
    """
    train_x = train_x.float()
    mean, deviation = train_x.mean(0), train_x.std(0, correction=0)
    # A feature that never changes says nothing; dividing by its deviation would blow rounding up to the size of a signal.
    scale = torch.where(deviation > 1e-6 * mean.abs(), 1 / deviation.clamp(min=1e-12), 0.0)
    train_x = (train_x - mean) * scale
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
    return LinearProbe(mean, scale, *fit_softmax(train_x, train_y, classes, best_l2))


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
