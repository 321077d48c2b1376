"""`cossl locality` on tiny runs: what is written, what is measured again, and which pictures are taken."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cossl.models import checkpoint
from cossl.models.co_ssl import LossConfig, ModelConfig
from cossl.models.flags import flatten
from cossl.models.load import load
from cossl.models.probe import knn_top1, linear_top1
from cossl.pipelines import LoaderConfig
from cossl.tools import locality
from cossl.tools.opened import open_run, open_split
from cossl.tools.opened import pictures as pictures_of
from cossl.tools.report import runs_report
from cossl.train import build, demo

SMALL = ModelConfig(backbone="rf_resnet18", receptive_field=29, width=8, mlp_after_pool=2, hidden_dim=16, out_dim=12)
LITTLE = "--pictures 3 --sample 20 --probe-pictures 40 --draws 2 --field-pictures 3 --projections 1 --device cpu".split()


@pytest.fixture(scope="module")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of CO-BYOL with an MLP and of BYOL without, each with weights that are not those of its seed, and another loader."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (network, loss, loader) in {
        "co": (SMALL, LossConfig(), LoaderConfig()),
        "plain": (replace(SMALL, mlp_after_pool=0), LossConfig(local_weight=0), LoaderConfig("torch")),
    }.items():
        config = replace(demo(), data=pictures, eval_px=32, model=network, loss=loss, loader=loader)
        state = build(replace(config, seed=1), torch.device("cpu")).state_dict()
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"preset": "demo", **flatten(config)}))
        checkpoint.save(folder / name, {"config": flatten(config), "model": state})
    return folder / "co", folder / "plain"


@pytest.fixture(scope="module")
def measured_runs(runs: tuple[Path, Path]) -> tuple[Path, Path]:
    """The same, with their results."""
    locality.locality_main([*map(str, runs), *LITTLE])
    return runs


def result(run: Path, part: str) -> dict[str, Any]:
    return json.loads((run / "locality" / f"{part}.json").read_text(encoding="utf-8"))


def test_every_part_is_written_with_table_figure_and_protocol(measured_runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    for run in measured_runs:
        for part in locality.TASKS:
            found = result(run, part)
            assert {"title", "table", "figures", "protocol", "run", "time", "code_version", "versions"} <= set(found)
            assert all(len(row) == len(found["table"]["columns"]) for row in found["table"]["rows"])
            assert found["figures"] == [f"{part}.png"]
            assert (run / "locality" / f"{part}.png").read_bytes().startswith(b"\x89PNG")
            assert found["protocol"]["px"] == 32
            assert len(found["protocol"]["weights_sha256"]) == 16
            assert found["protocol"]["untrained"] == "the seed's weights, batch norms' statistics of 80 train pictures, as in training"
    assert len(list((measured_runs[0] / "locality").glob("*-of-2-runs.png"))) == 4
    assert runs_report(measured_runs).count("-of-2-runs.png)</figcaption>") == 4
    assert not list(measured_runs[0].rglob("*.part"))
    assert list(result(measured_runs[0], "redundancy")["spaces"]) == ["map", "mlp", "heads"]
    assert list(result(measured_runs[1], "redundancy")["spaces"]) == ["map"]
    rows = result(measured_runs[0], "receptive-field")["table"]["rows"]
    assert [row[1] for row in rows] == [29, 29]
    assert [row[2] for row in rows] == pytest.approx([1, 1], abs=1e-5)


def test_all_positions_are_probed_as_the_global_vector_is(measured_runs: tuple[Path, Path], pictures: Path) -> None:
    """The accuracy at k = n * n is that of the vectors which `cossl.load`'s encoder returns, in the same order of pictures."""
    run = open_run(measured_runs[0], "cpu")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for split in ("train", "val"):
        loader = open_split(run, pictures, split)
        batches = [(load(measured_runs[0])(x)[0], label) for _, x, label in pictures_of(loader, run.device, split)]
        found[split] = torch.cat([x for x, _ in batches]), torch.cat([label for _, label in batches])
        loader.close()
    locality.locality_main(
        [str(measured_runs[0]), *LITTLE, "--parts", "positions", "--probe-pictures", "80", "--out", str(run.run_dir / "all")]
    )
    again = json.loads((run.run_dir / "all" / "co" / "positions.json").read_text())
    assert (again["train_pictures"], again["val_pictures"]) == (80, 40)
    assert again["spaces"]["mlp"]["knn_top1"][-1] == pytest.approx([knn_top1(*found["train"], *found["val"])])
    assert again["spaces"]["mlp"]["linear_top1"][-1] == pytest.approx([linear_top1(*found["train"], *found["val"])], abs=5.1)
    assert [len(draws) for draws in again["spaces"]["map"]["linear_top1"]] == [2, 2, 2, 2, 1]


