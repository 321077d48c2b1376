"""The processes that share a batch, in plain numbers: what a loss needs of them, and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _itself(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Ranks:
    """This process among the `world_size` that share each batch; alone by default."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Tensor], Tensor] = _itself
    """[b ...] of this process to [world_size * b ...] of all, in order of rank, without gradient."""


ALONE = Ranks()
