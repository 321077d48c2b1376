"""What `cossl eval` reads: picture sets, the frozen vectors of their pictures, and the files that keep these between two calls."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, distributed
from tqdm import tqdm

from cossl.models import checkpoint, probe
from cossl.models.launch import first_rank, say
from cossl.models.linear_probe import Batch, Feed, Scale
from cossl.models.load import Encoder
from cossl.models.parallel import ALONE, Ranks, current_ranks
from cossl.pipelines.augment import normalize
from cossl.pipelines.batch import Loader, LoaderSpec, to_device
from cossl.pipelines.views import ViewSpec, evaluation
from cossl.tools.eval_pictures import PictureSet, digest
from cossl.tools.opened import Opened
from cossl.train import EVAL_BATCH

FEATURES = ("global", "local_mean", "position")
VERSION = 1
"""Of the vectors and of what is made of them: raised with each change of decoding, cutting, network or protocol that moves a number."""
PIXELS = "pixels"
"""The floor: `probe.pixels`."""


def label_of(feature: str) -> str:
    """What a table calls it."""
    return "12 x 12 pixels" if feature == PIXELS else feature


Vectors = dict[str, Float[Tensor, "p n c"]]
"""By feature, of n pictures at p places: 1, or for `position` all of the map, row by row."""


# ------------------------------------------------------------------------------------------------- a run on a picture set


class Subject(NamedTuple):
    """A run and the pictures that it is asked about, how these are cut, and who shares the work."""

    run: Opened
    pictures: PictureSet
    px: int
    centre_frac: float
    workers: int
    cache: Path
    ranks: Ranks = ALONE

    def key(self) -> dict[str, Any]:
        """What the vectors depend on: plain values."""
        cut = {"px": self.px, "centre_frac": self.centre_frac}
        return {"version": VERSION, "weights": self.run.weights, "pictures": self.pictures.identity} | cut

    def open(
        self,
        split: str,
        batch_size: int = EVAL_BATCH,
        seed: int | None = None,
        augment: bool = False,
        subset: Int[np.ndarray, " n"] | None = None,
    ) -> Loader:
        """The pictures in order; with a seed shuffled, perhaps as random crops and flips. Each rank has a part of every batch.

        subset: the indices of those that are wanted, None for all of the split.
        """
        views = (crop_and_flip(self.px),) if augment else evaluation(self.px, self.centre_frac)
        spec = LoaderSpec(views, batch_size, seed or 0, workers=self.workers, shuffle=seed is not None, subset=subset)
        return self.pictures.open(split, replace(spec, rank=self.ranks.rank, world_size=self.ranks.world_size))


def crop_and_flip(px: int) -> ViewSpec:
    """The usual augmentation of a linear probe: a random crop of 8 to 100 % of the picture, flipped half of the time."""
    return ViewSpec(px, jitter_p=0, grayscale_p=0)


@torch.no_grad()
def represent(encoder: Encoder, images: UInt8[Tensor, "b 3 s s"], names: Collection[str]) -> Vectors:
    """The vectors of these pictures by feature; float32, on their device."""
    found: Vectors = {PIXELS: probe.pixels(images)[None]} if PIXELS in names else {}
    if set(names) - {PIXELS}:
        whole, y = encoder(normalize(images))
        local = y.flatten(2).permute(2, 0, 1).float()
        found |= {"global": whole.float()[None], "local_mean": local.mean(0)[None], "position": local.contiguous()}
    return {name: found[name] for name in names}


def shapes(subject: Subject, names: Collection[str]) -> dict[str, tuple[int, int]]:
    """{feature: (places, numbers of a vector)}."""
    blank = torch.zeros(1, 3, subject.px, subject.px, dtype=torch.uint8, device=subject.run.device)
    return {name: (x.shape[0], x.shape[2]) for name, x in represent(subject.run.encoder, blank, names).items()}


def gib(subject: Subject, sizes: dict[str, tuple[int, int]], split: str) -> float:
    """Size of these features of a split, as float32."""
    return sum(p * c for p, c in sizes.values()) * len(subject.pictures.labels[split]) * 4 / 2**30


def fitting(sizes: Mapping[str, float], memory_gib: float) -> list[list[str]]:
    """The features of these GiB in parts that fit into the memory; those that do not fit by themselves are one part, the last."""
    parts, left = [list[str]()], memory_gib
    for name in (name for name, size in sizes.items() if size <= memory_gib):
        if sizes[name] > left:
            parts.append([])
            left = memory_gib
        parts[-1].append(name)
        left -= sizes[name]
    too_large = [name for name, size in sizes.items() if size > memory_gib]
    return [part for part in (*parts, too_large) if part]


def extract(subject: Subject, split: str, names: Collection[str], keep: Bool[Tensor, " n"] | None = None) -> Vectors:
    """The vectors of all pictures of a split in order, or of those to `keep`, on the CPU; every rank has to call it and gets them all."""
    rows = None if keep is None else keep.nonzero()[:, 0].numpy()
    loader, device, count = subject.open(split, subset=rows), subject.run.device, len(subject.pictures.labels[split])
    row = torch.arange(count) if keep is None else keep.cumsum(0) - 1
    found = {name: torch.zeros(p, int(row.max()) + 1, c) for name, (p, c) in shapes(subject, names).items()}
    silent = subject.ranks.rank > 0 or not sys.stderr.isatty()
    for batch in tqdm(to_device(loader.epoch(0), device), total=len(loader), desc=f"features of {split}", disable=silent, leave=False):
        (images,) = batch.split()
        for name, x in represent(subject.run.encoder, images, names).items():
            found[name][:, row[batch.index.cpu()]] = x.cpu()
    loader.close()
    if subject.ranks.world_size > 1:
        for x in found.values():
            distributed.all_reduce(x)  # each row is zero on all ranks but one
    return found


# ------------------------------------------------------------------------------------------------- kept on disk


def features(subject: Subject, split: str, names: Collection[str]) -> Vectors:
    """The vectors of a split, from the cache or into it. Every rank has to call it. A damaged file is said and made again."""
    files = {name: (_path(subject, split, name), _key(subject, split, name)) for name in names}
    found = {name: x for name in names if (x := kept(*files[name])) is not None} if subject.ranks.rank == 0 else {}
    have = first_rank(lambda: list(found))
    if subject.ranks.rank:
        found = {name: x for name in have if (x := kept(*files[name])) is not None}
        if len(found) < len(have):
            raise RuntimeError(f"{subject.cache} is not the same folder for all ranks: put the run on a disk that they share")
    if missing := [name for name in names if name not in have]:
        found |= extract(subject, split, missing)
        for name in missing if subject.ranks.rank == 0 else ():
            path, key = files[name]
            for older in subject.cache.glob(f"{path.name.rpartition('-')[0]}-*.pt"):  # of other weights, or of pictures as they were
                older.unlink(missing_ok=True)
            keep(path, key, found[name])
    return {name: found[name] for name in names}


def _path(subject: Subject, split: str, name: str) -> Path:
    """By pictures and cut, and by all: so that those of earlier weights are found."""
    key = _key(subject, split, name)
    return subject.cache / f"{split}-{name}-{digest([subject.pictures.name, subject.px, subject.centre_frac])}-{digest(key)}.pt"


def _key(subject: Subject, split: str, name: str) -> dict[str, Any]:
    key = subject.key() | {"split": split, "feature": name}
    return {at: value for at, value in key.items() if name != PIXELS or at != "weights"}


KEPT = re.compile(r"((train|val)-[a-z_]+|heads)-[0-9a-f]{16}(-[\w-]+)?\.pt")
"""The names of what is kept between two calls."""


def kept(path: Path, key: dict[str, Any]) -> Any:
    """What was kept under this key, None where there is nothing whole."""
    if not path.exists():
        return None
    try:
        state = checkpoint.load(path)
        if state.get("key") == key:
            return state["content"]
    except (ValueError, KeyError):
        pass
    say(f"{path.name} in {path.parent} is damaged: made again", file=sys.stderr)
    return None


def keep(path: Path, key: dict[str, Any], content: Any) -> bool:
    """Writes it whole or not at all; where the disk is full it says so and goes on without. Whether it was written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(path, {"key": key, "content": content})
        return True
    except OSError as error:
        say(f"not kept for the next time: {error}", file=sys.stderr)
        return False


