"""`cossl report RUN... | SWEEP`: a run, several side by side, or a sweep, as one HTML file that needs no network.

It shows what the folders hold, and whatever `cossl eval`, `robustness` and `locality` have written into them. Of a sweep it shows what
`cossl sweep collect` wrote last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro

from cossl.models.flags import parse_flags, replace_text
from cossl.models.run_folder import code_version
from cossl.models.run_status import find_runs
from cossl.tools import report_runs as runs
from cossl.tools.bench import require_folder_of
from cossl.tools.report_page import Album, page
from cossl.tools.report_read import FAMILIES, names_of, read_told
from cossl.tools.report_results import family_section
from cossl.tools.report_sweep import sweep_page


@dataclass(frozen=True)
class ReportArgs:
    """The command line of `cossl report`; each field's text is its help."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN... | SWEEP")]
    """Folders of runs, or the folder of one sweep (sweeps/<grid>)."""

    out: Path | None = None
    """The file to write; default report.html in the folder of the run or sweep, comparison.html in the first of several runs'."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("report of what? Give the folder of a run, of several, or of a sweep")
        require_folder_of("--out", self.out)


def report_main(argv: Sequence[str]) -> None:
    """`cossl report`. Raises ValueError or OSError for a user's mistake."""
    args = parse_flags(ReportArgs, argv, "cossl report", __doc__ or "")
    sweeps = [folder for folder in args.folders if (folder / "sweep.json").exists()]
    if sweeps and len(args.folders) > 1:
        raise ValueError(f"{sweeps[0]} is a sweep: give it alone")
    for folder in args.folders:
        if folder not in sweeps and list(find_runs(folder, depth=0)) != [folder]:
            raise ValueError(f"{folder} is no folder of a run or a sweep: it has neither config.json, lock, metrics.jsonl nor sweep.json")
    text = sweep_report(sweeps[0]) if sweeps else runs_report(args.folders)
    out = args.out or args.folders[0] / ("report.html" if len(args.folders) == 1 else "comparison.html")
    replace_text(out, text)
    print(f"{out}  {out.stat().st_size / 2**20:.1f} MiB")


def runs_report(folders: Sequence[Path]) -> str:
    """The page of one run, or of several side by side."""
    album, names = Album(), names_of(folders)
    told = [read_told(folder, name) for folder, name in zip(folders, names, strict=True)]
    sections = [
        runs.results_section(told),
        runs.settings_section(told),
        runs.curves_section(told),
        *(family_section(told, family, album) for family in FAMILIES),
        runs.batch_section(told, album),
        runs.environment_section(told),
    ]
    return page(" · ".join(names), runs.header(told), sections, footer())


def sweep_report(folder: Path) -> str:
    """The page of a sweep."""
    folder = folder.absolute()
    header, sections = sweep_page(folder, Album())
    return page(folder.name, header, sections, footer())


def footer() -> str:
    """Who made the page, and when."""
    return f"made by cossl report {code_version()} on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
