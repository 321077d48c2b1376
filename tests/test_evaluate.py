"""`cossl eval` from end to end on a tiny run: sklearn's numbers, what is kept and done again, transfer, several processes, mistakes."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded import picture
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, distributed

import cossl
from cossl.models import checkpoint, launch
from cossl.models.flags import flatten
from cossl.models.linear_probe import few_shot
from cossl.models.parallel import current_ranks
from cossl.models.probe import knn_top1s
from cossl.pipelines.augment import normalize
from cossl.pipelines.batch import LoaderSpec
from cossl.pipelines.torch_loader import TorchLoader
from cossl.pipelines.views import evaluation
from cossl.tools import eval_features, eval_figures, eval_linear
from cossl.tools.eval_datasets import DATASETS
from cossl.tools.eval_features import DiskKeeper, Subject, features
from cossl.tools.eval_linear import groups, per_class
from cossl.tools.eval_pictures import dataset_set, folder_set
from cossl.tools.evaluate import TASKS, EvalArgs, eval_main
from cossl.tools.opened import open_run
from cossl.train import Config, build, demo

PX = 32
SMALL = "--epochs 3 --base-lrs 0.3 3 30 --weight-decays 0 1e-4 --k 5 20 --temperature 0.07 1".split()


def make_run(path: Path, data: Path, seed: int = 0, step: int = 7) -> Path:
    """A run's folder with a checkpoint of an untrained network that has an MLP after pooling."""
    model = replace(demo().model, width=8, hidden_dim=16, out_dim=8, mlp_after_pool=1)
    config: Config = replace(demo(), data=data, model=model, eval_px=PX, seed=seed, device="cpu", loader=replace(demo().loader, workers=0))
    path.mkdir(exist_ok=True)
    checkpoint.save(path, {"config": flatten(config), "model": build(config, torch.device("cpu")).state_dict(), "step": step})
    (path / "config.json").write_text(json.dumps({"preset": "demo"} | flatten(config)))
    return path


@pytest.fixture
def run(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, whose figures are not drawn: that takes most of the time."""
    monkeypatch.setattr(eval_linear, "draw", lambda *_: [])
    return make_run(tmp_path / "run", pictures)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A run with all its results."""
    path = make_run(tmp_path_factory.mktemp("evaluated") / "run", pictures)
    eval_main([str(path), *SMALL, "--features", "global", "local_mean", "position"])
    return path


def result(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "eval" / f"{name}.json").read_text())
    return found