def forget(cache: Path, trained: bool = True) -> None:
    """Removes the vectors from a cache, half-trained networks too if asked, and the folder where it is empty then; other files stay."""
    for path in cache.glob("*.pt"):
        if KEPT.fullmatch(path.name) and (trained or not path.name.startswith("heads-")):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        cache.rmdir()


class DiskKeeper:
    """Heads under training, kept beside the features by the first rank for all of them; `linear_probe.Keeper`."""

    def __init__(self, folder: Path, key: dict[str, Any], every_s: float = 60) -> None:
        """At most one state in `every_s` seconds, but for the last of a stage. The key holds all that the training depends on."""
        self.folder, self.key, self.every_s, self._last = folder, key, every_s, time.monotonic()

    def _path(self, stage: str) -> Path:
        return self.folder / f"heads-{digest(self.key)}-{stage}.pt"

    def get(self, stage: str) -> tuple[int, dict[str, Any]] | None:
        found = first_rank(lambda: kept(self._path(stage), self.key))
        return None if found is None else (found["epochs"], found["heads"])

    def put(self, stage: str, epochs: int, state: Callable[[], dict[str, Any]], last: bool) -> None:
        if last or first_rank(lambda: time.monotonic() - self._last >= self.every_s):
            heads = state()  # every rank's part
            if current_ranks().rank == 0:
                keep(self._path(stage), self.key, {"epochs": epochs, "heads": heads})
            self._last = time.monotonic()

    def drop(self) -> None:
        """Once the result is written."""
        for path in self.folder.glob(f"heads-{digest(self.key)}-*.pt"):
            path.unlink()


