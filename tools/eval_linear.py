"""The linear probes of `cossl eval`: a search on vectors in memory or computed anew in each epoch, its tables, figures and weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from cossl.models import linear_probe
from cossl.models.launch import say
from cossl.models.linear_probe import Batch, Feed, Found, Grid, Scale, few_shot, grid_of, held_out, search
from cossl.models.parallel import Ranks
from cossl.tools import eval_figures
from cossl.tools.eval_features import (
    CHUNK,
    PIXELS,
    DiskKeeper,
    Subject,
    Vectors,
    cached_feed,
    extract,
    features,
    fitting,
    gib,
    keep,
    label_of,
    shapes,
    streamed_feed,
    streamed_scales,
)
from cossl.tools.eval_pictures import digest

MOST_CONFUSED = 50


@dataclass(frozen=True)
class ProbeSettings:
    """What a linear probe depends on beside its vectors; the fields are flags of `cossl eval`."""

    epochs: int
    batch_size: int
    base_lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    held_out_frac: float
    refit: bool
    augment: bool
    seed: int
    label_percent: int = 100

    def protocol(self) -> dict[str, Any]:
        """Plain values, and the rules that are no flags."""
        grid = {"base_lrs": list(self.base_lrs), "weight_decays": list(self.weight_decays), "lr": "base_lr * batch_size / 256"}
        how = {"epochs": self.epochs, "batch_size": self.batch_size, "momentum": linear_probe.MOMENTUM, "schedule": "cosine to 0"}
        chosen = {
            "held_out_frac": self.held_out_frac,
            "chosen_by": "held-out top-1, then cross-entropy; the latter on train where nothing can be held out",
            "refit": self.refit,
        }
        rest = {"augment": self.augment, "seed": self.seed, "label_percent": self.label_percent}
        return grid | how | chosen | rest | {"scale": "each feature to zero mean and deviation 1 / sqrt(c), by train"}


def few_of(subject: Subject, settings: ProbeSettings) -> Bool[Tensor, " n"] | None:
    """The training pictures whose labels are known; None is all."""
    percent, labels = settings.label_percent, subject.pictures.labels["train"]
    return few_shot(labels, percent / 100, settings.seed) if percent < 100 else None


def shares(subject: Subject, settings: ProbeSettings, names: Sequence[str]) -> dict[str, float]:
    """GiB of each feature's vectors, of the training pictures whose labels are known and of val."""
    few, sizes = few_of(subject, settings), shapes(subject, names)
    known = 1.0 if few is None else float(few.double().mean())
    return {name: known * gib(subject, {name: size}, "train") + gib(subject, {name: size}, "val") for name, size in sizes.items()}


