"""Random numbers of corruptions: pure functions of (seed, corruption, severity, picture index), a whole batch at a time on any device.

The generator is the one of `cossl.pipelines.geometry`, a hash of a key and a slot number, here in 64-bit tensor operations. So a picture
meets the same numbers in any batch, in any order, on a CPU and on a GPU.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cossl.pipelines.geometry import stream, uniform

CORRUPTION = 16  # the first of a corruption's purposes in `geometry.stream`: one for each `which`
BITS = 24  # of a uniform number: what a float32 in [0, 1) holds exactly
_GOLDEN, _MIX_1, _MIX_2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as signed numbers


def _mixed_down(z: Int[Tensor, "b n"], bits: int) -> Int[Tensor, "b n"]:
    """z ^ (z >> bits), the shift a logical one; in place."""
    return z.bitwise_xor_((z >> bits).bitwise_and_((1 << (64 - bits)) - 1))


class Draws:
    """The numbers of one corruption at one severity for the pictures of a batch. `which` numbers independent streams."""

    def __init__(self, seed: int, corruption: int, severity: int, index: Int[Tensor, " b"], device: torch.device | None = None) -> None:
        """Numbers on `device`, else where the index is. Trap: the host waits for an index that lies on a GPU."""
        self.seed, self.corruption, self.severity, self.device = seed, corruption, severity, device or index.device
        self.index = index.tolist()

    def keys(self, which: int) -> list[int]:
        """Of each picture's stream."""
        return [int(stream(self.seed, self.severity, i, self.corruption, CORRUPTION + which)) for i in self.index]

    def _bits(self, which: int, count: int) -> Int[Tensor, "b n"]:
        """64 random bits in each of the slots 0 to count - 1."""
        keys = torch.from_numpy(np.array(self.keys(which), np.uint64).view(np.int64)).to(self.device)
        z = torch.arange(1, count + 1, device=self.device).mul_(_GOLDEN)[None] + keys[:, None]
        z = _mixed_down(z, 30).mul_(_MIX_1)
        z = _mixed_down(z, 27).mul_(_MIX_2)
        return _mixed_down(z, 31)

    def integers(self, which: int, *shape: int) -> Int[Tensor, "b ..."]:
        """Uniform in [0, 2 ** BITS)."""
        bits = self._bits(which, math.prod(shape)).bitwise_right_shift_(64 - BITS).bitwise_and_((1 << BITS) - 1)
        return bits.view(-1, *shape)

    def uniform(self, which: int, *shape: int) -> Float[Tensor, "b ..."]:
        """Uniform in [0, 1)."""
        return self.integers(which, *shape).float().mul_(2.0**-BITS)

    def normal(self, which: int, *shape: int) -> Float[Tensor, "b ..."]:
        """Normal, of mean 0 and deviation 1, by Box and Muller's formula: two of each slot. None is further out than 5.8."""
        count = math.prod(shape)
        bits = self._bits(which, -(-count // 2))
        radius = ((bits >> (64 - BITS)) & ((1 << BITS) - 1)).add_(1).float().mul_(2.0**-BITS).log_().mul_(-2).sqrt_()
        angle = ((bits >> (64 - 2 * BITS)) & ((1 << BITS) - 1)).float().mul_(2 * math.pi * 2.0**-BITS)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count].reshape(-1, *shape)

    def few(self, which: int, count: int, low: float, high: float) -> Float[np.ndarray, "b n"]:
        """Uniform in [low, high), as numbers of the host: angles, places."""
        return np.array([[uniform(np.uint64(key), slot, low, high) for slot in range(count)] for key in self.keys(which)])
