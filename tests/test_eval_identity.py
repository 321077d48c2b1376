"""What `cossl eval` takes for the same as before and what for another: pictures, weights, settings; and what it decodes, keeps, removes."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoded import picture
from saved_runs import DEMO, network_of, run_of

from cossl.models import checkpoint, probe
from cossl.pipelines.batch import LoaderSpec
from cossl.pipelines.views import evaluation
from cossl.tools import eval_features, eval_linear, evaluate
from cossl.tools.eval_features import DiskKeeper, Subject, crop_and_flip, features, fitting, forget
from cossl.tools.eval_linear import Data, ProbeSettings
from cossl.tools.eval_pictures import PictureSet, folder_set, marks
from cossl.tools.evaluate import eval_main
from cossl.tools.opened import open_run

PX = 32
SMALL = "--epochs 2 --base-lrs 0.3 3 30 --weight-decays 0 --k 5 --features global --workers 0".split()

SETTINGS = ProbeSettings(1, 8, (1.0,), (0.0,), 0.25, True, False, 0)


@pytest.fixture
def run(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with an MLP after pooling, whose figures are not drawn."""
    monkeypatch.setattr(eval_linear, "draw", lambda *_: [])
    model = replace(DEMO.model, width=8, hidden_dim=16, out_dim=8, mlp_after_pool=1)
    how: dict[str, Any] = {"data": pictures, "eval_px": PX, "device": "cpu", "loader": replace(DEMO.loader, workers=0)}
    return run_of(replace(DEMO, model=model, **how), tmp_path / "run")


def result(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "eval" / f"{name}.json").read_text())
    return found


def subject_of(run: Path, cache: Path, px: int = PX, centre_frac: float = 0.875) -> Subject:
    opened = open_run(run, "cpu")
    assert opened.config.data is not None
    return Subject(opened, folder_set(opened.config.data, opened.config.loader), px, centre_frac, 0, cache)


def classes_of(root: Path, shade: int, names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """Four pictures of each class in train and in val."""
    for split in ("train", "val"):
        for number, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                picture(shade + 10 * number + i).save(root / split / name / f"{i}.png")
    return root


# ------------------------------------------------------------------------------------------------- pictures


def test_a_file_written_anew_in_place_makes_another_set(run: Path, tmp_path: Path) -> None:
    data = classes_of(tmp_path / "own", 0)
    how = open_run(run, "cpu").config.loader
    before = folder_set(data, how).identity
    assert folder_set(data, how).identity == before
    file = data / "val" / "b" / "2.png"
    state = file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert folder_set(data, how).identity != before
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert folder_set(data, how).identity == before
    with file.open("ab") as stream:
        stream.write(b"\0")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert folder_set(data, how).identity != before
    assert marks(data / "train") != marks(data / "val")


def test_redo_sees_what_no_mark_tells(run: Path, tmp_path: Path) -> None:
    """Pictures of the same names, sizes and times."""
    data = classes_of(tmp_path / "own", 0)

    def write(shade: int) -> None:
        for number, file in enumerate(sorted(data.rglob("*.png"))):
            picture(shade + number).resize((40, 40)).save(file, "bmp")  # of one size, whatever it shows
            os.utime(file, ns=(1, 1))

    def vectors() -> bytes:
        (path,) = (run / "eval" / "cache").glob("val-global-*")
        return path.read_bytes()

    start = [str(run), *SMALL, "--tasks", "knn", "--data", str(data)]
    write(0)
    eval_main(start)
    before = vectors()
    write(100)
    eval_main(start)
    assert vectors() == before
    eval_main([*start, "--redo"])
    assert vectors() != before


def test_two_folders_of_one_name_have_a_result_each(run: Path, tmp_path: Path) -> None:
    for side, shade in (("left", 0), ("right", 50)):
        eval_main([str(run), *SMALL, "--tasks", "knn", "--data", str(classes_of(tmp_path / side / "x", shade))])
    found = [json.loads(path.read_text())["protocol"]["pictures"]["data"] for path in sorted((run / "eval").glob("knn-x*.json"))]
    assert sorted(found) == [str(tmp_path / side / "x") for side in ("left", "right")]


def test_own_pictures_given_by_name_are_the_runs_own(run: Path, pictures: Path) -> None:
    eval_main([str(run), *SMALL, "--tasks", "knn", "--data", os.path.relpath(pictures)])
    assert (run / "eval" / "knn.json").exists()


# ------------------------------------------------------------------------------------------------- weights


def test_the_file_that_was_read_is_stamped_where_the_newest_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(run / "last.pt", run / "previous.pt")
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:1000])
    eval_main([str(run), *SMALL, "--tasks", "knn"])
    assert result(run, "knn")["protocol"]["checkpoint"] == "previous.pt"
    assert f"{run}: previous.pt, as last.pt is" in capsys.readouterr().err