class Data:
    """The vectors that one search needs, in memory or streamed, and how they are scaled."""

    def __init__(self, subject: Subject, settings: ProbeSettings, names: Sequence[str], memory_gib: float) -> None:
        self.subject, self.settings, self.names = subject, settings, list(names)
        self.sizes = shapes(subject, names)
        y, few = subject.pictures.labels, few_of(subject, settings)
        self.y = {"train": y["train"] if few is None else y["train"][few], "val": y["val"]}
        whole = sum(gib(subject, self.sizes, split) for split in ("train", "val"))
        share = sum(shares(subject, settings, names).values())
        self.streamed = settings.augment or share > memory_gib
        self.x: dict[str, Vectors] = {}
        if self.streamed and few is not None:
            raise ValueError(f"the vectors of {settings.label_percent} % of train and of val take {share:.1f} GiB: raise --memory-gib")
        if self.streamed:
            if not settings.augment:
                said = f"the vectors ({', '.join(names)}) take {share:.1f} GiB, more than --memory-gib {memory_gib:g}"
                say(f"{said}: the network runs in every epoch", sys.stderr)
            self.scales = streamed_scales(subject, names, settings.seed)
            return
        if few is None or whole <= memory_gib:
            train = features(subject, "train", names)
            self.x["train"] = train if few is None else {name: x[:, few] for name, x in train.items()}
        else:
            self.x["train"] = extract(subject, "train", names, few)
        self.x["val"] = features(subject, "val", names)
        self.scales = {name: Scale.of(x.split(CHUNK, 1)) for name, x in self.x["train"].items()}
        self.scales = {name: scale.to(subject.run.device) for name, scale in self.scales.items()}
        self._near()

    def _near(self) -> None:
        """Onto the GPU what takes no more than half of what is free there."""
        device = self.subject.run.device
        if device.type == "cuda":
            size = sum(x.nbytes for each in self.x.values() for x in each.values())
            if size < torch.cuda.mem_get_info(device)[0] / 2:
                self.x = {split: {name: x.to(device) for name, x in each.items()} for split, each in self.x.items()}

    def feed(self, places: dict[str, slice], held: Bool[Tensor, " n"]) -> Feed:
        """Of some places of some features."""
        how = self.settings
        if not self.streamed:
            x = {split: {name: each[name][part] for name, part in places.items()} for split, each in self.x.items()}
            scales = {name: self.scales[name].part(part) for name, part in places.items()}
            return cached_feed(x, self.y, held, scales, self.subject.run.device, how.batch_size, how.seed)
        feed = streamed_feed(self.subject, list(places), held, self.scales, how.batch_size, how.seed, how.augment)

        def cut(batches: Iterator[Batch]) -> Iterator[Batch]:
            return (({name: x[name][part] for name, part in places.items()}, y) for x, y in batches)

        return Feed(feed.steps, lambda n: cut(feed.epoch(n)), lambda: cut(feed.held_out()), lambda: cut(feed.val()))


