"""A run is a function of its config and seed: killed and resumed it ends in the same weights; mistakes end in one line."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cossl import train
from cossl.models import checkpoint, co_ssl
from cossl.models.flags import flatten
from cossl.models.optim import make_optimizer
from cossl.models.probe import OnlineProbe
from cossl.pipelines.augment import augment
from cossl.pipelines.batch import LoaderSpec
from cossl.pipelines.synthetic import SyntheticLoader

TINY = (
    "--batch-size 16 --log-every 1 --views.size-px 16 --eval-px 16 --model.width 8 --model.receptive-field 9 --model.hidden-dim 16"
    " --model.out-dim 8 --optim.warmup-epochs 1 --loader.backend torch --device cpu"
).split()


def run(data: Path, run_dir: Path, *flags: str) -> dict:
    train.main(["demo", "--data", str(data), "--run-dir", str(run_dir), "--epochs", "3", "--loader.workers", "0", *TINY, *flags])
    return json.loads((run_dir / "results.json").read_text())


def complaint(capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> str:
    """The one line on stderr with which a user's mistake ends."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("cossl train: ")
    assert "\n" not in said
    return said


@pytest.fixture(scope="session")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run: 3 epochs of 5 steps."""
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    run(pictures, run_dir)
    return run_dir


def metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without the speed, the only thing in it that may differ."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "images_per_s"} for r in records]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = (checkpoint.load(run_dir / "last.pt") for run_dir in (one, other))
    assert a["step"] == b["step"]
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for p, q in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(p[k], q[k]) for k in p if isinstance(p[k], torch.Tensor))
    assert metrics(one) == metrics(other)
    assert json.loads((one / "results.json").read_text())["linear_top1"] == json.loads((other / "results.json").read_text())["linear_top1"]


def test_a_run_leaves_its_record(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert not results["collapsed"]
    assert 2 < results["rank"] < 16
    for protocol in ("linear_top1", "knn_top1"):
        assert set(results[protocol]) == {"trained", "untrained", "pixels"}
        assert all(0 <= value <= 100 for value in results[protocol].values())
    assert results["images_per_s"] > 0
    assert results["protocol"]["knn_k"] == 20
    assert [r["step"] for r in metrics(finished)] == list(range(1, 16))
    assert {"loss", "global", "local_to_global", "global_to_local", "probe_top1", "lr", "ema_tau"} <= set(metrics(finished)[0])
    assert all(r["positions"] == 4 and r["views_without_position"] == 0 for r in metrics(finished))
    config = json.loads((finished / "config.json").read_text())
    assert config["preset"] == "demo"
    assert config["model.width"] == 8
    with Image.open(finished / "batch.png") as sheet, Image.open(finished / "curves.png") as curves:
        assert sheet.size == (3 * 264 + 8, 4 * 264 + 8)
        assert curves.width > 500


def test_training_moves_the_weights_and_the_untrained_row_does_not(finished: Path) -> None:
    state = checkpoint.load(finished / "last.pt")
    torch.manual_seed(0)
    initial = train.CoSsl(train.parse(["demo", *TINY])[1].model, train.LossConfig()).state_dict()
    moved = [k for k in initial if "weight" in k and k.startswith("online") and not torch.equal(initial[k], state["model"][k])]
    assert len(moved) > 20


def test_knn_while_the_run_goes_on_changes_nothing_else(finished: Path, pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "run", "--knn-every", "1", "--knn-pictures", "64")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    tested = [line for line in lines if "knn_top1" in line]
    assert [(line["step"], set(line)) for line in tested] == [(step, {"step", "epoch", "knn_top1"}) for step in (5, 10)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line not in tested))
    assert_same_run(finished, tmp_path / "run")
    assert "collapsed" not in (tmp_path / "run" / "train.log").read_text()
    assert (tmp_path / "run" / "train.log").read_text().endswith("finished\n")


def test_another_seed_is_another_run(finished: Path, pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "run", "--seed", "1")
    assert metrics(tmp_path / "run")[0]["loss"] != metrics(finished)[0]["loss"]


def test_views_without_a_position_are_counted_and_harmless(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "run", "--positions.strategy", "disjoint", "--positions.count", "2")
    records = metrics(tmp_path / "run")
    assert all(r["positions"] <= 2 * (1 - r["views_without_position"]) for r in records)
    assert 0 < sum(r["views_without_position"] for r in records) / len(records) < 1
    assert all(r["loss"] == r["loss"] for r in records)


MULTI_CROP = (
    "--views.recipe multi_crop --views.size-px 32 --views.crop-min 0.2 --views.local-crops-px 16 --views.local-crops-number 2".split()
)


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.method", "dino", "--model.prototypes", "32", *MULTI_CROP],
        ["--model.method", "mocov3", "--model.predictors", "per_size", "--device-batch-size", "8", *MULTI_CROP],
    ],
)
def test_every_method_trains_on_multi_crop_and_resumes(pictures: Path, tmp_path: Path, monkeypatch, flags: list[str]) -> None:
    run(pictures, tmp_path / "whole", *flags)
    first = metrics(tmp_path / "whole")[0]
    assert first["positions"] == (16 + 16 + 4 + 4) / 4  # 4 x 4 in views of 32 px, 2 x 2 in those of 16
    steps = iter(range(7))
    step = train.step_

    def until_interrupted(*args: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train, "step_", until_interrupted)
    with pytest.raises(SystemExit, match="130"):
        run(pictures, tmp_path / "cut", *flags)
    monkeypatch.setattr(train, "step_", step)
    run(pictures, tmp_path / "cut", *flags, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_parts_of_a_batch_add_up_to_the_gradients_of_their_mean_loss() -> None:
    config = train.parse(["demo", *TINY, "--device-batch-size", "4", "--optim.optimizer", "sgd", "--optim.weight-decay", "0"])[1]
    model = train.build(config, torch.device("cpu"))
    twin = copy.deepcopy(model)
    spec = LoaderSpec(config.views.specs(), 8, positions=train.position_specs(config, model))
    batch = next(SyntheticLoader(Path(), spec).epoch(0))
    optimizer = make_optimizer(model.online.named_parameters(), config.optim)
    online_probe = OnlineProbe(model.online.backbone.out_channels, 10)
    state = train.State(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), online_probe)
    train.step_(state, model, batch, config, 0.5, 0.9, 0)
    losses = []
    for part in (slice(0, 4), slice(4, 8)):
        views = [augment(view[part], batch.photometry[part, v]) for v, view in enumerate(batch.split())]
        losses.append(twin(views, batch.positions[part])["loss"])
    torch.testing.assert_close(state.window["loss"], torch.stack(losses).mean())
    parameters = list(twin.online.parameters())
    gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    for ours, before, gradient in zip(model.online.parameters(), parameters, gradients, strict=True):
        torch.testing.assert_close(ours, before - 0.5 * gradient)


def test_a_run_that_has_collapsed_says_so_once(pictures: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(co_ssl, "spread", lambda z: torch.zeros(()))
    results = run(pictures, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("projections collapsed (spread 0.00") == 1
    assert "\ncollapsed: " in said
    assert results["collapsed"]


def test_resume_before_the_first_checkpoint_is_a_start(finished: Path, pictures: Path, tmp_path: Path) -> None:
    """A requeued job's one command: no folder yet, then what a run killed in its first steps leaves, then a checkpoint."""
    run_dir = tmp_path / "run"
    run(pictures, run_dir, "--resume")
    assert_same_run(finished, run_dir)
    for path in (*run_dir.glob("*.pt"), run_dir / "results.json"):
        path.unlink()
    run(pictures, run_dir, "--resume")
    assert_same_run(finished, run_dir)


