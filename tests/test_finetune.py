"""Fine-tuning: a plain loop's numbers, what is chosen on what, ranks, kills, rates that diverge, mistakes, and the command itself."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_runs import DEMO, run_of
from torch import Tensor, distributed, nn

import cossl
from cossl.models import launch
from cossl.models.linear_probe import few_shot, held_out
from cossl.models.parallel import Ranks, current_ranks
from cossl.pipelines.augment import normalize
from cossl.pipelines.batch import LoaderSpec
from cossl.pipelines.torch_loader import TorchLoader
from cossl.pipelines.views import ViewSpec, evaluation
from cossl.tools import eval_finetune
from cossl.tools.eval_features import DiskKeeper, Subject
from cossl.tools.eval_finetune import FinetuneArgs, FinetuneSettings, Trainer, choose, finetune, parts_of
from cossl.tools.eval_pictures import folder_set
from cossl.tools.evaluate import eval_main
from cossl.tools.opened import open_run

PX = 32
HOW = FinetuneArgs(epochs=3, batch_size=16, lrs=(0.1, 0.5), head_lr_factor=50.0, weight_decay=1e-3)
SETTINGS = FinetuneSettings(HOW, held_out_frac=0.25, refit=True, seed=3)
FLAGS = (
    "--tasks finetune --finetune.epochs 3 --finetune.batch-size 16 --finetune.lrs 0.1 0.5 --finetune.head-lr-factor 50"
    " --finetune.weight-decay 0.001 --held-out-frac 0.25 --seed 3 --workers 0"
).split()


def make_run(folder: Path, data: Path, precision: str = "fp32") -> Path:
    model = replace(DEMO.model, width=8, hidden_dim=16, out_dim=8, mlp_after_pool=1)
    how = {"data": data, "eval_px": PX, "device": "cpu", "precision": precision, "loader": replace(DEMO.loader, workers=0)}
    return run_of(replace(DEMO, model=model, **how), folder)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, whose figures are not drawn: that takes most of the time."""
    monkeypatch.setattr(eval_finetune, "draw", lambda *_: [])
    return make_run(tmp_path / "run", pictures)


def subject_of(run: Path, data: Path, cache: Path, ranks: Ranks | None = None) -> Subject:
    opened = open_run(run, "cpu")
    subject = Subject(opened, folder_set(data, opened.config.loader), PX, 0.875, 0, cache)
    return subject if ranks is None else subject._replace(ranks=ranks)


def result(run: Path, name: str = "finetune") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "eval" / f"{name}.json").read_text())
    return found


def tuned(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)["content"]
    return found


# ------------------------------------------------------------------------------------------------- against a plain loop