def groups(sizes: dict[str, tuple[int, int]], heads: int, classes: int, batch_size: int, memory_gib: float) -> list[dict[str, slice]]:
    """The places whose heads are trained in the same passes: all, or as many at once as fit into the memory, at least one."""
    left, found = memory_gib * 2**30, [dict[str, slice]()]
    for name, (places, c) in sizes.items():
        at, each = 0, 8 * heads * classes * (c + batch_size)  # weights and momenta, logits and the exponentials of them
        while at < places:
            fit = min(places - at, int(left // each))
            if fit < 1 and found[-1]:
                found.append({})
                left = memory_gib * 2**30
                continue
            found[-1][name] = slice(at, at + max(1, fit))
            at, left = at + max(1, fit), left - each * max(1, fit)
            if at < places:
                found.append({})
                left = memory_gib * 2**30
    return found


def with_bar(feed: Feed, epochs: int, what: str, ranks: Ranks) -> Feed:
    """The same, its training shown step by step."""
    bar = tqdm(total=epochs * feed.steps, desc=what, disable=ranks.rank > 0 or not sys.stderr.isatty(), leave=False)

    def epoch(number: int) -> Iterator[Batch]:
        bar.update(number * feed.steps - bar.n)
        for batch in feed.epoch(number):
            yield batch
            bar.update()
        if number + 1 == epochs:
            bar.close()

    return feed._replace(epoch=epoch)


def probes(data: Data, memory_gib: float, keeper: DiskKeeper) -> list[tuple[dict[str, slice], dict[str, Found]]]:
    """The search over all places, group by group; each rank trains a part of the heads."""
    how, device, classes = data.settings, data.subject.run.device, len(data.subject.pictures.class_names)
    ranks = data.subject.ranks
    held = held_out(data.y["train"], how.held_out_frac, how.seed)
    by = "top1" if held.any() else "cross_entropy"
    if not held.any():
        say(f"{len(held)} pictures, no class with two: none to hold out, so cross-entropy on these themselves chooses", sys.stderr)
    batch = min(how.batch_size, int((~held).sum()))
    lrs, decays = grid_of([lr * batch / 256 for lr in how.base_lrs], how.weight_decays).float().to(device)
    found = []
    parts = groups(data.sizes, len(lrs), classes, batch, memory_gib)
    for number, places in enumerate(parts):
        many = {name: (part.stop - part.start, data.sizes[name][1]) for name, part in places.items()}
        grids = {name: Grid(lrs.repeat(p, 1), decays.repeat(p, 1), classes, c) for name, (p, c) in many.items()}
        what = "probes" if len(parts) == 1 else f"probes, part {number + 1} of {len(parts)}"
        feed = with_bar(data.feed(places, held), how.epochs, what, ranks)
        whole = with_bar(data.feed(places, torch.zeros_like(held)), how.epochs, f"{what}, the best", ranks) if how.refit else None
        stage = digest({name: [part.start, part.stop] for name, part in places.items()})
        found.append((places, search(feed, whole, grids, how.epochs, by, keeper, f"{stage}-", ranks)))
    return found


# ------------------------------------------------------------------------------------------------- what is told of it


def linear(subject: Subject, settings: ProbeSettings, names: Sequence[str], name: str, out: Path, memory_gib: float) -> dict[str, Any]:
    """`table`, `figures` and content of the result `name`; the figures, and the chosen weights as <name>-<feature>.pt, are in `out`.

    Every rank has to call it; the first has the figures.
    """
    sizes = shares(subject, settings, [*names, PIXELS])
    content: dict[str, Any] = {"features": {}, "weights": []}
    figures: list[str] = []
    keepers = []
    for some in [list(sizes)] if settings.augment else fitting(sizes, memory_gib):
        keepers.append(DiskKeeper(subject.cache, subject.key() | settings.protocol() | {"features": some}))
        for feature, (one, heads, drawn) in probed(Data(subject, settings, some, memory_gib), keepers[-1], memory_gib, name, out).items():
            content["features"][feature] = one
            content["weights"] += heads
            figures += drawn
    for keeper in keepers if subject.ranks.rank == 0 else ():
        keeper.drop()
    rows = [row for feature in sizes for row in table_rows(feature, content["features"][feature])]
    edge = [label_of(each) for each, one in content["features"].items() if one["at_edge"]]
    if edge and settings.label_percent == 100:
        say(f"{name}: the best learning rate for {', '.join(edge)} is at the edge of --base-lrs: try wider", sys.stderr)
    columns = ["features", "top-1 %", "top-5 %", "mean of classes %", "held-out top-1 %", "base lr", "weight decay"]
    return {"table": {"columns": columns, "rows": rows}, "figures": figures} | content


def probed(
    data: Data, keeper: DiskKeeper, memory_gib: float, name: str, out: Path
) -> dict[str, tuple[dict[str, Any], list[str], list[str]]]:
    """What is told of each feature; the first rank writes the files."""
    subject, found, told = data.subject, probes(data, memory_gib, keeper), {}
    for feature in data.names:
        parts, stem = [each[feature] for places, each in found if feature in places], f"{name}-{feature}"
        one = summary(parts, data.settings, data, feature) | {"vectors": "computed in every epoch" if data.streamed else "kept in memory"}
        told[feature] = one, list[str](), list[str]()
        if feature != PIXELS and subject.ranks.rank == 0:
            written = keep(out / f"{stem}.pt", {"features": feature}, weights(parts, data.scales[feature], subject))
            told[feature] = one, [f"{stem}.pt"] * written, draw(parts, one, subject.pictures.class_names, out, stem)
    return told


def summary(parts: list[Found], settings: ProbeSettings, data: Data, feature: str) -> dict[str, Any]:
    """One feature's numbers, per place where there are several; plain values."""
    best = torch.cat([part.best for part in parts]).tolist()
    pairs = grid_of(settings.base_lrs, settings.weight_decays).T.tolist()
    chosen = [{"base_lr": pairs[i][0], "weight_decay": pairs[i][1]} for i in best]
    held = torch.cat([part.held.top1 for part in parts])
    ends = {min(settings.base_lrs), max(settings.base_lrs)} if len(settings.base_lrs) > 2 else set()
    numbers = {at: torch.cat([getattr(part.val, at)[:, 0] for part in parts]) for at in ("top1", "top5")}
    one: dict[str, Any] = {at: round(float(value.mean()), 3) for at, value in numbers.items()}
    one |= {
        "held_out_top1": round(float(held.amax(1).mean()), 3),
        "at_edge": sum(each["base_lr"] in ends for each in chosen) * 2 > len(best),
    }
    if len(best) > 1:
        side = round(len(best) ** 0.5)
        return one | {"side": side, "top1_map": numbers["top1"].view(side, side).tolist(), "chosen": chosen}
    confusion = parts[0].val.confusion
    if confusion is None:
        raise RuntimeError(f"no confusion counts of {feature}")
    grid = [pair | {"top1": round(top, 3)} for pair, top in zip(_named(pairs), held[0].tolist(), strict=True)]
    return one | chosen[0] | per_class(confusion, data.subject.pictures.class_names) | {"grid_held_out": grid}


def _named(pairs: list[list[float]]) -> list[dict[str, float]]:
    return [{"base_lr": lr, "weight_decay": decay} for lr, decay in pairs]


def per_class(confusion: Int[Tensor, "m m"], names: Sequence[str]) -> dict[str, Any]:
    """Accuracy of each class that val has, their mean, and what is most often taken for what; percent of the true class's pictures."""
    shares = 100 * confusion / confusion.sum(1, keepdim=True)
    have = confusion.sum(1) > 0
    own = shares.diagonal()
    off = shares.nan_to_num(0).fill_diagonal_(0).flatten()
    top = off.topk(min(MOST_CONFUSED, len(off)))
    pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    confused = [[names[at // len(names)], names[at % len(names)], round(value, 2)] for value, at in pairs if value > 0]
    accuracy = {name: round(value, 2) for name, value, there in zip(names, own.tolist(), have.tolist(), strict=True) if there}
    return {"mean_of_classes": round(float(own[have].mean()), 3), "top1_of_class": accuracy, "most_confused": confused}


def table_rows(feature: str, one: dict[str, Any]) -> list[list[Any]]:
    """One row, or the mean and the ends of a map."""
    means = [round(one[at], 2) for at in ("top1", "top5")]
    if "top1_map" not in one:
        chosen = [round(one[at], 2) for at in ("mean_of_classes", "held_out_top1")] + [one["base_lr"], one["weight_decay"]]
        return [[label_of(feature), *means, *chosen]]
    side = one["side"]
    rows: list[list[Any]] = [[f"{feature}, mean of {side} x {side}", *means, None, round(one["held_out_top1"], 2), None, None]]
    flat = [value for row in one["top1_map"] for value in row]
    for word, at in (("best", flat.index(max(flat))), ("worst", flat.index(min(flat)))):
        chosen = list(one["chosen"][at].values())
        rows.append([f"{feature}, {word}: row {at // side}, column {at % side}", round(flat[at], 2), None, None, None, *chosen])
    return rows


def weights(parts: list[Found], scale: Scale, subject: Subject) -> dict[str, Any]:
    """The chosen classifiers, for vectors as the network gives them: weight [p m c] and bias [p m]."""
    at, both = 0, list[tuple[Float[Tensor, "p m c"], Float[Tensor, "p m"]]]()
    for part in parts:
        p = part.heads.weight.shape[0]
        both.append(scale.part(slice(at, at + p)).folded(part.heads))
        at += p
    weight, bias = (torch.cat(each).cpu() for each in zip(*both, strict=True))
    return {"weight": weight, "bias": bias, "class_names": list(subject.pictures.class_names), "step": subject.run.encoder.step}


def draw(parts: list[Found], one: dict[str, Any], names: Sequence[str], out: Path, stem: str) -> list[str]:
    """Names of the figures that could be drawn."""
    try:
        if "top1_map" in one:
            eval_figures.draw_map(out / f"{stem}.png", one["top1_map"])
            return [f"{stem}.png"]
        eval_figures.draw_confusion(out / f"{stem}-confusion.png", parts[0].val.confusion, names, one["most_confused"])
        return [f"{stem}-confusion.png"]
    except ImportError:
        say("no figures: matplotlib is missing, pip install -c constraints.txt -e '.[log]'", sys.stderr)
        return []