@pytest.mark.parametrize("kill_at", [1, 5, 8])
def test_killed_and_resumed_ends_in_the_same_weights(finished: Path, pictures: Path, tmp_path: Path, kill_at: int) -> None:
    """SIGKILL once step `kill_at` is on record (5 is an epoch's end), then --resume, with another number of workers."""
    run_dir = tmp_path / "run"
    flags = ["--data", str(pictures), "--run-dir", str(run_dir), "--epochs", "3", "--checkpoint-every", "2", *TINY]
    command = [sys.executable, "-m", "cossl.train", "demo", "--loader.workers", "0", *flags]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums split over another number of threads round differently
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | threads)
    log, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= kill_at):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run_dir / "results.json").exists(), "the kill came too late to show anything"
    if not (run_dir / "last.pt").exists():
        assert kill_at < 2
        run(pictures, tmp_path / "again")
        assert_same_run(finished, tmp_path / "again")
        return
    run(pictures, run_dir, "--resume", "--checkpoint-every", "2", "--loader.workers", "2")
    assert_same_run(finished, run_dir)


@pytest.mark.long
@pytest.mark.parametrize("flags", [[], ["--model.method", "dino", "--model.prototypes", "32", *MULTI_CROP]], ids=["byol", "dino"])
def test_a_run_killed_at_ten_random_moments_ends_as_if_it_had_not_been(pictures: Path, tmp_path: Path, flags: list[str]) -> None:
    """SIGKILL after 0 to 3 further steps, or before the first, ten times over, each time with another number of workers."""
    run(pictures, tmp_path / "whole", *flags)
    random, run_dir, steps = np.random.default_rng(len(flags)), tmp_path / "run", []
    for life in range(10):
        common = ["--data", str(pictures), "--run-dir", str(run_dir), "--epochs", "3", "--checkpoint-every", "1", "--resume", *TINY, *flags]
        command = [sys.executable, "-m", "cossl.train", "demo", "--loader.workers", str(life % 3), *common]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        log, until = run_dir / "metrics.jsonl", time.monotonic() + 120
        goal = (steps[-1] if steps else 0) + int(random.integers(0, 4))
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= goal):
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
        steps.append(checkpoint.newest(run_dir)[0]["step"] if checkpoint.exists(run_dir) else 0)
    assert len(set(steps)) > 3, steps
    run(pictures, run_dir, "--checkpoint-every", "1", "--resume", *flags)
    assert_same_run(tmp_path / "whole", run_dir)


