"""The folder of a run: which one, what is in it as text, and whose it is."""

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from cossl.models import checkpoint


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"loss.local_weight": 0.3, ...}: plain values only, so that a config goes into JSON and into a checkpoint."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = str(value) if isinstance(value, Path) else value
    return flat


def replace_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def choose(run_dir: Path | None, resume: bool, preset: str) -> Path:
    """The run's folder, not yet made; default runs/<preset>-<date>-<time>. ValueError if it holds another run or none to resume."""
    if resume:
        if run_dir is None:
            raise ValueError("--resume needs --run-dir, the folder of the run to go on with")
        checkpoint.names(run_dir)
        return run_dir
    run_dir = run_dir or Path("runs") / f"{preset}-{datetime.now():%Y%m%d-%H%M%S}"
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"{run_dir} holds something already: go on with it by --resume, or choose another --run-dir")
    return run_dir


def keep_metrics(path: Path, last_step: int) -> None:
    """Drops the lines of steps that the checkpoint does not know, and a line that a kill cut off."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] > last_step:
                break
        except (ValueError, KeyError):
            break
        kept.append(line + "\n")
    replace_text(path, "".join(kept))