# ------------------------------------------------------------------------------------------------- as the probe is fed

SCALE_PICTURES = 20_000
CHUNK = 4096  # vectors at once where nothing is trained


def cached_feed(
    x: dict[str, Vectors],
    y: dict[str, Int[Tensor, " n"]],
    held: Bool[Tensor, " n"],
    scales: dict[str, Scale],
    device: torch.device,
    batch_size: int,
    seed: int,
) -> Feed:
    """A feed of vectors in memory. Where nothing is held out, `held_out` gives all that is trained on."""
    rest = (~held).nonzero()[:, 0]
    size = min(batch_size, len(rest))

    def some(split: str, rows: Int[Tensor, " b"]) -> Batch:
        vectors = {name: scales[name](each[:, rows.to(each.device)].to(device)) for name, each in x[split].items()}
        return vectors, y[split][rows].to(device)

    def epoch(number: int) -> Iterator[Batch]:
        turn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(1_000_003 * seed + number))]
        return (some("train", rows) for rows in turn[: len(rest) // size * size].split(size))

    def in_order(split: str, rows: Int[Tensor, " b"]) -> Iterator[Batch]:
        return (some(split, part) for part in rows.split(CHUNK))

    kept_out = held.nonzero()[:, 0] if held.any() else rest
    return Feed(len(rest) // size, epoch, lambda: in_order("train", kept_out), lambda: in_order("val", torch.arange(len(y["val"]))))


def joint_vectors(
    subject: Subject, loader: Loader, batch_size: int, number: int, names: Collection[str], wanted: Bool[Tensor, " n"] | None = None
) -> Iterator[Batch]:
    """Vectors and labels of each batch of an epoch, of the wanted pictures alone. No batch is empty.

    Every rank runs the network on its part of each batch and gets the whole batch, in the loader's order; every rank has to go along.
    """
    sizes, device, ranks = shapes(subject, names), subject.run.device, subject.ranks
    batches, share = to_device(loader.epoch(number), device), -(-batch_size // ranks.world_size)
    for _ in range(len(loader)):
        x = {name: torch.zeros(p, 0, c, device=device) for name, (p, c) in sizes.items()}
        label = torch.zeros(0, dtype=torch.int64, device=device)
        if (batch := next(batches, None)) is not None:
            (images,), label = batch.split(), batch.label.clone()  # a part of a batch keeps all of its memory
            if wanted is not None:
                images, label = images[wanted[batch.index]], label[wanted[batch.index]]
            x = represent(subject.run.encoder, images, names) if len(label) else x
        if ranks.world_size > 1:
            x, label = _gathered(x, label, share, ranks)
        if len(label):
            yield x, label


def _gathered(x: Vectors, label: Int[Tensor, " b"], share: int, ranks: Ranks) -> Batch:
    """Those of all ranks, of which none has more than `share` pictures."""

    def everyone(part: Tensor, blank: int) -> Tensor:
        padded = part.new_full((share, *part.shape[1:]), blank)
        padded[: len(part)] = part
        return ranks.gather(padded)

    labels = everyone(label, -1)
    there = (labels >= 0).nonzero()[:, 0]
    return {name: everyone(each.transpose(0, 1), 0)[there].transpose(0, 1) for name, each in x.items()}, labels[there]


def streamed_feed(
    subject: Subject, names: Collection[str], held: Bool[Tensor, " n"], scales: dict[str, Scale], batch_size: int, seed: int, augment: bool
) -> Feed:
    """A feed that computes the vectors anew in every epoch; a batch is without those of its pictures that are held out."""
    out, size = held.to(subject.run.device), shared_batch(subject, batch_size)

    def scaled(loader: Loader, batch_size: int, number: int, wanted: Bool[Tensor, " n"] | None) -> Iterator[Batch]:
        for x, y in joint_vectors(subject, loader, batch_size, number, names, wanted):
            yield {name: scales[name](each) for name, each in x.items()}, y

    def whole(split: str, rows: Int[np.ndarray, " n"] | None) -> Iterator[Batch]:
        loader = subject.open(split, subset=rows)
        yield from scaled(loader, EVAL_BATCH, 0, None)
        loader.close()

    shuffled = subject.open("train", size, seed, augment)
    trained, judged = (~out, held.nonzero()[:, 0].numpy()) if held.any() else (None, None)

    def epoch(number: int) -> Iterator[Batch]:
        return scaled(shuffled, size, number, trained)

    return Feed(len(shuffled), epoch, lambda: whole("train", judged), lambda: whole("val", None))


def shared_batch(subject: Subject, batch_size: int) -> int:
    """The batch size, or where train has fewer pictures the most that divides among the ranks."""
    count, world = len(subject.pictures.labels["train"]), subject.ranks.world_size
    return batch_size if batch_size <= count else max(world, count // world * world)


def streamed_scales(subject: Subject, names: Collection[str], seed: int) -> dict[str, Scale]:
    """Those of random training pictures, SCALE_PICTURES at most, as they are in evaluation."""
    world, seen = subject.ranks.world_size, -(-SCALE_PICTURES // EVAL_BATCH)
    size = shared_batch(subject, EVAL_BATCH // world * world)
    loader = subject.open("train", size, seed)
    scales = {}
    for name in names:
        batches = itertools.islice(joint_vectors(subject, loader, size, 0, [name]), seen)
        scales[name] = Scale.of(x[name] for x, _ in batches)
    loader.close()
    return scales
