"""`cossl models`: its numbers against published ones and against counts by hand, its tables, its JSON, its mistakes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cossl.models.heads import HEADS
from cossl.models.rf_resnet import BACKBONES, ResNet, position_grid, rf_resnet18, torchvision_resnet50
from cossl.tools import cli
from cossl.tools.models import backbone_row, backbone_rows, forward_cost, head_row, models_main


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("models") / "models.json"
    models_main(["--json", str(path)])
    return json.loads(path.read_text())


def rows_of(report: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report[kind]}


def test_json_has_every_backbone_and_head(report: dict[str, Any]) -> None:
    assert {"machine", "command", "backbones", "heads"} <= set(report)
    assert report["command"].startswith("cossl models --json ")
    assert [row["name"] for row in report["backbones"]] == list(BACKBONES)
    assert [row["name"] for row in report["heads"]] == list(HEADS)
    assert report["settings"]["view_px"] == 224
    assert rows_of(report, "backbones")["rf_resnet50"]["parameters"] == 14_070_848


@pytest.mark.parametrize(("name", "gmacs"), [("resnet18", 1.81), ("resnet34", 3.66), ("resnet50", 4.09), ("resnet101", 7.80)])
def test_gmacs_of_plain_resnets_are_torchvisions(report: dict[str, Any], name: str, gmacs: float) -> None:
    assert rows_of(report, "backbones")[name]["gmacs"] == pytest.approx(gmacs, rel=0.01)


def test_grid_of_a_row_is_the_backbones(report: dict[str, Any]) -> None:
    keys = ("positions_per_side", "stride_px", "receptive_field_px")
    for name, row in rows_of(report, "backbones").items():
        with torch.device("meta"):
            assert tuple(row[key] for key in keys) == position_grid(BACKBONES[name](), 224)[:3]


def saved_by_hand(backbone: ResNet, view_px: int, indices: int) -> int:
    """Bytes in float32: the picture, the outputs of convolutions (norms keep them), of ReLUs (written over the norms') and of the pooling.

    The norm of a shortcut has an output of its own, which is only added and so not kept. `indices` are the pooling's.
    """
    sizes: list[int] = []

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        sizes.append(output.numel())

    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.ReLU):
            module.register_forward_hook(count)
    with torch.device("meta"):
        backbone.eval()(torch.empty(1, 3, view_px, view_px))
    return 4 * (3 * view_px**2 + sum(sizes)) + indices


@pytest.mark.parametrize(("build", "indices"), [(rf_resnet18, 0), (torchvision_resnet50, 8 * 64 * 16 * 16)])
def test_activation_memory_is_that_of_a_count_by_hand(build: Any, indices: int) -> None:
    with torch.device("meta"):
        backbone = build()
    _, mib = forward_cost(backbone, 64)
    assert mib * 2**20 == saved_by_hand(backbone, 64, indices)


def test_bf16_halves_the_activations_and_a_larger_view_costs_its_area() -> None:
    with torch.device("meta"):
        full = forward_cost(rf_resnet18(), 64)
    small, large = backbone_row("rf_resnet18", None, 64), backbone_row("rf_resnet18", None, 128)
    assert small.activations_bf16_mib == pytest.approx(full[1] / 2, abs=0.01)
    assert large.gmacs == pytest.approx(4 * small.gmacs, rel=1e-3)
    assert large.activations_bf16_mib == pytest.approx(4 * small.activations_bf16_mib, rel=1e-2)


def test_all_lists_every_reachable_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cossl.tools.models.BACKBONES", {name: BACKBONES[name] for name in ("rf_resnet18", "bagnet", "resnet18")})
    rows = backbone_rows(32, every_field=True)
    assert [row.receptive_field_px for row in rows[:17]] == [3, 5, 7, 9, 11, 13, 17, 21, 25, 29, 37, 45, 53, 61, 77, 93, 109]
    assert [(row.name, row.receptive_field_px) for row in rows[17:]] == [*(("bagnet", px) for px in (3, 5, 9, 17, 33)), ("resnet18", 435)]
    assert sorted(row.parameters for row in rows[:17]) == [row.parameters for row in rows[:17]]


def test_heads_cost_what_their_widths_say(report: dict[str, Any]) -> None:
    heads = rows_of(report, "heads")
    macs = 2048 * 4096 + 4096 * 256
    assert heads["conv1x1"]["gmacs_all"] == heads["conv1x1"]["gmacs_sampled"] == round(49 * macs / 1e9, 4)
    assert (heads["mlp2"]["gmacs_all"], heads["mlp2"]["gmacs_sampled"]) == (round(49 * macs / 1e9, 4), round(16 * macs / 1e9, 4))
    assert heads["mlp2"]["parameters"] == heads["conv1x1"]["parameters"] == macs + 4096 + 2 * 4096  # bias, norm
    assert all(row["sampled"] == 16 for row in heads.values())


def test_a_wider_kernel_widens_the_receptive_field_by_strides(report: dict[str, Any]) -> None:
    heads = rows_of(report, "heads")
    assert heads["conv1x1"]["receptive_field_px"] == heads["mlp2"]["receptive_field_px"] == 99
    if "conv3x3" in HEADS:
        assert heads["conv3x3"]["receptive_field_px"] == 99 + 2 * 32


def test_a_map_of_few_positions_is_sampled_whole() -> None:
    with torch.device("meta"):
        grid = position_grid(rf_resnet18(), 17)
    row = head_row("mlp2", 512, grid)
    assert (grid.size, row.sampled) == (3, 9)
    assert row.gmacs_all == row.gmacs_sampled


def test_table_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    models_main(["--view-px", "32"])
    shown = capsys.readouterr()
    assert shown.err == ""
    names = [line.split()[0] for line in shown.out.splitlines() if line]
    assert [name for name in names if name in {*BACKBONES, *HEADS}] == [*BACKBONES, *HEADS]
    assert "One view of 32 px" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 130
    fields = next(line for line in shown.out.splitlines() if line.startswith("rf_resnet18")).split()
    assert fields[:8] == ["rf_resnet18", "3x3/1", "29", "8", "4", "x", "4", "2.26"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--view-px", "0"], "--view-px 0: expected at least 1 px"),
        (["--view-px", "large"], "view-px"),
        (["--jsn", "x"], "--jsn"),
        (["--json", "nowhere/x.json"], "there is no folder nowhere"),
    ],
)
def test_a_mistake_is_one_line(
    argv: Sequence[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cossl", "models", *argv])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out) == (2, "")
    assert shown.err.startswith("cossl models: ")
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