def vectors(run: Path, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Global vectors, maps and labels, by the run's encoder and the reference loader."""
    encoder = cossl.load(run)
    (batch,) = TorchLoader(folder, LoaderSpec(evaluation(PX), 1000, workers=0, shuffle=False)).epoch(0)
    whole, y = encoder(normalize(batch.split()[0]))
    return whole, y, batch.label


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


# ------------------------------------------------------------------------------------------------- the numbers


def test_knn_is_sklearns(evaluated: Path, pictures: Path) -> None:
    (x, y, label), (val_x, val_y, val_label) = (vectors(evaluated, pictures / split) for split in ("train", "val"))
    sets = {"global": (x, val_x), "local_mean": (y.mean((2, 3)), val_y.mean((2, 3)))}
    rows = {tuple(row[:3]): row[3] for row in result(evaluated, "knn")["table"]["rows"]}
    assert len(rows) == 3 * 2 * 2
    for name, (train, test) in sets.items():
        train, test = ((a / a.norm(dim=1, keepdim=True)).double().numpy() for a in (train, test))
        for k in (5, 20):
            for t in (0.07, 1):
                oracle = KNeighborsClassifier(k, weights=lambda d, t=t: np.exp((1 - d**2 / 2 - 1) / t), algorithm="brute")
                expected = 100 * oracle.fit(train, label.numpy()).score(test, val_label.numpy())
                assert rows[name, k, t] == pytest.approx(expected, abs=2.6), (name, k, t)  # one of 40 pictures is 2.5


@pytest.mark.parametrize("feature", ["global", "local_mean", "position"])
def test_kept_weights_give_the_number_that_is_told(evaluated: Path, pictures: Path, feature: str) -> None:
    whole, y, label = vectors(evaluated, pictures / "val")
    x = {"global": whole[None], "local_mean": y.mean((2, 3))[None], "position": y.flatten(2).permute(2, 0, 1)}[feature]
    kept = torch.load(evaluated / "eval" / f"linear-{feature}.pt", weights_only=True)["content"]
    said = torch.baddbmm(kept["bias"][:, None], x, kept["weight"].transpose(1, 2)).argmax(2)
    top1 = 100 * (said == label).double().mean(1)
    told = result(evaluated, "linear")["features"][feature]
    assert told["top1"] == pytest.approx(top1.mean().item(), abs=0.3 if feature == "position" else 2.6)
    assert kept["class_names"] == sorted(path.name for path in (pictures / "val").iterdir())
    if feature == "position":
        torch.testing.assert_close(torch.tensor(told["top1_map"]).flatten(), top1.float(), atol=2.6, rtol=0)
    else:
        own = {name: 100 * (said[0][label == i] == i).double().mean().item() for i, name in enumerate(kept["class_names"])}
        assert told["top1_of_class"] == pytest.approx(own, abs=26)  # four pictures a class
        assert told["mean_of_classes"] == pytest.approx(sum(told["top1_of_class"].values()) / 10, abs=0.01)


def test_every_result_has_table_figures_and_protocol(evaluated: Path) -> None:
    for task in EvalArgs.tasks:
        found = result(evaluated, task)
        protocol = found["protocol"]
        assert found["title"].startswith(TASKS[task].title)
        assert all(len(row) == len(found["table"]["columns"]) for row in found["table"]["rows"])
        assert all(size_of(evaluated / "eval" / name)[0] > 300 for name in found["figures"])
        assert len(found["figures"]) == (0 if task == "knn" else 3)
        assert {"crop_px", "centre_frac", "features", "dataset", "pictures", "checkpoint", "step"} <= protocol.keys()
        assert (protocol["crop_px"], protocol["step"], protocol["checkpoint"]) == (PX, 7, "last.pt")
        own = {"k", "temperature"} if task == "knn" else {"base_lrs", "weight_decays", "epochs", "batch_size", "seed", "held_out_frac"}
        assert own <= protocol.keys()
        assert {"code_version", "versions", "time"} <= found.keys()
        assert any("12 x 12 pixels" in row for row in found["table"]["rows"])
    assert result(evaluated, "fewshot-10")["protocol"]["label_percent"] == 10
    assert not list((evaluated / "eval" / "cache").glob("heads-*"))


def test_best_is_not_chosen_by_val(run: Path, pictures: Path, tmp_path: Path) -> None:
    """The same pictures in val with each other's labels: other numbers, the same choice."""
    (tmp_path / "turned" / "val").mkdir(parents=True)
    (tmp_path / "turned" / "train").symlink_to(pictures / "train")
    names = sorted(path.name for path in (pictures / "val").iterdir())
    for name, other in zip(names, names[3:] + names[:3], strict=True):
        (tmp_path / "turned" / "val" / name).symlink_to(pictures / "val" / other)
    for data in (pictures, tmp_path / "turned"):
        eval_main([str(run), *SMALL, "--tasks", "linear", "--data", str(data)])
    one, other = (result(run, name)["features"]["global"] for name in ("linear", "linear-turned"))
    assert one["grid_held_out"] == other["grid_held_out"]
    assert (one["base_lr"], one["weight_decay"]) == (other["base_lr"], other["weight_decay"])
    assert one["top1_of_class"] != other["top1_of_class"]


def test_without_two_pictures_of_a_class_the_own_cross_entropy_chooses(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_main([str(run), *SMALL, "--tasks", "fewshot-1"])
    assert "10 pictures, no class with two: none to hold out" in capsys.readouterr().err
    grid = result(run, "fewshot-1")["features"]["global"]
    assert grid["held_out_top1"] == max(row["top1"] for row in grid["grid_held_out"])


def test_per_class_of_classes_that_val_lacks() -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 2, 4]])
    found = per_class(confusion, ["a", "b", "c"])
    assert found["top1_of_class"] == {"a": 75.0, "c": 50.0}
    assert found["mean_of_classes"] == 62.5
    assert sorted(found["most_confused"]) == [["a", "b", 25.0], ["c", "a", 25.0], ["c", "b", 25.0]]


# ------------------------------------------------------------------------------------------------- kept, and done again


def forbid(*_: Any, **__: Any) -> Any:
    raise AssertionError("the network ran")


