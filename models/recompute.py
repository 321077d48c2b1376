"""Activations that are computed twice instead of kept."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(stage: nn.Module, y: Tensor) -> Tensor:
    """The stage's output; of its blocks only the inputs are kept, and each is computed again when the backward pass comes to it.

    Activation checkpointing (Chen et al. 2016, arXiv 1604.06174). Gradients and running statistics are bitwise those of `stage(y)`.
    """
    for block in stage.children():
        y = checkpoint(block, y, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, block))
    return y


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_stand(block)


@contextmanager
def _statistics_stand(block: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch as ever, but it does not count a second time in their running statistics."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, tracked) in zip(norms, before, strict=True):
        norm.momentum, norm.num_batches_tracked = 0.0, None if tracked is None else tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
