"""What `cossl eval` reads: picture sets, the frozen vectors of their pictures, and the files that keep these between two calls."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator
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
from cossl.models.run_status import checkpoints
from cossl.pipelines import LoaderConfig, find_split, make_loader
from cossl.pipelines.augment import normalize
from cossl.pipelines.batch import Loader, LoaderSpec, to_device
from cossl.pipelines.torch_loader import Pictures, TorchLoader
from cossl.pipelines.views import ViewSpec, evaluation
from cossl.tools.opened import Opened
from cossl.train import EVAL_BATCH

FEATURES = ("global", "local_mean", "position")
PIXELS = "pixels"
"""The floor: `probe.pixels`."""


def label_of(feature: str) -> str:
    """What a table calls it."""
    return "12 x 12 pixels" if feature == PIXELS else feature


Vectors = dict[str, Float[Tensor, "p n c"]]
"""By feature, of n pictures at p places: 1, or for `position` all of the map, row by row."""


class PictureSet(NamedTuple):
    """Pictures of a train and a val split with the same classes, from wherever they come."""

    name: str
    identity: dict[str, Any]
    """What tells it from another set, or from itself before it was changed: plain values."""
    class_names: tuple[str, ...]
    labels: dict[str, Int[Tensor, " n"]]
    """Of all pictures of a split in order."""
    open: Callable[[str, LoaderSpec], Loader]


def folder_set(data: Path, how: LoaderConfig) -> PictureSet:
    """The pictures of a folder with train.beton and val.beton, or with image folders train/ and val/."""
    backend = "auto" if how.backend == "synthetic" else how.backend

    def open_(split: str, spec: LoaderSpec) -> Loader:
        return make_loader(backend, find_split(data, split, backend), spec)

    sources = {split: find_split(data, split, backend) for split in ("train", "val")}
    marks = {split: [_mark(path) for path in _changing(source)] for split, source in sources.items()}
    return _picture_set(data.resolve().name, {"data": str(data.resolve()), "files": digest(marks)}, open_)


def _changing(source: Path) -> list[Path]:
    """What has another size or time when pictures are added or removed."""
    return [source] if source.is_file() else [source, *sorted(path for path in source.iterdir() if path.is_dir())]


def _mark(path: Path) -> list[Any]:
    state = path.stat()
    return [path.name, state.st_size, state.st_mtime_ns]


def dataset_set(name: str, root: Path) -> PictureSet:
    """The pictures of one of torchvision's datasets, which the user has below `root`. FileNotFoundError of one line if not."""
    sets = {split: _torchvision(name, root, split) for split in ("train", "val")}

    def open_(split: str, spec: LoaderSpec) -> Loader:
        return TorchLoader(sets[split], spec)

    labels = {split: hashlib.sha256(pictures.labels.tobytes()).hexdigest() for split, pictures in sets.items()}
    return _picture_set(name, {"dataset": name, "labels": digest(labels)}, open_)


def _torchvision(name: str, root: Path, split: str) -> Pictures:
    from cossl.tools.eval_datasets import DATASETS, DatasetPictures

    return DatasetPictures(name, DATASETS[name][split], root)


def _picture_set(name: str, identity: dict[str, Any], open_: Callable[[str, LoaderSpec], Loader]) -> PictureSet:
    names, labels = {}, {}
    for split in ("train", "val"):
        loader: Any = open_(split, LoaderSpec(evaluation(32), 1, workers=0, shuffle=False))
        source = loader.pictures if hasattr(loader, "pictures") else loader.beton
        names[split], labels[split] = loader.class_names, torch.as_tensor(source.labels, dtype=torch.int64)
        loader.close()
    if names["train"] != names["val"]:
        raise ValueError(f"{name}: train and val have different classes")
    if len(names["val"]) < 2:
        raise ValueError(f"{name}: pictures of {len(names['val'])} class, expected 2 or more")
    counts = {split: len(each) for split, each in labels.items()}
    return PictureSet(name, identity | {"counts": counts, "classes": digest(names["train"])}, names["train"], labels, open_)