def test_what_has_its_result_is_skipped_until_something_changes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [str(run), *SMALL, "--tasks", "knn", "linear"]
    eval_main(start)
    times = {name: (run / "eval" / f"{name}.json").stat().st_mtime_ns for name in ("knn", "linear")}
    monkeypatch.setattr(eval_features, "extract", forbid)
    capsys.readouterr()
    eval_main(start)
    assert capsys.readouterr().out.count("done before; --redo does it again") == 2
    eval_main([*start, "--epochs", "2"])  # the probe alone, on the vectors that are kept
    assert times == {name: (run / "eval" / f"{name}.json").stat().st_mtime_ns for name in ("knn", "linear")}
    (other,) = (run / "eval").glob("linear-????????.json")  # beside the one of other settings
    assert json.loads(other.read_text())["protocol"]["epochs"] == 2
    (run / "eval" / "linear-global.pt").unlink()  # of what it names something is missing
    capsys.readouterr()
    eval_main(start)
    assert capsys.readouterr().out.count("done before") == 1
    with pytest.raises(AssertionError, match="the network ran"):
        eval_main([*start, "--redo"])
    monkeypatch.undo()
    monkeypatch.setattr(eval_linear, "draw", lambda *_: [])
    eval_main([*start, "--redo"])
    monkeypatch.setattr(eval_features, "extract", forbid)
    assert times["knn"] < (run / "eval" / "knn.json").stat().st_mtime_ns
    make_run(run, Path(result(run, "knn")["protocol"]["pictures"]["data"]), seed=1)
    with pytest.raises(AssertionError, match="the network ran"):
        eval_main(start)


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "other"])
def test_a_damaged_cache_is_said_and_made_again(run: Path, capsys: pytest.CaptureFixture[str], harm: str) -> None:
    start = [str(run), *SMALL, "--tasks", "knn"]
    eval_main(start)
    before, (path,) = result(run, "knn")["table"], (run / "eval" / "cache").glob("train-global-*.pt")
    content = path.read_bytes()
    at = len(content) // 2
    if harm == "other":
        checkpoint.write(path, {"key": {}, "content": torch.zeros(1)})
    else:
        path.write_bytes({"flip": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], "cut": content[:at], "empty": b""}[harm])
    (run / "eval" / "knn.json").unlink()
    capsys.readouterr()
    eval_main(start)
    assert f"{path.name} in {path.parent} is damaged: made again" in capsys.readouterr().err
    assert result(run, "knn")["table"] == before
    assert torch.load(path, weights_only=True)["content"].shape == (1, 80, 64)


def test_keep_cache_false_removes_the_vectors(run: Path) -> None:
    eval_main([str(run), *SMALL, "--tasks", "knn", "--no-keep-cache"])
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["knn.json"]


def test_a_killed_probe_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = [str(run), *SMALL, "--tasks", "linear", "--features", "global"]
    eval_main(start)
    whole, put, epochs = result(run, "linear"), DiskKeeper.put, list[int]()

    def keep_each(self: DiskKeeper, stage: str, done: int, state: Any, last: bool) -> None:
        put(self, stage, done, state, True)
        epochs.append(done)
        if len(epochs) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(DiskKeeper, "put", keep_each)
    with pytest.raises(KeyboardInterrupt):
        eval_main([*start, "--redo"])
    assert len(list((run / "eval" / "cache").glob("heads-*"))) == 2
    eval_main([*start, "--redo"])
    assert epochs == [1, 2, 3, 1, 2, 3]
    again = result(run, "linear")
    assert again["features"] == whole["features"]


def test_a_keeper_keeps_seldom_but_the_last(tmp_path: Path) -> None:
    keeper = DiskKeeper(tmp_path, {"a": 1}, every_s=1e6)
    keeper.put("x", 1, lambda: {"h": torch.ones(2)}, False)
    assert keeper.get("x") is None
    keeper.put("x", 2, lambda: {"h": torch.ones(2)}, True)
    found = keeper.get("x")
    assert found is not None
    assert found[0] == 2
    assert DiskKeeper(tmp_path, {"a": 2}).get("x") is None
    keeper.drop()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- in memory or not


