"""The processes that share a batch: what a loss needs of them, batch norms over all of them, and the wrap that averages gradients.

With n processes, each on its own n-th of the batch, `distribute(CoSsl(config, loss, current_ranks()))` takes the steps that one process
takes on the whole batch, to rounding.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


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


def current_ranks() -> Ranks:
    """This process in torch.distributed's default group; `ALONE` where there is none.

    Ask after `init_process_group`. Its `gather` takes any dtype, and the same shape on every process: every process has to call it.
    """
    if not _is_running():
        return ALONE
    return Ranks(distributed.get_rank(), distributed.get_world_size(), _gather)


def _is_running() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@torch.no_grad()
def _gather(x: Tensor, group: Any = None) -> Tensor:
    everyone = x.new_empty((distributed.get_world_size(group) * x.shape[0], *x.shape[1:]))
    distributed.all_gather_into_tensor(everyone, x.contiguous(), group)
    return everyone


class _Gather(torch.autograd.Function):
    """`_gather` with a gradient: each process receives the sum of what all of them have for its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=ctx.group)
        return total.split(ctx.rows)[distributed.get_rank(ctx.group)], None


class JointBatchNorm(_BatchNorm):
    """A batch norm over the joint batch of all processes, on a CPU, where torch's SyncBatchNorm refuses (Ioffe and Szegedy 2015).

    The same function and state: while training, mean and variance are those of the joint batch, in which processes may have batches of
    different sizes, none empty. The gradient of a weight is that of this process's outputs, as for any other parameter, which DDP
    averages. In eval mode, alone, or in a group of one it is the plain batch norm.
    """

    process_group: Any  # None: all processes

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 axes, got {input.ndim}")

    def forward(self, input: Float[Tensor, "b c *n"]) -> Float[Tensor, "b c *n"]:
        """Normalized per channel; when training the running statistics move too, the variance unbiased as in torch."""
        if not self.training or not _is_running() or distributed.get_world_size(self.process_group) == 1:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims, per_channel = [d for d in range(x.ndim) if d != 1], (1, -1, *[1] * (x.ndim - 2))
        mean, variance, count = self._joint_moments(*torch.var_mean(x, dims, correction=0), x.numel() // x.shape[1])
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        y = (x - mean.view(per_channel)) * (variance + self.eps).rsqrt().view(per_channel)
        if self.weight is not None:
            y = y * self.weight.view(per_channel) + self.bias.view(per_channel)
        return y.to(input.dtype)

    def _joint_moments(
        self, variance: Float[Tensor, " c"], mean: Float[Tensor, " c"], count: int
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, ""]]:
        """Mean, variance and number of values over all processes from those of this one (Chan et al. 1979), in one exchange."""
        own = torch.stack([mean, variance, torch.full_like(mean, count)])[None]
        means, variances, counts = _Gather.apply(own, self.process_group).unbind(1)
        shares = counts / counts.sum(0)
        joint = (shares * means).sum(0)
        return joint, (shares * (variances + (means - joint).square())).sum(0), counts[:, 0].sum().detach()

    @torch.no_grad()
    def _track(self, mean: Float[Tensor, " c"], variance: Float[Tensor, " c"]) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def sync_batch_norms(module: nn.Module, group_size: int | None = None) -> nn.Module:
    """The module, each of its batch norms now over all processes: parameters, buffers and state_dict names stay. Change devices before.

    On a GPU they are torch's SyncBatchNorm, which DDP and torch allow nowhere else; on a CPU `JointBatchNorm`.
    `group_size`: statistics over runs of that many processes by rank (those of one node, say), None = over all of them. ValueError
    where the number of processes is no multiple of it. Every process has to call this, after `init_process_group` if there are groups.
    Trap: a module with a group can be neither copied nor pickled; its state can.
    """
    group = None
    if group_size is not None:
        world = distributed.get_world_size() if _is_running() else 1
        if group_size < 1 or world % group_size:
            sizes = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
            raise ValueError(f"group_size={group_size} does not divide the {world} processes; give one of {sizes}, or None for all")
        group = distributed.new_subgroups(group_size)[0] if _is_running() and group_size < world else None
    if any(tensor.device.type != "cpu" for tensor in (*module.parameters(), *module.buffers())):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.__class__ = JointBatchNorm  # keeps all its state, and its place where it is shared
            layer.process_group = group  # type: ignore[assignment]
    return module


# What torch calls the broadcast of buffers before each forward; its old name warns where the new one is known.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False}


def distribute(model: nn.Module, sync_norms: bool = True, group_size: int | None = None) -> DistributedDataParallel:
    """The model whose call is `model.forward` and whose backward averages gradients over all processes; `.module` is the model itself.

    Give it the model on its device, perhaps compiled by `model.compile(fullgraph=True)` (torch cannot compile the wrap in one graph), and
    call the wrap. Parameters start as those of rank 0; buffers have to be equal. What moves afterwards, and why it stays equal:

    - online parameters: by the averaged gradients. Each of them has to take part in every step; torch raises in the next one if not.
    - target parameters: DDP passes over them, since they have no gradient; they follow the online ones by `update_target_`.
    - running statistics of both networks: with `sync_norms` (`group_size` as in `sync_batch_norms`) each process computes those of the
      joint batch, or of its group. Without, each keeps those of its own pictures, and a checkpoint holds those of whoever writes it.
    - DINO's centres: each process gathers the joint mean.

    So DDP's broadcast of rank 0's buffers before each forward is off: it would cost time and change nothing, or (without `sync_norms`)
    discard what the others saw. Gradients live in DDP's buckets. No static_graph: it fails where the first step
    accumulates under `no_sync`, hides parameters that take no part, and saves nothing here. Traps: a loss is that of this process's
    pictures, so average it over processes before it is shown; of a pass under `no_sync` the forward belongs inside too.
    """
    if sync_norms:
        model = sync_batch_norms(model, group_size)
    # A 1x1 kernel has two sets of strides for one layout; the sum of two gradients, of a head on a map and on vectors, has the other one.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(model, **_OWN_BUFFERS, gradient_as_bucket_view=True)
