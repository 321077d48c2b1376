"""What `cossl robustness` asks: a run's frozen backbone with a linear head on it, and the pictures that it is asked about."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from cossl.models import checkpoint
from cossl.models.load import Encoder
from cossl.models.probe import PROTOCOL, LinearProbe, fit_probe
from cossl.pipelines import find_split
from cossl.pipelines.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from cossl.pipelines.torch_loader import open_pictures
from cossl.tools.opened import Opened, open_split

CENTRE_FRAC = 224 / 256
PROBE_FILE = "probe.pt"


class Classifier(NamedTuple):
    """The frozen encoder and the linear head on its global vectors; every way to ask it is differentiable."""

    encoder: Encoder
    probe: LinearProbe

    def __call__(self, normalized: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b m"]:
        """Logits of pictures normalized by ImageNet's mean and deviation."""
        return self.probe.logits(self.encoder.represent(normalized))

    def of_pixels(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b m"]:
        """Logits of pictures in [0, 1]."""
        channels = zip(x.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)  # numbers: a tensor of them would be copied at each call
        return self(torch.stack([(channel - mean) / std for channel, mean, std in channels], 1))

    def of_map(self, y: Float[Tensor, "b c n n"]) -> Float[Tensor, "b m"]:
        """Logits of feature maps before pooling."""
        return self.probe.logits(self.encoder.network.pool(y))


class Some(NamedTuple):
    """Some of the pictures, on the device."""

    images: UInt8[Tensor, "b 3 s s"]
    label: Int[Tensor, " b"]
    number: Int[Tensor, " b"]
    """Of each picture in its split."""


class Hits:
    """How many answers were right, counted on the device, by name."""

    def __init__(self) -> None:
        self._right: dict[Any, Tensor] = {}
        self._finite: Tensor | None = None
        self._asked: dict[Any, int] = {}

    def add(self, name: Any, logits: Float[Tensor, "b m"], label: Int[Tensor, " b"]) -> None:
        right, finite = (logits.argmax(1) == label).sum(), logits.isfinite().all()
        self._right[name] = self._right[name] + right if name in self._right else right
        self._finite = finite if self._finite is None else self._finite & finite
        self._asked[name] = self._asked.get(name, 0) + len(label)

    def top1(self, name: Any) -> float:
        """Percent. RuntimeError if logits were not finite: the largest of such is no answer."""
        if not self._finite:
            raise RuntimeError("the network's answers are not finite numbers: its weights, or the head fitted to it, are broken")
        return round(100 * int(self._right[name]) / self._asked[name], 3)


def choose(labels: Int[np.ndarray, " n"], at_most: int, seed: int) -> Int[np.ndarray, " k"]:
    """Ascending numbers of at most so many pictures (0: all), as many of each class as can be, drawn by the seed.

    Where the number does not divide among the classes, some have one more; a class that has too few gives all, and the others more.
    """
    if not at_most or at_most >= len(labels):
        return np.arange(len(labels))
    drawn = np.random.default_rng(seed).permutation(len(labels))
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.empty(len(labels), np.int64)  # of each picture among those of its class
    turn[by_class] = np.arange(len(labels)) - starts
    return np.sort(drawn[np.argsort(turn[drawn], kind="stable")][:at_most])


@dataclass(frozen=True)
class Judge:
    """A run, the pictures to ask about, and how; what takes long is made when first asked for."""

    run: Opened
    data: Path
    pictures: int
    """At most so many of val, 0 for all."""
    probe_pictures: int
    """At most so many of train for the head, 0 for all."""
    seed: int
    batch_size: int
    workers: int
    view_px: int = 0
    """Side of the view, 0 for the run's --eval-px."""

    @cached_property
    def chosen(self) -> Int[Tensor, " k"]:
        """Numbers of the pictures in val."""
        return torch.from_numpy(choose(self._val[0], self.pictures, self.seed))

    @property
    def px(self) -> int:
        return self.view_px or self.run.config.eval_px

    @property
    def _probe_path(self) -> Path:
        """Another size has a file of its own, so that one command which needs two heads fits each of them once."""
        name = PROBE_FILE if self.px == self.run.config.eval_px else f"probe-{self.px}px.pt"
        return self.run.run_dir / "robustness" / name

    @cached_property
    def weights(self) -> str:
        """16 hexadecimal digits of the encoder's weights: a run that went on gives others."""
        digest = hashlib.sha256()
        for name, tensor in self.run.encoder.state_dict().items():
            digest.update(name.encode() + tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def probe_protocol(self) -> dict[str, Any]:
        """All that the fitted head depends on."""
        linear = {key: value for key, value in PROTOCOL.items() if key.startswith("linear_")}
        how = {"train_pictures": self.probe_pictures or "all", "px": self.px, "centre_frac": CENTRE_FRAC, "seed": self.seed}
        return {"data": str(self.data.resolve()), "weights": self.weights, **how, **linear}

    def protocol(self, **own: Any) -> dict[str, Any]:
        """Of every result: which pictures, which head, which weights."""
        of = len(self._val[0])
        chosen = "all" if len(self.chosen) == of else f"class-balanced, drawn by seed {self.seed}"
        which = {"split": "val", "pictures": len(self.chosen), "of_pictures": of, "chosen": chosen, "seed": self.seed}
        return {**which, "px": self.px, "centre_frac": CENTRE_FRAC, "features": "pooled, eval mode", **own, "probe": self.probe_protocol}

    @cached_property
    def _val(self) -> tuple[Int[np.ndarray, " n"], tuple[str, ...]]:
        return self._labels("val")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._val[1]

    @cached_property
    def classifier(self) -> Classifier:
        """Fitted to train, or read from the run's folder, where it was put when it was fitted. ValueError if val has other classes."""
        path = self._probe_path
        parts = _kept_probe(path, self.probe_protocol)
        if parts is None:
            path.parent.mkdir(exist_ok=True)
            fitted = self._fit()
            parts = dict(zip(LinearProbe._fields, (part.cpu() for part in fitted), strict=True))
            checkpoint.write(path, {"protocol": self.probe_protocol, **parts})
        return Classifier(self.run.encoder, LinearProbe(**{name: part.to(self.run.device) for name, part in parts.items()}))

    @torch.no_grad()
    def _fit(self) -> LinearProbe:
        labels, names = self._labels("train")
        if names != self.class_names:
            raise ValueError(f"train and val of {self.data} have different classes: a head fitted to one cannot be asked about the other")
        chosen = torch.from_numpy(choose(labels, self.probe_pictures, self.seed))
        rows, found = [], []
        for some in self.some("train features", "train", chosen):
            rows.append(self.run.encoder.represent(normalize(some.images)).float().cpu())
            found.append(some.label)
        return fit_probe(torch.cat(rows).to(self.run.device), torch.cat(found))

    def _labels(self, split: str) -> tuple[Int[np.ndarray, " n"], tuple[str, ...]]:
        source = open_pictures(find_split(self.data, split, self._backend))
        return source.labels, source.class_names

    @property
    def _backend(self) -> str:
        backend = self.run.config.loader.backend
        return "auto" if backend == "synthetic" else backend

    def some(
        self,
        what: str,
        split: str = "val",
        chosen: Int[Tensor, " k"] | None = None,
        px: int = 0,
        centre_frac: float = CENTRE_FRAC,
        bar: tqdm | None = None,
    ) -> Iterator[Some]:
        """The chosen pictures, in order, at most `batch_size` at once, with a bar of their number unless there is one already."""
        chosen = self.chosen if chosen is None else chosen
        loader = open_split(self.run, self.data, split, px or self.px, self.workers, centre_frac, chosen.numpy())
        own = self.bar(what, len(chosen)) if bar is None else None
        try:
            for batch in loader.epoch(0):
                (images,) = batch.split()
                for part in zip(*(each.split(self.batch_size) for each in (images, batch.label, batch.index)), strict=True):
                    yield Some(*(tensor.to(self.run.device) for tensor in part))
                    if own is not None:
                        own.update(len(part[0]))
        finally:
            loader.close()
            if own is not None:
                own.close()

    def bar(self, what: str, total: int) -> tqdm:
        return tqdm(total=total, desc=f"{self.run.run_dir.name}: {what}", disable=not sys.stderr.isatty(), leave=False, unit=" pictures")


def _kept_probe(path: Path, protocol: dict[str, Any]) -> dict[str, Tensor] | None:
    """The parts of a head fitted before, if it was fitted in the same way. ValueError for a damaged file."""
    if not path.exists():
        return None
    state = checkpoint.load(path, "remove it, and the head is fitted again")
    if state.get("protocol") != protocol:
        return None
    parts = {name: state[name] for name in LinearProbe._fields if isinstance(state.get(name), Tensor)}
    if len(parts) < len(LinearProbe._fields):
        raise ValueError(f"{path} holds no head: remove it, and the head is fitted again")
    return parts