def test_streamed_probes_are_those_in_memory(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All pictures in one batch, so that their order is none."""
    start = [str(run), *SMALL, "--tasks", "linear", "--epochs", "1", "--batch-size", "80", "--features", "global", "position"]
    found = []
    for memory in ("16", "1e-6"):
        eval_main([*start, "--memory-gib", memory, "--out", str(run / memory)])
        found.append(json.loads((run / memory / "linear.json").read_text()))
    assert "the network runs in every epoch" in capsys.readouterr().err
    assert [{one["vectors"] for one in each["features"].values()} for each in found] == [{"kept in memory"}, {"computed in every epoch"}]
    weights = [torch.load(run / memory / "linear-position.pt", weights_only=True)["content"]["weight"] for memory in ("16", "1e-6")]
    rows = [{each["base_lr"] for each in one["features"]["position"]["chosen"]} for one in found]
    assert rows[0] == rows[1]
    same = (weights[0] - weights[1]).abs().amax((1, 2)) < 1e-2 * weights[0].abs().amax()
    assert same.float().mean() > 0.8  # a tie between two heads may fall otherwise


def test_augmented_views_are_new_in_every_epoch(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    represent = eval_features.represent

    def watched(encoder: Any, images: Tensor, names: Any) -> Any:
        seen.append(images.clone())
        return represent(encoder, images, names)

    monkeypatch.setattr(eval_features, "represent", watched)
    start = [str(run), *SMALL, "--tasks", "linear", "--features", "global", "--augment", "--no-refit", "--batch-size", "80"]
    eval_main(start)
    trained = [images for images in seen if len(images) == 70]  # one of eight of each class is held out
    assert len(trained) == 3
    assert not torch.equal(trained[0].sort(0).values, trained[1].sort(0).values)
    found = result(run, "linear")
    assert found["protocol"]["augment"] is True
    assert found["features"]["global"]["vectors"] == "computed in every epoch"


def test_groups_fit_into_the_memory_and_lose_no_place() -> None:
    sizes = {"global": (1, 2048), "position": (49, 2048), "pixels": (1, 432)}
    each = 8 * 24 * 1000 * (2048 + 256) / 2**30
    assert groups(sizes, 24, 1000, 256, 100) == [{"global": slice(0, 1), "position": slice(0, 49), "pixels": slice(0, 1)}]
    for memory in (0.001, 1.01 * each, 3.3 * each, 20 * each):
        found = groups(sizes, 24, 1000, 256, memory)
        for name, (places, _) in sizes.items():
            got = [place for group in found if name in group for place in range(group[name].start, group[name].stop)]
            assert got == list(range(places)), (memory, name)
        for group in found:
            places = {name: part.stop - part.start for name, part in group.items()}
            size = sum(8 * 24 * 1000 * (sizes[name][1] + 256) * count for name, count in places.items())
            assert size <= memory * 2**30 or sum(places.values()) == 1


def test_few_shot_vectors_are_those_of_the_few(run: Path, pictures: Path) -> None:
    opened = open_run(run, "cpu")
    set_ = folder_set(pictures, opened.config.loader)
    subject = Subject(opened, set_, PX, 0.875, 0, run / "cache")
    few = few_shot(set_.labels["train"], 0.3, 0)
    some, whole = eval_features.extract(subject, "train", ["global"], few), features(subject, "train", ["global"])
    torch.testing.assert_close(some["global"], whole["global"][:, few], rtol=1e-4, atol=1e-5)  # fewer at once round otherwise


# ------------------------------------------------------------------------------------------------- other pictures


def test_a_beton_gives_what_its_folder_gives(run: Path, pictures: Path, betons: Path) -> None:
    for data in (pictures, betons):
        eval_main([str(run), *SMALL, "--tasks", "knn", "--data", str(data)])
    one, other = (result(run, name)["table"] for name in ("knn", f"knn-{betons.name}"))
    assert one == other


def fake_dtd(root: Path) -> list[tuple[str, Path]]:
    """Three classes of two pictures in each of torchvision's three parts; (class, file) of those of train and val."""
    files = []
    (root / "dtd" / "dtd" / "labels").mkdir(parents=True)
    for part in ("train", "val", "test"):
        lines = []
        for number, name in enumerate(("banded", "dotted", "woven")):
            for i in range(2):
                seed = 10 * number + i + {"train": 0, "val": 100, "test": 200}[part]
                path = root / "dtd" / "dtd" / "images" / name / f"{name}_{seed}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(seed).save(path, quality=95)
                lines.append(f"{name}/{path.name}")
                files += [(name, path)] if part != "test" else []
        (root / "dtd" / "dtd" / "labels" / f"{part}1.txt").write_text("\n".join(lines) + "\n")
    return files


def test_a_torchvision_set_is_cut_and_seen_as_a_folder_is(run: Path, tmp_path: Path) -> None:
    files = fake_dtd(tmp_path)
    for name, path in files:
        (tmp_path / "folder" / "train" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / "train" / name / f"{path.stem[len(name) + 1 :].zfill(3)}.jpg").write_bytes(path.read_bytes())
    (tmp_path / "folder" / "val").symlink_to(tmp_path / "folder" / "train")
    opened = open_run(run, "cpu")
    found = []
    for pictures in (dataset_set("dtd", tmp_path), folder_set(tmp_path / "folder", opened.config.loader)):
        assert pictures.class_names == ("banded", "dotted", "woven")
        subject = Subject(opened, pictures, PX, 0.875, 0, tmp_path / "cache")
        x, y = features(subject, "train", ["global"])["global"][0], pictures.labels["train"]
        order = np.lexsort((*x.numpy().T, y.numpy()))
        found.append((x[order], y[order]))
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[1][0])


