"""A config as a flat dict, as a hash, and as what a command line makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cossl.models import run_folder
from cossl.models.flags import config_hash, flatten, parse_flags, replace_text, unsealed


@dataclass(frozen=True)
class Part:
    width: int = 8
    where: Path = Path("here")


@dataclass(frozen=True)
class Whole:
    rate: float = 0.5
    part: Part = field(default_factory=Part)


def test_a_flat_config_has_plain_values_and_names_with_points() -> None:
    assert flatten(Whole()) == {"rate": 0.5, "part.width": 8, "part.where": "here"}


def test_flags_change_a_default_and_a_wrong_one_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_flags(Whole, ["--part.width", "9"], "cossl x", "", default=Whole(rate=0.25)) == Whole(0.25, Part(9))
    with pytest.raises(ValueError, match=r"^Unrecognized options: --part.widht.*\(see cossl x --help\)$") as caught:
        parse_flags(Whole, ["--part.widht", "9"], "cossl x", "")
    assert not re.search("\n|---|─", str(caught.value))
    assert capsys.readouterr() == ("", "")


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        replace_text(tmp_path / "file", text)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "two")]


def test_the_hash_is_of_the_values_that_make_the_run() -> None:
    one = config_hash({"a": 1, "b": (0.5, None), "run_dir": "x"}, ["run_dir"])
    assert one == config_hash({"run_dir": "y", "b": (0.5, None), "a": 1}, ["run_dir"])
    assert one != config_hash({"a": 1, "b": (0.25, None), "run_dir": "x"}, ["run_dir"])
    assert run_folder.stamp({"a": 1})["config_hash"] == config_hash({"a": 1})


def test_what_is_nested_too_deeply_is_not_believed() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        unsealed({"a": deep, "sha256": ""})