class Plain(nn.Module):
    def __init__(self, run: Path) -> None:
        super().__init__()
        self.network = copy.deepcopy(cossl.load(run).network)
        self.head = nn.Linear(64, 10)
        for parameter in self.head.parameters():
            nn.init.constant_(parameter, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.network.backbone(x)
        return self.head(self.network.after_pool(y.mean((2, 3))))


def views(folder: Path, rows: np.ndarray, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random crops and flips of some of the pictures, normalized by numbers that are written down here."""
    spec = LoaderSpec((ViewSpec(PX, jitter_p=0, grayscale_p=0),), 16, seed=3, workers=0, subset=rows)
    for batch in TorchLoader(folder, spec).epoch(epoch):
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        yield (batch.split()[0] / 255 - mean[:, None, None]) / std[:, None, None], batch.label


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_takes_the_steps_of_a_plain_loop(pictures: Path, tmp_path: Path, precision: str) -> None:
    run, rows = make_run(tmp_path / "run", pictures, precision), np.arange(0, 80, 2)
    plain = Plain(run).requires_grad_(True).train()
    groups = [{"params": [*plain.network.backbone.parameters(), *plain.network.after_pool.parameters()], "factor": 1}]
    groups += [{"params": list(plain.head.parameters()), "factor": 50}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True, weight_decay=1e-3)
    for epoch in range(3):
        for step, (x, y) in enumerate(views(pictures / "train", rows, epoch)):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * 16 / 256 * group["factor"] * 0.5 * (1 + math.cos(math.pi * (2 * epoch + step) / 6))
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = plain(x)
            loss = -logits.float().log_softmax(1)[torch.arange(len(y)), y].mean()
            plain.zero_grad()
            loss.backward()
            optimizer.step()
    trainer = Trainer(subject_of(run, pictures, tmp_path / "cache"), SETTINGS, "finetune")
    assert trainer.fit(0.05, rows, "x")
    ours, tolerance = trainer.network.state_dict(), {"rtol": 1e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 1e-2, "atol": 1e-3}
    assert ours["head.weight"].abs().max() > 1e-3
    assert {key for key in plain.state_dict() if "project" not in key and "predict" not in key} == set(ours)
    for key, value in ours.items():
        torch.testing.assert_close(value, plain.state_dict()[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def test_the_runs_own_encoder_stays_as_it_is(run: Path, pictures: Path, tmp_path: Path) -> None:
    subject = subject_of(run, pictures, tmp_path / "cache")
    encoder = subject.run.encoder
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    finetune(subject, SETTINGS, "finetune", tmp_path / "out")
    after = encoder.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert before.keys() == after.keys()
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not torch.equal(
        tuned(tmp_path / "out" / "finetune.pt")["network"]["backbone.conv1.weight"], after["network.backbone.conv1.weight"]
    )


# ------------------------------------------------------------------------------------------------- which pictures, and what is chosen


@pytest.mark.parametrize(("percent", "per_class"), [(100, (15, 5)), (50, (7, 3)), (10, (1, 1)), (1, (1, 0))])
def test_labels_are_those_of_the_linear_probe(percent: int, per_class: tuple[int, int]) -> None:
    labels = torch.arange(10).repeat(20)
    parts = parts_of(labels, replace(SETTINGS, label_percent=percent))
    few = few_shot(labels, percent / 100, 3).nonzero()[:, 0] if percent < 100 else torch.arange(200)
    assert parts.whole.tolist() == few.tolist()
    assert parts.held.tolist() == few[held_out(labels[few], 0.25, 3)].tolist()
    assert sorted([*parts.trained, *parts.held]) == few.tolist()
    for part, count in zip(parts, (*per_class, sum(per_class)), strict=True):
        assert torch.bincount(labels[part], minlength=10).tolist() == [count] * 10


def test_rate_is_chosen_on_the_held_out_part_and_never_by_val(run: Path, pictures: Path, tmp_path: Path) -> None:
    """The same pictures in val with each other's labels: another number, the same choice and the same network."""
    (tmp_path / "turned" / "val").mkdir(parents=True)
    (tmp_path / "turned" / "train").symlink_to(pictures / "train")
    names = sorted(path.name for path in (pictures / "val").iterdir())
    for name, other in zip(names, names[3:] + names[:3], strict=True):
        (tmp_path / "turned" / "val" / name).symlink_to(pictures / "val" / other)
    for data in (pictures, tmp_path / "turned"):
        eval_main([str(run), *FLAGS, "--data", str(data)])
    one, other = (result(run, name) for name in ("finetune", "finetune-turned"))
    assert one["grid_held_out"] == other["grid_held_out"]
    assert one["lr"] == other["lr"]
    assert one["top1_of_class"] != other["top1_of_class"]
    first, second = (tuned(run / "eval" / f"{name}.pt") for name in ("finetune", "finetune-turned"))
    assert all(torch.equal(value, second["network"][key]) for key, value in first["network"].items())


def test_choice() -> None:
    held = [[50.0, 90.0, 1.0], [60.0, 80.0, 2.0], [60.0, 70.0, 1.5], [99.0, 99.0, math.nan]]
    assert choose(held, (1, 2, 3, 4), "top1") == 2
    assert choose(held, (1, 2, 3, 4), "cross_entropy") == 0
    with pytest.raises(ValueError, match=r"^fine-tuning diverged at every learning rate: give --finetune.lrs below 4$"):
        choose(held[3:], (4,), "top1")


@pytest.mark.parametrize("refit", [True, False])
def test_the_best_is_trained_again_on_all_or_kept_as_it_is(run: Path, pictures: Path, tmp_path: Path, refit: bool) -> None:
    """The best is not the last here."""
    settings, subject = replace(SETTINGS, refit=refit, how=replace(HOW, lrs=(0.5, 0.1))), subject_of(run, pictures, tmp_path / "cache")
    found = finetune(subject, settings, "finetune", tmp_path / "out")
    trainer, parts = Trainer(subject, settings, "again"), parts_of(subject.pictures.labels["train"], settings)
    assert trainer.fit(found["lr"], parts.whole if refit else parts.trained, "again")
    kept = tuned(tmp_path / "out" / "finetune.pt")
    assert kept["lr"] == found["lr"] == 0.5
    for key, value in trainer.network.network.state_dict().items():
        assert torch.equal(value, kept["network"][key]), key
    if not refit:
        spec = LoaderSpec(evaluation(PX), 1000, workers=0, shuffle=False)
        (batch,) = TorchLoader(pictures / "train", spec).epoch(0)
        with torch.no_grad():
            loss = nn.functional.cross_entropy(trainer.network.eval()(normalize(batch.split()[0][parts.held])), batch.label[parts.held])
        assert found["grid_held_out"][0]["cross_entropy"] == pytest.approx(loss.item(), abs=1e-4)


def test_a_rate_that_diverges_is_never_chosen(run: Path, pictures: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, how=replace(HOW, lrs=(1e30, 0.01), epochs=1))
    found = finetune(subject_of(run, pictures, tmp_path / "cache"), settings, "finetune", tmp_path / "out")
    assert found["grid_held_out"][0] == {"lr": 1e30, "diverged": True}
    assert found["lr"] == 0.01
    assert math.isfinite(found["grid_held_out"][1]["cross_entropy"])
    settings = replace(settings, how=replace(settings.how, lrs=(1e30, 1e35)))
    trainer = Trainer(subject_of(run, pictures, tmp_path / "cache"), settings, "finetune")
    assert not trainer.fit(1e30, np.arange(80), "x")
    assert trainer.keeper.get("x") is None
    with pytest.raises(ValueError, match=r"^fine-tuning diverged at every learning rate: give --finetune.lrs below 1e\+30$"):
        finetune(subject_of(run, pictures, tmp_path / "cache"), settings, "finetune", tmp_path / "out")


# ------------------------------------------------------------------------------------------------- killed, and of several processes


def test_a_killed_training_goes_on_bit_for_bit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = [str(run), *FLAGS]
    eval_main(start)
    whole, network = result(run), tuned(run / "eval" / "finetune.pt")
    put, step, steps, kept = DiskKeeper.put, Trainer._step, list[float](), list[tuple[str, int]]()

    def keep_each(self: DiskKeeper, stage: str, done: int, state: Any, last: bool) -> None:
        put(self, stage, done, state, True)
        kept.append((stage, done))
        if len(kept) in (2, 6, 10):  # in the middle of the first rate, of the second, and of what follows
            raise KeyboardInterrupt

    def count(self: Trainer, optimizer: Any, scaler: Any, rate: float, batch: Any) -> Tensor:
        steps.append(rate)
        return step(self, optimizer, scaler, rate, batch)

    monkeypatch.setattr(DiskKeeper, "put", keep_each)
    monkeypatch.setattr(Trainer, "_step", count)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            eval_main([*start, "--redo"])
    eval_main([*start, "--redo"])
    assert [done for _, done in kept] == [1, 2, 3, 3, 1, 2, 3, 3, 1, 2, 3]
    assert len(steps) == 3 * (3 + 3 + 5)
    again = result(run)
    assert {key: again[key] for key in whole if key != "time"} == {key: value for key, value in whole.items() if key != "time"}
    for part in ("network", "head"):
        assert all(torch.equal(value, tuned(run / "eval" / "finetune.pt")[part][key]) for key, value in network[part].items())
    assert not list((run / "eval" / "cache").glob("*"))


def in_double(subject: Subject, out: Path) -> dict[str, Any]:
    """So that rounding, which ten steps at a high rate blow up, stays small."""
    classifier, seen = eval_finetune.Classifier, eval_finetune._seen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_finetune, "Classifier", lambda *given: classifier(*given).double())
        patch.setattr(eval_finetune, "_seen", lambda images: seen(images).double())
        return finetune(subject, SETTINGS, "finetune", out)


def work(rank: int, folder: Path, run: Path, pictures: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    limit = timedelta(seconds=100)
    distributed.init_process_group("gloo", f"file://{folder}/store", limit, world_size=2, rank=rank)
    eval_finetune.draw = lambda *_: []
    found = in_double(subject_of(run, pictures, folder / "cache", current_ranks()), folder / f"{rank}")
    (folder / f"{rank}.json").write_text(json.dumps(found))
    launch.leave()


def test_two_processes_take_the_steps_of_one(run: Path, pictures: Path, tmp_path: Path) -> None:
    alone = in_double(subject_of(run, pictures, tmp_path / "own"), tmp_path / "alone")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pytest", "cossl.tools.evaluate"])
    torch.multiprocessing.start_processes(work, (tmp_path, run, pictures), 2, start_method="forkserver")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first == {**alone, "grid_held_out": first["grid_held_out"]}
    for one, expected in zip(first["grid_held_out"], alone["grid_held_out"], strict=True):
        assert one == {**expected, "cross_entropy": pytest.approx(expected["cross_entropy"], abs=1e-4)}
    assert not (tmp_path / "1").exists()
    one, expected = (tuned(tmp_path / name / "finetune.pt") for name in ("0", "alone"))
    for part in ("network", "head"):
        torch.testing.assert_close(one[part], expected[part], rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------- the command


def test_the_command_from_end_to_end(pictures: Path, betons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", pictures)
    eval_main([str(run), *FLAGS, "--data", str(betons)])
    name = f"finetune-{betons.name}"
    found, kept = result(run, name), tuned(run / "eval" / f"{name}.pt")
    (batch,) = TorchLoader(betons / "val.beton", LoaderSpec(evaluation(PX), 1000, workers=0, shuffle=False)).epoch(0)
    plain = Plain(run)
    plain.network.load_state_dict(kept["network"], strict=False)
    plain.head.load_state_dict(kept["head"])
    with torch.no_grad():
        logits = plain.eval()(normalize(batch.split()[0]))
    order = logits.argsort(1, descending=True)
    assert found["top1"] == pytest.approx(100 * (order[:, 0] == batch.label).double().mean().item(), abs=1e-3)
    assert found["top5"] == pytest.approx(100 * (order[:, :5] == batch.label[:, None]).any(1).double().mean().item(), abs=1e-3)
    own = {name: 100 * (order[:, 0][batch.label == i] == i).double().mean().item() for i, name in enumerate(kept["class_names"])}
    assert found["top1_of_class"] == pytest.approx(own, abs=0.01)
    (row,) = found["table"]["rows"]
    assert row == [
        "fine-tuned",
        *(round(found[at], 2) for at in ("top1", "top5", "mean_of_classes", "held_out_top1")),
        found["lr"],
        found["head_lr"],
    ]
    assert found["head_lr"] == 50 * found["lr"]
    assert found["held_out_top1"] == max(each["top1"] for each in found["grid_held_out"])
    assert found["pictures"] == {"trained": 60, "held": 20, "whole": 80}
    assert found["figures"] == [f"{name}-confusion.png"]
    assert (run / "eval" / found["figures"][0]).stat().st_size > 10_000
    protocol = found["protocol"]
    assert {
        "crop_px",
        "centre_frac",
        "dataset",
        "pictures",
        "checkpoint",
        "step",
        "epochs",
        "lrs",
        "seed",
        "label_percent",
    } <= protocol.keys()
    assert {"code_version", "versions", "time", "precision"} <= found.keys()
    said = capsys.readouterr()
    assert f"{name}: 9 steps of 16 pictures are few" in said.err
    eval_main([str(run), *FLAGS, "--data", str(betons), "--features", "global"])
    assert "done before; --redo does it again" in capsys.readouterr().out


def test_one_picture_of_each_class_is_chosen_by_its_own_cross_entropy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_main([str(run), *FLAGS, "--tasks", "finetune-1", "finetune-10"])
    assert capsys.readouterr().err.count("10 pictures, no class with two: none to hold out") == 2
    for name in ("finetune-1", "finetune-10"):
        found = result(run, name)
        assert found["pictures"] == {"trained": 10, "held": 0, "whole": 10}
        losses = {each["lr"]: each["cross_entropy"] for each in found["grid_held_out"]}
        assert found["lr"] == min(losses, key=lambda lr: losses[lr])
    assert result(run, "finetune-10")["protocol"]["label_percent"] == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--finetune.epochs 0", "--finetune.epochs 0: expected 1 or more"),
        ("--finetune.batch-size 1", "--finetune.batch-size 1: expected 2 or more"),
        ("--finetune.weight-decay nan", "--finetune.weight-decay nan: expected 0 or more"),
        ("--finetune.lrs 0.1 0", r"--finetune.lrs \(0.1, 0.0\): expected different numbers above 0"),
        ("--finetune.lrs 0.1 0.1", r"--finetune.lrs \(0.1, 0.1\): expected different numbers above 0"),
        ("--finetune.lrs inf", r"--finetune.lrs \(inf,\): expected different numbers above 0"),
        ("--finetune.head-lr-factor 0", "--finetune.head-lr-factor 0.0: expected more than 0"),
        ("--finetune.epoch 1", "finetune.epoch"),
    ],
)
def test_mistakes_are_one_line(run: Path, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as found:
        eval_main([str(run), "--tasks", "finetune", *flags.split()])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("world", "count", "expected"),
    [
        (1, 80, 16),
        (4, 80, 16),
        (4, 15, 12),
        (1, 3, 3),
        (3, 80, "--finetune.batch-size 16 does not divide among 3 ranks: use 15"),
        (32, 80, "--finetune.batch-size 16 does not divide among 32 ranks: use 32"),
        (4, 3, "finetune: 3 labelled pictures for 4 ranks are too few: batch norms need 2 or more in a step"),
        (1, 1, "finetune: 1 labelled pictures for 1 ranks are too few: batch norms need 2 or more in a step"),
    ],
)
def test_batch_size_divides_among_ranks(run: Path, pictures: Path, tmp_path: Path, world: int, count: int, expected: Any) -> None:
    trainer = Trainer(subject_of(run, pictures, tmp_path / "cache"), SETTINGS, "finetune")
    trainer.subject = trainer.subject._replace(ranks=Ranks(0, world))
    if isinstance(expected, int):
        assert trainer.batch_size(count) == expected
        return
    with pytest.raises(ValueError, match=f"^{expected}$"):
        trainer.batch_size(count)
