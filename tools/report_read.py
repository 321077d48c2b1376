"""What the folder of a run holds for a report: bounded, and whatever is damaged named instead of raised."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cossl.models.flags import unsealed
from cossl.models.run_status import UNSEALED, Run, flocked_inodes, read_run
from cossl.tools.comparison import PART, RUNS, digest, stem_of
from cossl.tools.report_page import number, read_bytes, read_json

Record = dict[str, Any]
FAMILIES = {"eval": "Evaluation", "robustness": "Robustness", "locality": "Locality"}
RESULT_LIMIT = 100  # of each family


class Told(NamedTuple):
    """All that a run's folder tells; what is damaged is left out, and named."""

    name: str
    run_dir: Path
    run: Run
    config: Record
    results: Record
    starts: list[Any]
    metrics: list[Record]
    families: dict[str, dict[str, Record]]
    """Family, name of the file, result: see `opened.write_result`."""
    troubles: list[str]


def read_told(run_dir: Path, name: str) -> Told:
    """Everything in the folder that a report shows, but the pictures."""
    troubles: list[str] = []
    run = read_run(run_dir, name, flocked_inodes())
    config, results = (read_json(run_dir / file, dict, file, troubles) for file in ("config.json", "results.json"))
    try:
        results = unsealed(results) if results else {}
    except ValueError as error:
        troubles.append(f"results.json {UNSEALED} ({error})")
        results = {}
    starts = read_json(run_dir / "environment.json", list, "environment.json", troubles)
    families = {family: dict(_results(run_dir, family, troubles)) for family in FAMILIES}
    metrics = _metrics(run_dir / "metrics.jsonl", troubles)
    said = [note for note in run.notes if note.partition(" ")[0] not in {trouble.partition(" ")[0] for trouble in troubles}]
    return Told(name, run_dir, run, config, results, starts, metrics, families, [*said, *troubles])


def _metrics(path: Path, troubles: list[str]) -> list[Record]:
    try:
        lines = read_bytes(path).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        troubles.append(f"{path.name} unreadable ({error})")
        return []
    records, damaged = [], 0
    for line in lines:
        try:
            record = json.loads(line)
            good = isinstance(record, dict) and number(record.get("epoch")) is not None
        except (ValueError, RecursionError):
            record, good = {}, False
        records += [record] * good
        damaged += not good and line.endswith(b"\n")
    if damaged:
        troubles.append(f"{path.name} damaged ({damaged:,} of {len(lines):,} lines, left out)")
    return records


def _results(run_dir: Path, family: str, troubles: list[str]) -> Iterator[tuple[str, Record]]:
    paths = sorted((run_dir / family).glob("*.json"))
    if len(paths) > RESULT_LIMIT:
        troubles.append(f"{family}/ has {len(paths):,} results, of which the first {RESULT_LIMIT} are shown")
    for path in paths[:RESULT_LIMIT]:
        name = f"{family}/{path.name}"
        result = read_json(path, dict, name, troubles)
        if not result or PART in result:  # of several runs: see `compared`
            continue
        rows = result.get("table")
        whole = isinstance(rows, dict) and isinstance(rows.get("columns"), list) and isinstance(rows.get("rows"), list)
        if not whole or not all(isinstance(row, list) for row in rows["rows"]):
            troubles.append(f"{name} has no table of columns and rows")
        else:
            yield path.stem, result


def compared(told: Sequence[Told], family: str, name: str) -> tuple[Path | None, list[str]]:
    """The figure drawn of these results of these runs and of no others, whichever run's folder it lies in; and why one is not shown."""
    notes: list[str] = []
    own = {one.run_dir.resolve().name: one.run_dir / family / f"{name}.json" for one in told}
    for one in told:
        path = one.run_dir / family / f"{stem_of(name, len(told))}.json"
        runs = read_json(path, dict, path.name, []).get(RUNS)  # what is damaged is named where all results are read
        if not isinstance(runs, dict):
            continue
        if sorted(map(str, runs.values())) == sorted(map(_digest, own.values())):
            return path.with_suffix(".png"), []
        if set(runs) == set(own):
            again = shlex.join(["cossl", family, *(str(other.run_dir) for other in told)])
            notes.append(f"{path.stem}.png is not shown: it was drawn of other results of runs of these names; `{again}` draws it anew")
    return None, notes


def _digest(result: Path) -> str:
    try:
        return digest(read_bytes(result))
    except (OSError, ValueError):
        return ""


def names_of(run_dirs: Sequence[Path]) -> list[str]:
    """Each folder's name, with so much of the path before it as tells them apart. ValueError if one is given twice."""
    paths = [path.resolve() for path in run_dirs]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{max(paths, key=paths.count)} is given twice")
    short = next(n for n in range(1, 1000) if len({path.parts[-n:] for path in paths}) == len(paths))
    return ["/".join(path.parts[-short:]) for path in paths]
