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


def probes(train: Features, val: Features, device: torch.device) -> dict[str, dict[str, float]]:
    """{"linear_top1" and "knn_top1": {name: percent}} on the features of a training and a test set, those of one network on the device."""
    results: dict[str, dict[str, float]] = {"linear_top1": {}, "knn_top1": {}}
    for name in train[0]:
        train_x, train_y, val_x, val_y = (x.to(device) for x in (train[0][name], train[1], val[0][name], val[1]))
        results["linear_top1"][name] = round(probe.linear_top1(train_x, train_y, val_x, val_y), 2)
        results["knn_top1"][name] = round(probe.knn_top1(train_x, train_y, val_x, val_y), 2)
    return results
