"""CO-SSL, self-supervised learning from spatial co-occurrences. `cossl.load(run)` is the way from a run to its features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cossl.models.load import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`load` when it is asked for: importing the package takes no time, and imports no torch."""
    if name != "load":
        raise AttributeError(f"module 'cossl' has no attribute {name!r}")
    from cossl.models.load import load

    return load