def test_transfer_by_the_command(run: Path, tmp_path: Path) -> None:
    fake_dtd(tmp_path)
    eval_main([str(run), *SMALL, "--tasks", "knn", "linear", "--dataset", "dtd", "--dataset-root", str(tmp_path)])
    assert result(run, "linear-dtd")["protocol"]["dataset"] == "dtd"
    assert result(run, "linear-dtd")["protocol"]["pictures"]["counts"] == {"train": 12, "val": 6}


@pytest.mark.parametrize("name", DATASETS)
def test_a_missing_set_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^{name} is not below --dataset-root {tmp_path} as torchvision keeps it \([^\n]+\)$"):
        dataset_set(name, tmp_path)


# ------------------------------------------------------------------------------------------------- several processes


def work(rank: int, folder: Path, run: Path, pictures: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    limit = timedelta(seconds=100)
    distributed.init_process_group("gloo", f"file://{folder}/store", limit, world_size=2, rank=rank)
    opened = open_run(run, "cpu")
    ranks = current_ranks()
    subject = Subject(opened, folder_set(pictures, opened.config.loader), PX, 0.875, 0, folder / "cache", ranks)
    train, val = (features(subject, split, ["global"])["global"][0] for split in ("train", "val"))
    again = features(subject, "train", ["global"])["global"][0]
    tops = knn_top1s(train, subject.pictures.labels["train"], val, subject.pictures.labels["val"], (1, 5, 20), (0.07, 1.0), ranks)
    torch.save({"train": train, "val": val, "again": again, "tops": tops, "probes": probed(subject, folder)}, folder / f"{rank}.pt")
    launch.leave()


def probed(subject: Subject, out: Path) -> dict[str, Any]:
    """Two linear probes, from vectors in memory and from the network in every epoch: what is told of them but for the figures."""
    settings = eval_linear.ProbeSettings(3, 8, (0.1, 1.0, 10.0), (0.0,), 0.25, True, False, 0)
    found = {}
    for name, memory_gib in (("kept", 1.0), ("streamed", 1e-9)):
        result = eval_linear.linear(subject, settings, ["global", "position"], name, out, memory_gib)
        found[name] = {key: value for key, value in result.items() if key not in ("figures", "weights")}
    vectors = ({one.pop("vectors") for one in each["features"].values()} for each in found.values())
    assert list(vectors) == [{"kept in memory"}, {"computed in every epoch"}]
    return found


def test_two_processes_find_what_one_finds(run: Path, pictures: Path, tmp_path: Path) -> None:
    opened = open_run(run, "cpu")
    set_ = folder_set(pictures, opened.config.loader)
    subject = Subject(opened, set_, PX, 0.875, 0, tmp_path / "own")
    train, val = (features(subject, split, ["global"])["global"][0] for split in ("train", "val"))
    expected = knn_top1s(train, set_.labels["train"], val, set_.labels["val"], (1, 5, 20), (0.07, 1.0))
    (tmp_path / "alone").mkdir()
    probes = probed(subject, tmp_path / "alone")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pytest", "cossl.tools.evaluate"])
    torch.multiprocessing.start_processes(work, (tmp_path, run, pictures), 2, start_method="forkserver")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["train"], train, rtol=1e-4, atol=1e-5)  # half a batch at once rounds otherwise
        torch.testing.assert_close(found["val"], val, rtol=1e-4, atol=1e-5)
        assert torch.equal(found["again"], found["train"])
        assert found["tops"] == pytest.approx(expected, abs=2.6)
        assert found["probes"] == probes
    assert len(expected) == 6
    for name in ("kept", "streamed"):  # the first rank writes
        ends = ("global.pt", "global-confusion.png", "position.pt", "position.png")
        assert {path.name for path in tmp_path.glob(f"{name}-*")} == {f"{name}-{end}" for end in ends}


