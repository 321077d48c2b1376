"""The four measurements of `cossl locality`, each of one run on its pictures: numbers, and the table that shows them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cossl.models import locality as maths
from cossl.models.co_ssl import Network
from cossl.models.probe import knn_top1, linear_top1
from cossl.models.rf_resnet import position_grid
from cossl.pipelines import find_split, make_loader
from cossl.pipelines.augment import normalize
from cossl.pipelines.batch import Loader, LoaderSpec
from cossl.pipelines.views import evaluation
from cossl.tools.opened import Opened, Pictures, open_split
from cossl.train import EVAL_BATCH, build

CENTRE_FRAC = 224 / 256
NORM_PICTURES = 256
"""Pictures of train that give the untrained network's batch norms their statistics: without any it would not normalise at all."""
FIELD_BATCH = 16
"""Pictures whose activations are kept for a backward pass at once."""


@dataclass(frozen=True)
class Measures:
    """How much is measured, and on what."""

    px: int = 0
    """Side of the pictures; 0 = the run's --eval-px."""
    pictures: int = 16
    """Pictures of val in the sheet of similarities."""
    sample: int = 512
    """Pictures of val whose cosines and ranks are averaged."""
    probe_pictures: int = 5000
    """Pictures of train and of val, at most, for the probes on k positions. Those take 1.7 GB with 2048 channels and 49 positions."""
    draws: int = 3
    """How often the k positions of each picture are drawn."""
    field_pictures: int = 64
    """Pictures of val whose gradients are averaged."""
    projections: int = 4
    """Random projections of the channels, for each of those pictures."""
    seed: int = 0
    """Fixes which pictures, positions and projections."""
    workers: int = 0
    """Of the loader; 0 = as many as in training."""

    def __post_init__(self) -> None:
        lows = {"px": 0, "pictures": 1, "sample": 2, "probe_pictures": 2, "draws": 1, "field_pictures": 1, "projections": 1}
        for name, low in (lows | {"seed": 0, "workers": 0}).items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {low} or more")


