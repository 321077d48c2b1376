"""Figures of several runs, and beside each which results it was drawn of: a report shows it with these and with no others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cossl.models.flags import replace_text

PART, RUNS = "comparison_of", "runs"
"""What the file beside the figure has: the name of the results that it is of, and {name of the run: `digest` of its result}."""


def stem_of(part: str, count: int) -> str:
    """Name of the figure and of the file beside it, without their endings."""
    return f"{part}-of-{count}-runs"


def digest(result: bytes) -> str:
    """Tells a result from any other: of another run, another checkpoint, other settings or another time."""
    return hashlib.sha256(result).hexdigest()


def compare(folder: Path, part: str, results: Mapping[str, Path], draw: Callable[[Path], Any]) -> Path | None:
    """Has one figure of several runs drawn in `folder`, and writes beside it which it is of; `results` are their files as they are now.

    None, and neither is there, if `draw` gives what counts as false.
    """
    figure = folder / f"{stem_of(part, len(results))}.png"
    note = figure.with_suffix(".json")
    for path in (note, figure):  # in this order: at no moment the note tells of another figure
        path.unlink(missing_ok=True)
    if not draw(figure):
        return None
    runs = {name: digest(path.read_bytes()) for name, path in results.items()}
    replace_text(note, json.dumps({PART: part, RUNS: runs}, indent=1))
    return figure