def test_a_non_finite_loss_names_the_steps(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"not finite between steps \d+ and \d+"):
        run(pictures, tmp_path / "run", "--optim.base-lr", "1e30", "--optim.warmup-epochs", "0")


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["dmeo"], ["unknown preset 'dmeo'", "did you mean demo"]),
        (["demo", "--epohcs", "3"], ["--epohcs", "--epochs"]),
        (["demo", "--epochs", "three"], ["--epochs", "three"]),
        (["demo", "--epochs", "0"], ["--epochs 0", "1 or more"]),
        (["demo", "--model.receptive-field", "30"], ["receptive_field=30", "29"]),
        (["demo", "--model.width", "4"], ["--model.width 4", "8 or more"]),
        (["demo", "--loss.local-to-global", "1.5"], ["local_to_global=1.5", "0 to 1"]),
        (["demo", "--device-batch-size", "5"], ["--device-batch-size 5", "--batch-size 32", "try 4"]),
        (["demo", "--model.method", "dino", "--model.predictors", "per_size"], ["dino has no predictors"]),
        (["demo", "--model.predictors", "per_size"], ["per_size", "multi_crop"]),
        (["demo", "--loader.backend", "synthetic", "--optim.warmup-start-lr", "1"], ["warmup_start_lr=1", "0.002"]),
        (["demo", "--loader.backend", "synthetic", "--norm-group", "2"], ["--norm-group 2", "1 devices"]),
        (["demo", "--model.local-stage", "3", "--loss.local-to-global", "0"], ["local_to_global=0", "local_stage 4"]),
        (["demo", "--recompute", "--device", "auto", "--compile"], ["--recompute", "--no-compile"]),
        (["demo", "--precision", "fp16", "--on-nonfinite", "skip"], ["--on-nonfinite skip", "scaler"]),
        (["demo", "--loss.temperature", "0.2"], ["temperature=0.2", "mocov3"]),
        (["demo", "--loader.backend", "synthetic", "--views.recipe", "multi_crop", "--views.local-crops-number", "0"], ["1 or more"]),
        (["demo", "--loss.combine", "product"], ["combine", "product", "convex"]),
        (["in1k", "--epochs", "5"], ["--optim.warmup-epochs 10", "--epochs 5"]),
        (["imagenette"], ["--data", "cossl convert"]),
        (["imagenette", "--data", "nowhere"], ["nowhere does not exist", "train.beton"]),
        (["imagenette", "--resume"], ["--resume needs --run-dir"]),
        (
            ["demo", "--loader.backend", "synthetic", "--resume", "--run-dir", str(Path(__file__).parent)],
            ["no run's folder", "config.json"],
        ),
        (["demo", "--loader.backend", "synthetic", "--positions.strategy", "uniform", "--positions.count", "99"], ["99", "1 to 16"]),
        (["demo", "--loader.backend", "synthetic", "--batch-size", "5000"], ["5000", "4096", "--batch-size"]),
        (["demo", "--loader.backend", "synthetic", "--views.crop-min", "0"], ["crop area"]),
        (["demo", "--loader.backend", "synthetic", "--views.jitter", "3"], ["jitter 3", "0 (none) to 2.5"]),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(capsys, tmp_path, monkeypatch, argv: list[str], words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    said = complaint(capsys, argv)
    assert all(word in said for word in words), said
    assert not any(tmp_path.iterdir()), "a refused run must leave nothing"


def test_too_large_a_batch_and_bad_folders(capsys, pictures: Path, tmp_path: Path) -> None:
    said = complaint(capsys, ["imagenette", "--data", str(pictures), "--batch-size", "100"])
    assert "100 is larger than the set of 80" in said
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert "is empty" in complaint(capsys, ["imagenette", "--data", str(tmp_path)])
    (tmp_path / "train" / "cat").mkdir()
    assert "without pictures: cat" in complaint(capsys, ["imagenette", "--data", str(tmp_path)])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_is_one_line(capsys, pictures: Path, tmp_path: Path, workers: str) -> None:
    shutil.copytree(pictures, tmp_path / "own")
    broken = sorted((tmp_path / "own" / "train").rglob("*.*"))[40]
    broken.write_bytes(broken.read_bytes()[:200])
    argv = ["demo", "--data", str(tmp_path / "own"), "--run-dir", str(tmp_path / "run"), *TINY, "--loader.workers", workers]
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"cossl train: cannot read {broken}: ")
    assert said.endswith(f"which sets broken pictures aside; or replace it and go on with --resume --run-dir {tmp_path / 'run'}")