# ------------------------------------------------------------------------------------------------- mistakes, help, figures


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks knnn", "--tasks knnn: expected some of knn, linear, fewshot-1, fewshot-10"),
        ("--k 0", r"--k \(0,\): expected 1 or more"),
        ("--temperature 0", "temperatures above 0"),
        ("--epochs 0", "--epochs 0: expected 1 or more"),
        ("--base-lrs nan", r"--base-lrs \(nan,\): expected 0 or more"),
        ("--held-out-frac 1", "--held-out-frac 1.0: expected more than 0 and less than 1"),
        ("--memory-gib 0", "--memory-gib 0.0"),
        ("--dataset pets", "--dataset and --dataset-root go together, without --data"),
        ("--features globe", "globe"),
        ("--checkpoint epoch-0001.pt", "epoch-0001.pt does not exist"),
        ("--data /nowhere", "/nowhere"),
        ("--tasks knn --memory-gib 1e-9", "the vectors of the kNN take .* GiB: raise --memory-gib"),
    ],
)
def test_mistakes_are_one_line(run: Path, flags: str, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message) as found:
        eval_main([str(run), *flags.split()])
    assert "\n" not in str(found.value)


def test_different_classes_of_train_and_val_are_a_mistake(run: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "bad" / "val" / "one").mkdir(parents=True)
    (tmp_path / "bad" / "train").symlink_to(pictures / "train")
    picture().save(tmp_path / "bad" / "val" / "one" / "a.jpg")
    with pytest.raises(ValueError, match="bad: train and val have different classes"):
        eval_main([str(run), "--data", str(tmp_path / "bad")])


def test_help_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        eval_main(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {task} " in said for task in TASKS)
    assert "Examples:" in said


def confusion(classes: int) -> tuple[Tensor, list[str], Sequence[Any]]:
    counts = torch.randint(0, 3, (classes, classes), generator=torch.Generator().manual_seed(0)) + 5 * classes * torch.eye(classes).long()
    names = [f"class of $number {i}$ and more words" for i in range(classes)]
    return counts, names, per_class(counts, names)["most_confused"]


@pytest.mark.parametrize(("classes", "least_px"), [(2, 500), (10, 690), (60, 800), (1000, 800)])
def test_confusion_is_drawn_for_few_and_for_many_classes(tmp_path: Path, classes: int, least_px: int) -> None:
    eval_figures.draw_confusion(tmp_path / "c.png", *confusion(classes))
    assert size_of(tmp_path / "c.png")[1] >= least_px
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]


def test_many_classes_are_counted_in_groups() -> None:
    counts, _, _ = confusion(25)
    pooled = eval_figures._pooled(counts, 10)
    assert pooled.shape == (3, 3)
    assert pooled[0, 2] == counts[:10, 20:].sum()
    assert pooled.sum() == counts.sum()
    assert torch.equal(eval_figures._pooled(counts, 1), counts)


@pytest.mark.parametrize("side", [1, 7, 24])
def test_map_is_drawn(tmp_path: Path, side: int) -> None:
    eval_figures.draw_map(tmp_path / "m.png", torch.rand(side, side).tolist())
    assert size_of(tmp_path / "m.png")[1] >= 500


def test_without_matplotlib_the_rest_is_written(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any) -> None:
        raise ImportError

    run = make_run(tmp_path / "run", pictures)
    monkeypatch.setattr(eval_linear.eval_figures, "draw_confusion", missing)
    eval_main([str(run), *SMALL, "--tasks", "linear", "--features", "global"])
    assert "no figures: matplotlib is missing" in capsys.readouterr().err
    assert result(run, "linear")["figures"] == []