def test_a_copied_run_needs_no_new_vectors_and_other_weights_do(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eval_main([str(run), *SMALL, "--tasks", "knn"])
    shutil.copytree(run, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "last.pt", (1, 1))
    (tmp_path / "copy" / "eval" / "knn.json").unlink()
    extracted: list[str] = []
    extract = eval_features.extract

    def watched(subject: Subject, split: str, *rest: Any) -> Any:
        extracted.append(split)
        return extract(subject, split, *rest)

    monkeypatch.setattr(eval_features, "extract", watched)
    eval_main([str(tmp_path / "copy"), *SMALL, "--tasks", "knn"])
    assert extracted == []
    state = checkpoint.load(run / "last.pt")
    state["model"] = {key: value for key, value in network_of(open_run(run, "cpu").config, seed=5).state_dict().items() if "online." in key}
    checkpoint.write(run / "last.pt", state)  # the step is the same
    before = {path.name for path in (run / "eval" / "cache").iterdir()}
    eval_main([str(run), *SMALL, "--tasks", "knn"])
    assert extracted == ["train", "val"]
    after = {path.name for path in (run / "eval" / "cache").iterdir()}
    assert len(after) == len(before)  # the vectors of the earlier weights are gone
    assert {name for name in before & after if "pixels" not in name} == set()


def test_ranks_that_opened_different_weights_stop(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "first_rank", lambda task: "0" * 16)
    with pytest.raises(ValueError, match="got a new checkpoint while it was opened: try again, or give --checkpoint"):
        eval_main([str(run), *SMALL, "--tasks", "knn"])


# ------------------------------------------------------------------------------------------------- what is cut and decoded


def test_views_are_cut_as_the_protocol_says(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[LoaderSpec] = []
    subject = subject_of(run, run / "cache", 48, 0.7)
    open_ = subject.pictures.open

    def watched(split: str, spec: LoaderSpec) -> Any:
        asked.append(spec)
        return open_(split, spec)

    watching = subject._replace(pictures=subject.pictures._replace(open=watched))
    for augment in (False, True):
        watching.open("train", 8, seed=3, augment=augment).close()
    assert [spec.recipe for spec in asked] == [evaluation(48, 0.7), (crop_and_flip(48),)]
    view = crop_and_flip(48)
    assert (view.size_px, view.jitter_p, view.grayscale_p, view.blur_p, view.solarize_p, view.flip_p) == (48, 0, 0, 0, 0, 0.5)
    assert [spec.seed for spec in asked] == [3, 3]


def test_learning_rates_are_for_256_pictures(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[Any] = []

    def stop(feed: Any, whole: Any, grids: Any, *_: Any) -> Any:
        rates.append(grids["global"].lr)
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_linear, "search", stop)
    with pytest.raises(KeyboardInterrupt):
        eval_main([str(run), *SMALL, "--tasks", "linear", "--batch-size", "32"])
    torch.testing.assert_close(rates[0], torch.tensor([[0.3, 3.0, 30.0]]) * 32 / 256)


def test_a_few_shots_decode_no_other_pictures(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, seen = subject_of(run, run / "cache"), list[int]()
    represent = eval_features.represent

    def watched(encoder: Any, images: Any, names: Any) -> Any:
        seen.append(len(images))
        return represent(encoder, images, names)

    sizes = eval_linear.shares(subject, settings := replace(SETTINGS, label_percent=10), ["global"])
    monkeypatch.setattr(eval_features, "represent", watched)
    Data(subject, settings, ["global"], sizes["global"] * 1.01)  # too little for all of train
    assert sorted(count for count in seen if count > 1) == [10, 40]


def test_features_are_taken_in_parts_that_fit() -> None:
    assert fitting({"a": 3, "b": 3, "c": 1}, 7) == [["a", "b", "c"]]
    assert fitting({"a": 3, "b": 3, "c": 1}, 6) == [["a", "b"], ["c"]]
    assert fitting({"a": 3, "b": 9, "c": 3, "d": 8}, 4) == [["a"], ["c"], ["b", "d"]]
    assert fitting({"a": 9}, 4) == [["a"]]


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_parts_give_the_numbers_of_the_whole(run: Path, task: str) -> None:
    start = [str(run), *SMALL, "--tasks", task, "--features", "global", "local_mean"]
    sizes = eval_linear.shares(
        subject_of(run, run / "cache"), ProbeSettings(1, 8, (1.0,), (0.0,), 0.25, True, False, 0), ["global", "pixels"]
    )
    for name, memory in (("one", "1"), ("more", str(max(sizes.values()) * 1.01))):
        eval_main([*start, "--memory-gib", memory, "--out", str(run / name)])
    one, more = (json.loads((run / name / f"{task}.json").read_text())["table"] for name in ("one", "more"))
    assert one == more


def test_neighbours_are_compared_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    normalize = probe.F.normalize

    def watched(x: Any, dim: int) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return normalize(x, dim=dim)

    monkeypatch.setattr(probe.F, "normalize", watched)
    torch.set_float32_matmul_precision("high")
    try:
        probe._neighbours(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), 2)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


# ------------------------------------------------------------------------------------------------- kept and removed


def test_only_what_is_its_own_is_removed_from_a_cache(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "cache").mkdir(parents=True)
    for name in ("thesis.txt", "train.pt", "train-notes.pt"):
        (tmp_path / "out" / "cache" / name).write_text("mine")
    eval_main([str(run), *SMALL, "--tasks", "knn", "--no-keep-cache", "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out" / "cache").iterdir()) == ["thesis.txt", "train-notes.pt", "train.pt"]


def test_forgotten_vectors_leave_what_is_half_trained(run: Path) -> None:
    subject = subject_of(run, run / "cache")
    features(subject, "val", ["global"])
    DiskKeeper(subject.cache, subject.key()).put("again-x", 1, lambda: {}, True)
    forget(subject.cache, trained=False)
    assert [path.name.partition("-")[0] for path in subject.cache.iterdir()] == ["heads"]
    forget(subject.cache)
    assert not subject.cache.exists()


def test_a_killed_probe_goes_on_with_another_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = [str(run), *SMALL, "--tasks", "linear", "--base-lrs", *map(str, range(1, 30))]  # so that they do not fit at once
    put = DiskKeeper.put

    def die(self: DiskKeeper, stage: str, done: int, state: Any, last: bool) -> None:
        put(self, stage, done, state, True)
        raise KeyboardInterrupt

    monkeypatch.setattr(DiskKeeper, "put", die)
    with pytest.raises(KeyboardInterrupt):
        eval_main(start)
    monkeypatch.setattr(DiskKeeper, "put", put)
    sizes = eval_linear.shares(subject_of(run, run / "c"), SETTINGS, ["global", "pixels"])
    eval_main([*start, "--memory-gib", str(sum(sizes.values()) * 1.01)])
    assert math.isfinite(result(run, "linear")["features"]["global"]["top1"])


# ------------------------------------------------------------------------------------------------- mistakes


def test_nothing_is_asked_twice(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_main([str(run), *SMALL, "--tasks", "knn", "knn", "--features", "global", "global"])
    assert [row[0] for row in result(run, "knn")["table"]["rows"]] == ["global", "12 x 12 pixels"]
    assert capsys.readouterr().out.count("Weighted kNN") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature nan", "temperatures above 0"),
        ("--temperature inf", "temperatures above 0"),
        ("--memory-gib nan", "--memory-gib nan"),
        ("--base-lrs inf", r"--base-lrs \(inf,\): expected 0 or more"),
        ("--tasks knn --features position", "the kNN compares whole pictures, add global or local_mean, or leave it out"),
    ],
)
def test_mistakes_are_one_line(run: Path, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as found:
        eval_main([str(run), *flags.split()])
    assert "\n" not in str(found.value)


def test_a_torchvision_set_elsewhere_or_changed_is_another(tmp_path: Path) -> None:
    from test_evaluate import fake_dtd

    from cossl.tools.eval_pictures import dataset_set

    def identity(root: Path) -> dict[str, Any]:
        found: PictureSet = dataset_set("dtd", root)
        return found.identity

    for side in ("left", "right"):
        (tmp_path / side).mkdir()
        files = fake_dtd(tmp_path / side)
    before = identity(tmp_path / "right")
    assert identity(tmp_path / "right") == before
    assert identity(tmp_path / "left") != before
    os.utime(files[0][1], (1, 1))
    assert identity(tmp_path / "right") != before


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_is_one_line(run: Path, tmp_path: Path, workers: str) -> None:
    data = classes_of(tmp_path / "own", 0)
    broken = data / "train" / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(OSError, match=f"^cannot read {broken}: [^\\n]+ or run `cossl convert`, which sets broken pictures aside$"):
        eval_main([str(run), "--tasks", "knn", "--data", str(data), "--workers", workers])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_of_a_torchvision_set_is_one_line(run: Path, tmp_path: Path, workers: str) -> None:
    from test_evaluate import fake_dtd

    (_, broken), *_ = fake_dtd(tmp_path)
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(OSError, match=r"^cannot read picture 0 of DTD: [^\n]+\. Unpack the set anew$"):
        eval_main([str(run), "--tasks", "knn", "--dataset", "dtd", "--dataset-root", str(tmp_path), "--workers", workers])