class Subject(NamedTuple):
    """A run with what its measurements need."""

    run: Opened
    data: Path
    args: Measures
    pictures: dict[str, Any] | None = None
    """What tells these pictures from others; `PictureSet.identity`."""

    @property
    def name(self) -> str:
        return self.run.run_dir.name

    @property
    def px(self) -> int:
        return self.args.px or self.run.config.eval_px

    @torch.no_grad()
    def networks(self) -> dict[str, Network]:
        """The trained network, and the same with its seed's weights, whose batch norms have seen pictures of train.

        By the forward pass of training, since the MLP and the heads see other vectors there than `vectors` shows them.
        """
        model = build(self.run.config, self.run.device).train()
        for norm in (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
            norm.momentum = None  # the mean over all batches
        count = model.position_grid(self.px).size ** 2
        for _, x, _ in self.sample("train", NORM_PICTURES, "batch norms of the untrained network")[1]:
            model([x, x], torch.arange(count, device=x.device).expand(len(x), 2, -1))
        return {"trained": self.run.encoder.network, "untrained": model.online.requires_grad_(False).eval()}

    def vectors(self, network: Network, x: Tensor) -> dict[str, maths.Vectors]:
        return maths.local_vectors(network, self.run.config.model, self.run.config.loss, x)

    def sample(self, split: str, count: int, what: str) -> tuple[int, Iterator[Pictures]]:
        """(how many, batches) of random pictures of a split, the same ones for every run on the same data, `count` at most; with a bar.

        Of a set that is asked for whole some may be left out: the loader drops an incomplete batch of its random order.
        """
        whole = open_split(self.run, self.data, split, self.px, self.args.workers)
        n = whole.num_samples
        whole.close()
        most = min(count, n, EVAL_BATCH)
        size = max(range(min(64, most), most + 1), key=lambda b: (min(count, n // b * b), b))
        how = self.run.config.loader
        backend = "auto" if how.backend == "synthetic" else how.backend
        spec = LoaderSpec(evaluation(self.px, CENTRE_FRAC), size, seed=self.args.seed, workers=self.args.workers or how.workers)
        count = min(count, n // size * size)
        return count, self._batches(make_loader(backend, find_split(self.data, split, backend), spec), count, f"{self.name}: {what}")

    def _batches(self, loader: Loader, count: int, what: str) -> Iterator[Pictures]:
        left = count
        try:
            with tqdm(total=count, desc=what, leave=False, disable=not sys.stderr.isatty()) as bar:
                for batch in loader.epoch(0):
                    (images,) = (view.to(self.run.device)[:left] for view in batch.split())
                    yield images, normalize(images), batch.label[:left].to(self.run.device)
                    left -= len(images)
                    bar.update(len(images))
                    if not left:
                        return
        finally:
            loader.close()


# ------------------------------------------------------------------------------------------------- the parts


def _spaces(subject: Subject) -> dict[str, str]:
    return maths.spaces(subject.run.config.model, subject.run.config.loss)


@torch.no_grad()
def similarity(subject: Subject) -> dict[str, Any]:
    """Cosines of positions with their picture's global vector, and with other pictures'."""
    networks, names, args = subject.networks(), _spaces(subject), subject.args
    likeness = {(which, space): maths.Likeness() for which in networks for space in names}
    count, batches = subject.sample("val", max(args.sample, args.pictures), "similarity")
    for _, x, _ in batches:
        for which, network in networks.items():
            for space, vectors in subject.vectors(network, x).items():
                likeness[which, space].add(vectors)
    grids = maths.space_grids(networks["trained"], subject.run.config.model, subject.run.config.loss, subject.px)
    found: dict[str, Any] = {}
    for space, what in names.items():
        drawn = torch.cat(likeness["trained", space].own)[: args.pictures]
        found[space] = {which: likeness[which, space].result() for which in networks}
        found[space] |= {"what": what, "grid": grids[space]._asdict(), "maps": drawn.tolist()}
    rows = [[space, which, *found[space][which].values()] for space in names for which in networks]
    columns = ["space", "network", "cosine with the own global vector", "deviation in a picture", "with other pictures'"]
    return {"title": "Likeness of positions to the global vector", "table": _table(columns, rows), "pictures": count, "spaces": found}


@torch.no_grad()
def redundancy(subject: Subject) -> dict[str, Any]:
    """How alike the positions of a picture are, and how many directions they use."""
    networks, names = subject.networks(), _spaces(subject)
    count, batches = subject.sample("val", subject.args.sample, "redundancy")
    sums = {(which, space): maths.Redundancy(count, subject.args.seed) for which in networks for space in names}
    for _, x, _ in batches:
        for which, network in networks.items():
            for space, vectors in subject.vectors(network, x).items():
                sums[which, space].add(vectors.local)
    found: dict[str, dict[str, Any]] = {}
    for space, what in names.items():
        found[space] = {"what": what} | {which: sums[which, space].result() for which in networks}
    keys = ["cosine_within", "cosine_across", "rank_within", "rank_mixed", "positions", "rank_all", "width"]
    rows = [[space, which, *(found[space][which][key] for key in keys)] for space in names for which in networks]
    columns = ["space", "network", "cosine in a picture", "across pictures", "rank in a picture", "of as many across", "at most"]
    table = _table([*columns, "rank of all", "at most"], rows)
    return {"title": "Redundancy between positions", "table": table, "pictures": count, "spaces": found}


Pooled = dict[str, Tensor]
"""{space: vectors [draws k b c]}"""


@torch.no_grad()
def _pooled(subject: Subject, split: str) -> tuple[Pooled, Tensor, list[int]]:
    """Means of the first k of the positions in `draws` random orders, and what the MLP makes of them; labels; the k."""
    args, network = subject.args, subject.run.encoder.network
    count, batches = subject.sample(split, args.probe_pictures, f"positions, {split}")
    p = position_grid(network.backbone, subject.px).size ** 2
    counts, salt = maths.position_counts(p), 2 * args.seed + (split == "train")
    orders = [maths.random_orders(count, p, salt, draw) for draw in range(args.draws)]
    rows: dict[str, list[Tensor]] = {space: [] for space in _spaces(subject) if space != "heads"}
    labels: list[Tensor] = []
    for _, x, label in batches:
        start = sum(map(len, labels))
        local = maths.positions_first(network.backbone(x))
        means = torch.stack([maths.first_means(local, order[start : start + len(x)].to(x.device), counts) for order in orders])
        for space in rows:
            vectors = network.after_pool(means.flatten(0, 2)).unflatten(0, means.shape[:3]) if space == "mlp" else means
            rows[space].append(vectors.float().cpu())
        labels.append(label.clone())
    return {space: torch.cat(parts, 2) for space, parts in rows.items()}, torch.cat(labels), counts


def positions(subject: Subject) -> dict[str, Any]:
    """Top-1 of probes fitted to and tested on the mean of k random positions; of all positions there is one mean and one draw."""
    (train, train_y, counts), (val, val_y, _) = _pooled(subject, "train"), _pooled(subject, "val")
    jobs = [
        (space, i, draw) for space in train for i, k in enumerate(counts) for draw in range(subject.args.draws if k < counts[-1] else 1)
    ]
    tops: dict[str, Any] = {space: {"linear_top1": [[] for _ in counts], "knn_top1": [[] for _ in counts]} for space in train}
    for space, i, draw in tqdm(jobs, f"{subject.name}: probes", leave=False, disable=not sys.stderr.isatty()):
        x, y = (pooled[space][draw, i].to(subject.run.device) for pooled in (train, val))
        tops[space]["linear_top1"][i].append(linear_top1(x, train_y, y, val_y))
        tops[space]["knn_top1"][i].append(knn_top1(x, train_y, y, val_y))
    rows = []
    for space, top in tops.items():
        for k, linear, knn in zip(counts, top["linear_top1"], top["knn_top1"], strict=True):
            rows.append([space, k, *mean_and_spread(linear), *mean_and_spread(knn), len(linear)])
    columns = ["space", "k", "linear top-1, percent", "spread", "20-NN top-1, percent", "spread", "draws"]
    sizes = {"counts": counts, "train_pictures": len(train_y), "val_pictures": len(val_y)}
    return {"title": "Accuracy of k pooled positions", "table": _table(columns, rows), "spaces": tops, **sizes}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def receptive_field(subject: Subject) -> dict[str, Any]:
    """Which pixels the output of the central position of the last map follows. "energies": [s s] tensors, which go into a file beside."""
    networks, args = subject.networks(), subject.args
    grid = position_grid(networks["trained"].backbone, subject.px)
    at, channels = maths.central_position(grid), networks["trained"].backbone.out_channels
    count, batches = subject.sample("val", args.field_pictures, "receptive field")
    signs = maths.random_signs(count, args.projections, channels, args.seed)
    energies: dict[str, list[Tensor]] = {which: [] for which in networks}
    for _, x, _ in batches:
        for some in x.split(FIELD_BATCH):
            start = sum(map(len, energies["trained"]))
            for which, network in networks.items():
                own = signs[start : start + len(some)]
                energies[which].append(maths.gradient_energy(network.backbone, some, (at, at), own).cpu())
    centre, box = grid.offset_px + at * grid.stride_px, maths.field_box(grid, at)
    found: dict[str, Any] = {"grid": grid._asdict(), "position": at, "box": list(box), "pictures": count, "energies": {}}
    rows = []
    for which, parts in energies.items():
        energy = maths.mean_energy(torch.cat(parts))
        field = maths.field_of(energy, grid, at)
        sides, shares = maths.cumulative_energy(energy, (centre, centre))
        dead = int((torch.cat(parts).sum((1, 2)) == 0).sum())
        found[which] = field._asdict() | {"sides_px": sides, "shares": shares, "pictures_without_gradient": dead}
        found["energies"][which] = energy.float()
        rows.append([which, grid.receptive_field_px, field.inside, field.side95_px, field.root_area_px])
    columns = ["network", "theoretical side, px", "energy inside it", "side of 95 %, px", "root of area above 4.55 %, px"]
    return {"title": "Receptive field in use", "table": _table(columns, rows), **found}


def _table(columns: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    return {"columns": columns, "rows": rows}