def test_what_is_there_is_not_measured_again(measured_runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(locality, "draw", lambda part, *_, **__: [f"{part}.png"])
    for name, task in locality.TASKS.items():
        monkeypatch.setitem(locality.TASKS, name, task._replace(measure=lambda s, n=name, t=task: calls.append(n) or t.measure(s)))
    run, plain = map(str, measured_runs)
    before = {part: result(measured_runs[0], part) for part in locality.TASKS}
    locality.locality_main([run, plain, *LITTLE])
    assert not calls
    assert {part: result(measured_runs[0], part) for part in locality.TASKS} == before
    locality.locality_main([plain, *LITTLE, "--sample", "21"])
    assert calls == ["similarity", "redundancy"]
    (measured_runs[1] / "locality" / "similarity.json").write_text("{")
    (measured_runs[1] / "locality" / "receptive-field.npz").write_bytes(b"PK\x03\x04damaged")
    locality.locality_main([plain, *LITTLE, "--sample", "21"])
    assert calls == ["similarity", "redundancy", "similarity", "receptive-field"]
    locality.locality_main([plain, *LITTLE, "--parts", "redundancy", "--sample", "21", "--again"])
    assert calls[-1] == "redundancy"
    assert len(calls) == 5
    shutil.copytree(Path(before["redundancy"]["protocol"]["data"]), other := measured_runs[0].parent / "other")
    again = [plain, *LITTLE, "--parts", "redundancy", "--sample", "21", "--data"]
    locality.locality_main([*again, str(other)])
    assert len(calls) == 6
    monkeypatch.chdir(other.parent)
    locality.locality_main([*again, "other"])
    assert len(calls) == 6
    os.utime(next((other / "val").rglob("*.*")), (1, 1))
    locality.locality_main([*again, "other"])
    assert len(calls) == 7


def test_untrained_network_has_the_seeds_weights_and_normalises(runs: tuple[Path, Path], pictures: Path) -> None:
    """All 80 pictures of train are one batch, whose statistics are those of training: the MLP sees pooled vectors alone."""
    subject = locality.Subject(open_run(runs[0], "cpu"), pictures, locality.LocalityArgs(runs=(runs[0],)))
    networks = subject.networks()
    found, trained = (networks[name].state_dict() for name in ("untrained", "trained"))
    other = build(subject.run.config, torch.device("cpu")).online.train()
    for norm in (module for module in other.modules() if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
    ((_, x, _),) = subject.sample("train", 256, "test")[1]
    other([x])
    assert not networks["untrained"].training
    parts = ("backbone", "after_pool", "projector")
    norms = [key for key in found if "running" in key and key.startswith(parts)]
    assert {key.partition(".")[0] for key in norms} == set(parts)
    for key in norms:
        torch.testing.assert_close(found[key], other.state_dict()[key], rtol=1e-4, atol=1e-5)
    weights = [key for key in found if key.endswith("weight") and found[key].ndim > 1]
    assert all(torch.equal(found[key], other.state_dict()[key]) for key in weights)
    assert not any(torch.equal(found[key], trained[key]) for key in weights)
    assert all(found[key].abs().max() > 0 for key in found if key.endswith("running_mean"))


def test_without_matplotlib_the_numbers_are_written(
    measured_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib", "matplotlib.figure"]:
            patched.setitem(sys.modules, name, None)
        locality.locality_main([str(measured_runs[1]), *LITTLE, "--parts", "receptive-field", "--out", str(tmp_path)])
    assert "matplotlib is missing, pip install" in capsys.readouterr().out
    path = tmp_path / "plain" / "receptive-field.json"
    assert json.loads(path.read_text())["figures"] == []
    pytest.importorskip("matplotlib")
    locality.locality_main([str(measured_runs[1]), *LITTLE, "--parts", "receptive-field", "--out", str(tmp_path)])
    assert json.loads(path.read_text())["figures"] == ["receptive-field.png"]


def test_mistakes_are_one_line(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for argv, said in {
        (): "no RUN",
        (str(tmp_path),): "is no run's folder",
        (str(runs[0]), "--sample", "1"): "--sample 1: expected 2 or more",
        (str(runs[0]), str(runs[0])): "two runs are called co",
        (str(runs[0]), "--data", str(tmp_path / "none")): "give --data",
        (str(runs[0]), "--parts", "colour"): "invalid choice",
    }.items():
        with pytest.raises(ValueError, match=said) as error:
            locality.locality_main(list(argv))
        assert "\n" not in str(error.value)


def test_a_sample_is_the_same_in_any_number(runs: tuple[Path, Path], pictures: Path) -> None:
    subject = locality.Subject(open_run(runs[0], "cpu"), pictures, locality.LocalityArgs(runs=(runs[0],)))
    drawn = {}
    for asked in (3, 17, 40, 1000):
        count, batches = subject.sample("val", asked, "test")
        drawn[asked] = torch.cat([images for images, _, _ in batches])
        assert len(drawn[asked]) == count == min(asked, 40)
    for asked in (3, 17, 40):
        assert torch.equal(drawn[asked], drawn[1000][:asked])
    other = locality.Subject(subject.run, pictures, locality.LocalityArgs(runs=(runs[0],), seed=1))
    assert not torch.equal(next(other.sample("val", 3, "test")[1])[0], drawn[3])


def test_a_sample_counts_what_the_loader_leaves_out(runs: tuple[Path, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locality.parts, "EVAL_BATCH", 30)
    subject = locality.Subject(open_run(runs[0], "cpu"), pictures, locality.LocalityArgs(runs=(runs[0],)))
    count, batches = subject.sample("val", 1000, "test")
    assert count == sum(len(images) for images, _, _ in batches) == 30