def test_pictures_are_found_from_another_folder_too(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.parse(["demo", "--data", "b"])[1].data == tmp_path / "b"
    assert train.parse(["demo"])[1].data is None


def test_a_cut_beton_is_refused(capsys, betons: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        whole = (betons / f"{split}.beton").read_bytes()
        (tmp_path / f"{split}.beton").write_bytes(whole[: len(whole) // 2])
    said = complaint(capsys, ["imagenette", "--data", str(tmp_path), "--batch-size", "16"])
    assert "train.beton" in said
    assert "cossl convert" in said


def test_a_run_folder_is_never_overwritten(capsys, finished: Path, pictures: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.iterdir()}
    assert "holds something already" in complaint(capsys, ["demo", "--data", str(pictures), "--run-dir", str(finished), *TINY])
    assert {p: p.stat().st_mtime_ns for p in finished.iterdir()} == before


def test_a_checkpoint_of_another_config_is_refused(capsys, finished: Path, pictures: Path) -> None:
    whole = {path: path.read_bytes() for path in finished.glob("*.pt")}
    flags = ["--data", str(pictures), "--run-dir", str(finished), "--epochs", "3", "--loader.workers", "0", *TINY, "--resume"]
    said = complaint(capsys, ["demo", *flags, "--loss.local-weight", "0.5"])
    assert "--loss.local-weight 0.3 (now 0.5)" in said
    for path, content in whole.items():
        path.write_bytes(content[:1000])
    said = complaint(capsys, ["demo", *flags])
    assert re.search(r"no checkpoint that can be read: last.pt is no whole .*, previous.pt is no whole", said)
    for path, content in whole.items():
        path.write_bytes(content)


def test_every_preset_is_valid_and_documented() -> None:
    for name, preset in train.PRESETS.items():
        assert preset.__doc__
        assert train.parse([name])[1] == preset()


def test_no_preset_moves_unseen() -> None:
    """Every value of every preset. Where a change is meant: write the file anew and say so in the commit."""
    golden = json.loads((Path(__file__).parent / "golden" / "presets.json").read_text())
    assert {name: json.loads(json.dumps(flatten(preset()))) for name, preset in train.PRESETS.items()} == golden


def test_a_step_that_is_not_finite_is_left_out_and_counted(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    """The second of fifteen: nothing that it touched stays, so the steps after it go on from the first."""
    forward, calls = co_ssl.CoSsl.forward, iter(range(100))

    def spoiled(self: co_ssl.CoSsl, views: list[torch.Tensor], positions: torch.Tensor) -> dict[str, torch.Tensor]:
        broken = next(calls) == 1
        return forward(self, [view * float("nan") for view in views] if broken else views, positions)

    monkeypatch.setattr(co_ssl.CoSsl, "forward", spoiled)
    results = run(pictures, tmp_path / "run", "--on-nonfinite", "skip", "--log-every", "5")
    first, *rest = metrics(tmp_path / "run")
    assert first["skipped"] == 1
    assert all("skipped" not in record for record in rest)
    assert all(abs(value) < float("inf") for record in metrics(tmp_path / "run") for value in record.values())
    assert results["linear_top1"]["trained"] > 0
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert state["model"]["online.backbone.bn1.num_batches_tracked"] == 2 * 14


def test_weights_that_are_not_finite_are_no_checkpoint(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    update = train.update_

    def spoiled(state: train.State, *rest: Any) -> None:
        update(state, *rest)
        if state.step == 7:
            next(state.model.online.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(train, "update_", spoiled)
    with pytest.raises(RuntimeError, match=r"weights not finite at step 8|not finite between"):
        run(pictures, tmp_path / "run", "--checkpoint-every", "2", "--log-every", "100")
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert state["step"] == 6
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize("flags", [["--precision", "fp16"], ["--recompute", "--no-compile"], ["--keep-every", "2"]])
def test_ways_to_train_that_change_little_or_nothing(finished: Path, pictures: Path, tmp_path: Path, flags: list[str]) -> None:
    run(pictures, tmp_path / "run", *flags)
    if "--precision" in flags:
        ours, theirs = ([r["loss"] for r in metrics(folder)][:5] for folder in (tmp_path / "run", finished))
        assert ours == pytest.approx(theirs, abs=0.2)
        assert ours != theirs
        return
    assert_same_run(finished, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").glob("epoch-*")) == (["epoch-0002.pt"] if "--keep-every" in flags else [])
