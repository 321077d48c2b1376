"""`cossl bench heads`: a row for every head and number of positions, against one of them in the same turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cossl.models.heads import HEADS
from cossl.tools import bench_heads

TINY = "--channels 64 --hidden-dim 256 --out-dim 16 --batch-size 4 --repeats 2".split()


def test_a_row_for_every_variant_and_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_heads.heads_main([*TINY, "--json", str(tmp_path / "heads.json")])
    report = json.loads((tmp_path / "heads.json").read_text())
    rows = {(row["name"], row["k"]): row for row in report["rows"]}
    assert rows.keys() == {(name, k) for name in HEADS for k in (4, 16, 49)}
    assert {"machine", "command", "settings", "rows"} <= report.keys()
    for row in rows.values():
        assert {"forward_ms", "backward_ms", "peak_mib", "relative_step"} <= row.keys()
        assert row["forward_ms"] > 0
        assert row["backward_ms"] > 0
        assert row["n"] == 2
    assert rows["conv1x1", 49]["relative_step"] == 1
    shown = capsys.readouterr().out
    assert all(name in shown for name in HEADS)


def test_memory_is_that_of_the_step(tmp_path: Path) -> None:
    """conv3x3 has a weight and a gradient of 72 MiB more than linear has in all; a meter that adds up earlier steps would not see it."""
    arguments = "--channels 512 --hidden-dim 4096 --out-dim 16 --batch-size 2 --repeats 1 --json".split()
    bench_heads.heads_main([*arguments, str(tmp_path / "heads.json")])
    peak = {(row["name"], row["k"]): row["peak_mib"] for row in json.loads((tmp_path / "heads.json").read_text())["rows"]}
    assert peak["conv3x3", 4] > 60
    assert peak["linear", 4] < 20


@pytest.mark.parametrize(("flags", "said"), [("--batch-size 0", "--batch-size 0"), ("--json nowhere/x.json", "no folder nowhere")])
def test_a_mistake_is_said(flags: str, said: str) -> None:
    with pytest.raises((ValueError, OSError), match=said):
        bench_heads.heads_main(flags.split())
