"""A config as a command line, as a flat dict and as a hash. Imports no torch, so that a command which trains nothing starts at once."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

T = TypeVar("T")
OBJECT_LIMIT_BYTES = 64 << 20  # a sweep of 10,000 points has 40 MB


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


def unflatten(kind: type[T], flat: Mapping[str, Any]) -> T:
    """The dataclass of which `flat` is the flat dict, as JSON gives it back, with defaults for what it lacks.

    ValueError for a place there is not, a value of the wrong kind, or one that the dataclass refuses.
    """
    kinds, own, parts = get_type_hints(kind), dict[str, Any](), dict[str, dict[str, Any]]()
    for key, value in flat.items():
        name, point, rest = str(key).partition(".")
        if name not in kinds or dataclasses.is_dataclass(kinds[name]) != bool(point):
            raise ValueError(f"{_short(key)} is no setting of {kind.__name__}: it was made by another version")
        if point:
            parts.setdefault(name, {})[rest] = value
        else:
            own[name] = _of_kind(key, value, kinds[name])
    made = {name: unflatten(kinds[name], part) for name, part in parts.items()}
    try:
        return kind(**own, **made)
    except (TypeError, RuntimeError, ArithmeticError) as error:  # a number that no tensor can have for a size
        raise ValueError(f"{kind.__name__} cannot be made of these settings ({(str(error).splitlines() or [''])[0]})") from error


def _of_kind(key: str, value: Any, kind: Any) -> Any:
    """JSON has no tuples, paths or floats without a point."""
    if get_origin(kind) in (Union, UnionType):
        if value is None and NoneType in get_args(kind):
            return None
        kind = next(one for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_of_kind(key, one, get_args(kind)[0]) for one in value)
    if kind is Path and isinstance(value, str) and value:  # "" would be the folder that one is in
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    fits = value in get_args(kind) if get_origin(kind) is Literal else isinstance(kind, type) and type(value) is kind
    if not fits or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{key} = {_short(value)}: expected {getattr(kind, '__name__', kind)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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


def read_object(path: Path, limit_bytes: int = OBJECT_LIMIT_BYTES) -> dict[str, Any]:
    """The JSON object in a file. OSError if it cannot be read; ValueError, which does not name the file, if it holds none.

    Its size is looked at first, and what is no plain file (a pipe would be waited for) is not opened.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    if (size := path.stat().st_size) > limit_bytes:
        raise ValueError(f"{size:,} bytes are too many")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}")
    return value


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with the SHA-256 of its content, by which `unsealed` knows that nothing in it was changed."""
    plain = json.loads(json.dumps(content))  # as it comes back: keys that were numbers are not in the same order then
    return {**plain, "sha256": _digest(plain)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a sealed object. ValueError if it has no seal, or is not what was sealed."""
    content = {key: one for key, one in value.items() if key != "sha256"}
    try:
        digest = _digest(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if value.get("sha256") != digest:
        raise ValueError("it was changed, or cut off" if "sha256" in value else "it has no sha256 of its content")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
