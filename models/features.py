"""Frozen features of pictures, and what the probes say of them."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cossl.models import probe

Features = tuple[dict[str, Tensor], Tensor]


class Represents(Protocol):
    """A network that gives one vector for each picture."""

    def eval(self) -> "Represents":
        """The same, with the statistics it has collected."""

    def represent(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c"]:
        """The vectors."""


@torch.no_grad()
def features(
    networks: Mapping[str, Represents],
    batches: Iterable[tuple[UInt8[Tensor, "b 3 s s"], Float[Tensor, "b 3 s s"], Int[Tensor, " b"]]],
) -> Features:
    """({name: vectors [n c] of each network in eval mode, "pixels": 12 x 12 pixels}, labels [n]), all on the CPU.

    A batch is (pictures, the same normalized, labels).
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in (*networks, "pixels")}
    labels = []
    for images, normalized, label in batches:
        for name, network in networks.items():
            rows[name].append(network.eval().represent(normalized).float().cpu())
        rows["pixels"].append(probe.pixels(images).cpu())
        labels.append(label.clone())  # a part of a batch keeps all of its memory
    return {name: torch.cat(parts) for name, parts in rows.items()}, torch.cat(labels)


def probes(train: Features, val: Features) -> dict[str, dict[str, float]]:
    """{"linear_top1" and "knn_top1": {name: percent}} on the features of a training and a test set."""
    (train_x, train_y), (val_x, val_y) = train, val
    measures = {"linear_top1": probe.linear_top1, "knn_top1": probe.knn_top1}
    return {
        protocol: {name: round(measure(train_x[name], train_y, val_x[name], val_y), 2) for name in train_x}
        for protocol, measure in measures.items()
    }
