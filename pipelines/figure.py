"""What every figure of this project needs of matplotlib, which only the figure's own file imports."""

import re
from pathlib import Path
from typing import Any


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Writes a matplotlib Figure as PNG, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=dpi, format="png")
    part.replace(path)


def plain(text: str) -> str:
    """The text without the formula that matplotlib sees between two dollar signs."""
    return re.sub(r"\$", r"\\$", text)