def digest(value: Any) -> str:
    """16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- a run on a picture set


class Subject(NamedTuple):
    """A run and the pictures that it is asked about, how these are cut, and who shares the work."""

    run: Opened
    pictures: PictureSet
    checkpoint: Path
    px: int
    centre_frac: float
    workers: int
    cache: Path
    ranks: Ranks = ALONE

    def key(self) -> dict[str, Any]:
        """What the vectors depend on: plain values."""
        network = {"checkpoint": _mark(self.checkpoint), "step": self.run.encoder.step}
        return network | {"pictures": self.pictures.identity, "px": self.px, "centre_frac": self.centre_frac}

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


def checkpoint_path(run_dir: Path, name: str) -> Path:
    """The file asked for, else the newest."""
    return run_dir / (name or next(iter(checkpoints(run_dir))))


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


def extract(subject: Subject, split: str, names: Collection[str], keep: Bool[Tensor, " n"] | None = None) -> Vectors:
    """The vectors of all pictures of a split in order, or of those to `keep`, on the CPU; every rank has to call it and gets them all."""
    loader, device, count = subject.open(split), subject.run.device, len(subject.pictures.labels[split])
    row = torch.arange(count) if keep is None else (keep.cumsum(0) - 1).masked_fill(~keep, -1)
    found = {name: torch.zeros(p, int(row.max()) + 1, c) for name, (p, c) in shapes(subject, names).items()}
    silent = subject.ranks.rank > 0 or not sys.stderr.isatty()
    for batch in tqdm(to_device(loader.epoch(0), device), total=len(loader), desc=f"features of {split}", disable=silent, leave=False):
        at = row[batch.index.cpu()]
        if (wanted := at >= 0).any():
            (images,) = batch.split()
            for name, x in represent(subject.run.encoder, images if wanted.all() else images[wanted.to(device)], names).items():
                found[name][:, at[wanted]] = x.cpu()
    loader.close()
    if subject.ranks.world_size > 1:
        for x in found.values():
            distributed.all_reduce(x)  # each row is zero on all ranks but one
    return found


# ------------------------------------------------------------------------------------------------- kept on disk


def features(subject: Subject, split: str, names: Collection[str]) -> Vectors:
    """The vectors of a split, from the cache or into it. Every rank has to call it. A damaged file is said and made again."""
    files = {name: (subject.cache / f"{split}-{name}-{digest(key)}.pt", key) for name in names for key in [_key(subject, split, name)]}
    found = {name: x for name in names if (x := kept(*files[name])) is not None} if subject.ranks.rank == 0 else {}
    have = first_rank(lambda: list(found))
    if subject.ranks.rank:
        found = {name: x for name in have if (x := kept(*files[name])) is not None}
        if len(found) < len(have):
            raise RuntimeError(f"{subject.cache} is not the same folder for all ranks: put the run on a disk that they share")
    if missing := [name for name in names if name not in have]:
        found |= extract(subject, split, missing)
        for name in missing if subject.ranks.rank == 0 else ():
            keep(*files[name], found[name])
    return {name: found[name] for name in names}


def _key(subject: Subject, split: str, name: str) -> dict[str, Any]:
    key = subject.key() | {"split": split, "feature": name}
    return {at: value for at, value in key.items() if name != PIXELS or at not in ("checkpoint", "step")}


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


def keep(path: Path, key: dict[str, Any], content: Any) -> None:
    """Writes it whole or not at all; where the disk is full it says so and goes on without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(path, {"key": key, "content": content})
    except OSError as error:
        say(f"not kept for the next time: {error}", file=sys.stderr)


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

    def whole(split: str, wanted: Bool[Tensor, " n"] | None) -> Iterator[Batch]:
        loader = subject.open(split)
        yield from scaled(loader, EVAL_BATCH, 0, wanted)
        loader.close()

    shuffled = subject.open("train", size, seed, augment)
    trained = ~out if held.any() else None
    return Feed(
        len(shuffled), lambda number: scaled(shuffled, size, number, trained), lambda: whole("train", out), lambda: whole("val", None)
    )


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
