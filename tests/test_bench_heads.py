"""`cossl bench heads`: a row for every head and number of positions, against one of them in the same turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cossl.models.heads import HEADS
from cossl.tools import bench_heads


@pytest.fixture(autouse=True)
def low_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes, small in ((bench_heads.MATRIX_SIDE, 128), (bench_heads.COPY_MIB, 4)):
        monkeypatch.setitem(sizes, "cpu", small)


TINY = "--channels 64 --hidden-dim 256 --out-dim 16 --batch-size 4 --repeats 2".split()


def case(name: str, k: int) -> tuple[bench_heads.LocalPath, torch.Tensor, torch.Tensor, torch.Tensor]:
    path = bench_heads.LocalPath(name, bench_heads.HeadsArgs(channels=64, hidden_dim=256, out_dim=16))
    y = torch.randn(4, 64, 7, 7, requires_grad=True)
    return path, y, torch.arange(k).expand(4, k), torch.randn(4, 16)


@pytest.mark.parametrize(("name", "k", "projected"), [("conv1x1", 4, 49), ("conv1x1", 49, 49), ("mlp2", 4, 4), ("mlp2", 49, 49)])
def test_the_work_of_a_step(name: str, k: int, projected: int) -> None:
    """By hand; the products once forward and twice backward."""
    flops, num_bytes = bench_heads.count(*case(name, k))
    projector, predictor = 4 * projected * (64 * 256 + 256 * 16), 4 * k * (16 * 256 + 256 * 16)
    assert flops == 2 * 3 * (projector + predictor)
    weights = 64 * 256 + 256 * 16 + 16 * 256 + 256 * 16
    # Read, written and read again: the weights; the map's gradient; before and after the norm of both heads. The rest is narrow.
    num_numbers = 3 * weights + 4 * 64 * 49 + 2 * 2 * 4 * 256 * (projected + k)
    assert 4 * num_numbers < num_bytes < 1.25 * 4 * num_numbers


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
        for rate in ("tflops", "gb_s"):
            assert row[f"{rate}_share"] == pytest.approx(row[rate] / report["settings"]["ceilings"][rate], rel=2e-3)
            assert row[rate] > 0
    assert rows["conv1x1", 49]["relative_step"] == 1
    flops, num_bytes = bench_heads.count(*case("mlp2", 4))
    row = rows["mlp2", 4]
    assert row["tflops"] * 1e3 / row["gb_s"] == pytest.approx(flops / num_bytes, rel=2e-3)
    assert row["images_per_s"] / row["tflops"] / 1e12 == pytest.approx(4 / flops, rel=2e-3)
    shown = capsys.readouterr().out
    assert all(name in shown for name in HEADS)


def test_memory_is_that_of_the_step(tmp_path: Path) -> None:
    """conv3x3 has a weight and a gradient of 36 MiB more than linear has in all; a meter that adds up earlier steps would not see it."""
    arguments = "--channels 512 --hidden-dim 2048 --out-dim 16 --batch-size 2 --repeats 1 --json".split()
    bench_heads.heads_main([*arguments, str(tmp_path / "heads.json")])
    peak = {(row["name"], row["k"]): row["peak_mib"] for row in json.loads((tmp_path / "heads.json").read_text())["rows"]}
    assert peak["conv3x3", 4] > 30
    assert peak["linear", 4] < 15


@pytest.mark.parametrize(("flags", "said"), [("--batch-size 0", "--batch-size 0"), ("--json nowhere/x.json", "no folder nowhere")])
def test_a_mistake_is_said(flags: str, said: str) -> None:
    with pytest.raises((ValueError, OSError), match=said):
        bench_heads.heads_main(flags.split())
