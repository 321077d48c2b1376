"""A config as a command line, as a flat dict and as a hash. Imports no torch, so that a command which trains nothing starts at once."""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


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


def parse_flags(kind: type[T], argv: Sequence[str], prog: str, description: str, default: T | None = None) -> T:
    """What argv makes of a dataclass. A wrong flag or value is a ValueError of one line (tyro prints a box of several)."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            start = tyro.MISSING_NONPROP if default is None else default
            return tyro.cli(kind, args=argv, prog=prog, description=description, default=start)
    except SystemExit as error:
        if not error.code:
            raise
        _title, *lines = filter(None, (line.strip(" │") for line in box.getvalue().splitlines()))
        rule = "[╰─╯-]+|For full helptext.*"  # of - where stdout is not UTF-8
        said = [line for line in lines if not re.fullmatch(rule, line)]
        said = re.split(" Got errors: | Argument helptext: ", " ".join(said))[:1]  # what follows is tyro's own affair
        raise ValueError(f"{said[0]} (see {prog} --help)") from None


def config_hash(config: dict[str, Any], ignore: Collection[str] = ()) -> str:
    """16 hexadecimal digits that are equal if and only if (SHA-256) the flat configs are, but for the ignored keys."""
    text = json.dumps({k: v for k, v in config.items() if k not in ignore}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def replace_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
