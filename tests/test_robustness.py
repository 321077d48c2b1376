"""`cossl robustness` on a small run: numbers against the same computed by other means, and what is asked again and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from robust_run import FEW, Independent, alike, ask, copied, found, judge_of, percent, top1s, trained
from torch.nn import functional as F

from cossl.models.attacks import damaged
from cossl.pipelines.augment import normalize
from cossl.tools import cli, robustness_judge
from cossl.tools.report import runs_report
from cossl.tools.robustness import FAMILIES, RobustnessArgs, robustness_main
from cossl.tools.robustness_judge import Hits, Judge, choose

CURVES = ["pgd", "internal", "crop"]


@pytest.fixture(scope="module")
def data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alike(pictures, tmp_path_factory.mktemp("alike"))


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(data, tmp_path_factory.mktemp("robust"))


@pytest.fixture(scope="module")
def asked(run_dir: Path) -> Path:
    """The same, asked for all that is drawn as curves."""
    ask(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def independent(run_dir: Path, data: Path) -> Independent:
    return Independent(run_dir, data)


# ------------------------------------------------------------------------------------------------- the numbers


def test_unchanged_pictures_score_what_the_run_itself_says(asked: Path) -> None:
    said = json.loads((asked / "results.json").read_text())["linear_top1"]["trained"]
    assert 40 < said < 100
    for family in CURVES:
        assert found(asked, family)["clean_top1"] == pytest.approx(said, abs=0.01)
        assert found(asked, family)["pictures"] == 80
    assert top1s(found(asked, "pgd"))["none", "-", 0] == found(asked, "pgd")["clean_top1"]
    internal = top1s(found(asked, "internal"))
    assert internal["masked", 0.0, "0 of 16"] == internal["replaced by noise", 0.0, "0 of 16"] == found(asked, "internal")["clean_top1"]


@pytest.mark.parametrize(("name", "eps"), [("L-inf", 0.003), ("L-inf", 0.1), ("L2", 0.1)])
def test_one_step_equals_the_same_by_hand(asked: Path, independent: Independent, name: str, eps: float) -> None:
    ((images, _, label),) = independent.batches("val")
    x = (images.double() / 255).float().requires_grad_(True)
    F.cross_entropy(independent.logits(x), label).backward()
    assert x.grad is not None
    step = x.grad.sign() if name == "L-inf" else x.grad / x.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = percent(independent.logits((x + eps * step).clamp(0, 1).detach()), label)
    assert top1s(found(asked, "pgd"))["one step", name, eps] == pytest.approx(expected, abs=1.3)  # of 80 one may lie on the border


def test_attacks_hurt_the_more_the_larger_they_are(asked: Path) -> None:
    result = found(asked, "pgd")
    top1 = top1s(result)
    assert result["clean_top1"] >= top1["PGD", "L-inf", 0.003] > top1["PGD", "L-inf", 0.1]
    assert result["clean_top1"] >= top1["PGD", "L2", 0.1]
    assert result["means"]["PGD, L-inf"] == pytest.approx((top1["PGD", "L-inf", 0.003] + top1["PGD", "L-inf", 0.1]) / 2)


def test_half_of_a_map_masked_equals_the_same_by_hand(asked: Path, independent: Independent) -> None:
    """Another half of the positions, so not the same number: but as near as 80 pictures say, over ten draws."""
    ((_, x, label),) = independent.batches("val")
    _, y = independent.encoder(x)
    found_top1 = []
    for seed in range(10):
        order = torch.rand(80, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
        rest = y.flatten(2).gather(2, order[:, None, :8].expand(-1, y.shape[1], -1)).sum(2) / 16
        found_top1.append(percent(independent.probe.logits(independent.encoder.network.after_pool(rest)), label))
    assert top1s(found(asked, "internal"))["masked", 0.5, "8 of 16"] == pytest.approx(np.mean(found_top1), abs=12)


def test_each_picture_is_damaged_by_its_own_number(asked: Path, independent: Independent) -> None:
    ((_, x, label),) = independent.batches("val")
    _, y = independent.encoder(x)
    top1 = {}
    for kind, word in (("mask", "masked"), ("noise", "replaced by noise")):
        (other,) = damaged(y, kind, [0.5], torch.arange(80), 0)
        pooled = independent.encoder.network.pool(other)
        top1[word] = percent(independent.probe.logits(pooled), label)
    internal = top1s(found(asked, "internal"))
    assert {word: internal[word, 0.5, "8 of 16"] for word in top1} == pytest.approx(top1, abs=0.01)


def test_crops_equal_the_same_by_hand(asked: Path, independent: Independent) -> None:
    top1 = top1s(found(asked, "crop"))
    for varied, frac, px in (("centre crop", 0.5, 32), ("centre crop", 1.0, 32), ("view size", 0.875, 16)):
        ((_, x, label),) = independent.batches("val", px, frac)
        assert top1[varied, frac, px] == pytest.approx(percent(independent.probe.logits(independent.encoder(x)[0]), label), abs=0.01)


@pytest.mark.parametrize("family", ["pgd", "internal"])
def test_the_batch_changes_no_number(asked: Path, family: str) -> None:
    args = RobustnessArgs((asked,), eps=(0.003, 0.1), eps_l2=(0.1,), steps=3, shares=(0.0, 0.5))
    again = FAMILIES[family].ask(judge_of(asked, batch_size=7), args)
    assert top1s(again) == top1s(found(asked, family))


def test_the_classifier_is_one_whichever_way_it_is_asked(asked: Path) -> None:
    judge = judge_of(asked)
    some = next(judge.some(""))
    logits = judge.classifier(normalize(some.images))
    assert torch.equal(judge.classifier.of_pixels(some.images.float() / 255), logits)
    assert torch.equal(judge.classifier.of_map(judge.run.encoder(normalize(some.images))[1]), logits)
    assert some.number.tolist() == list(range(64))


def test_answers_that_are_no_numbers_are_told_from_wrong_ones() -> None:
    hits, label = Hits(), torch.tensor([0, 1, 1])
    hits.add("a", torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), label)
    hits.add("a", torch.tensor([[1.0, 0.0]]), label[:1])
    hits.add("b", torch.tensor([[0.0, 1.0]]), label[:1])
    assert (hits.top1("a"), hits.top1("b")) == (75, 0)
    hits.add("b", torch.tensor([[float("nan"), 1.0]]), label[1:2])
    hits.add("b", torch.tensor([[0.0, 1.0]]), label[:1])
    with pytest.raises(RuntimeError, match="answers are not finite numbers"):
        hits.top1("a")


# ------------------------------------------------------------------------------------------------- the pictures


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 70), st.integers(0, 3))
def test_chosen_pictures_are_as_many_of_each_class_as_can_be(labels: list[int], at_most: int, seed: int) -> None:
    chosen = choose(np.array(labels), at_most, seed)
    assert len(chosen) == (min(at_most, len(labels)) if at_most else len(labels))
    assert (np.diff(chosen) > 0).all()
    counts, taken = np.bincount(labels, minlength=6), np.bincount(np.array(labels)[chosen], minlength=6)
    for one in range(6):
        for other in range(6):
            assert taken[one] >= taken[other] - 1 or taken[one] == counts[one]
    np.testing.assert_array_equal(chosen, choose(np.array(labels), at_most, seed))


def test_the_seed_chooses() -> None:
    labels = np.repeat(np.arange(10), 30)
    several = [tuple(choose(labels, 20, seed)) for seed in range(5)]
    assert len(set(several)) == 5
    assert np.bincount(labels[list(several[0])]).tolist() == [2] * 10


def test_a_part_of_the_pictures_is_asked_and_said(run_dir: Path, independent: Independent) -> None:
    judge = judge_of(run_dir, pictures=20, probe_pictures=30, batch_size=6)
    protocol = judge.protocol()
    assert (protocol["pictures"], protocol["of_pictures"], protocol["chosen"]) == (20, 80, "class-balanced, drawn by seed 0")
    assert protocol["probe"]["train_pictures"] == 30
    parts = list(judge.some(""))
    assert [len(part.label) for part in parts] == [6, 6, 6, 2]
    ((images, _, label),) = independent.batches("val")
    index = torch.cat([part.number for part in parts])
    assert torch.equal(index, judge.chosen)
    assert torch.bincount(label[index]).tolist() == [2] * 10
    assert torch.equal(torch.cat([part.images for part in parts]), images[index])
    assert torch.equal(torch.cat([part.label for part in parts]), label[index])


# ------------------------------------------------------------------------------------------------- what is written


def test_every_family_is_written_with_table_figure_and_protocol(asked: Path) -> None:
    pytest.importorskip("matplotlib")
    for family in CURVES:
        result = found(asked, family)
        assert {"title", "protocol", "run", "time", "code_version", "versions", "device"} <= set(result)
        assert all(len(row) == len(result["table"]["columns"]) for row in result["table"]["rows"])
        assert result["figures"] == [f"{family}.png"]
        assert (asked / "robustness" / f"{family}.png").read_bytes().startswith(b"\x89PNG")
        assert (result["protocol"]["px"], result["protocol"]["seed"], len(result["protocol"]["probe"]["weights"])) == (32, 0, 16)
    protocol = found(asked, "pgd")["protocol"]
    assert (protocol["eps_linf"], protocol["eps_l2"], protocol["steps"], protocol["relative_step"]) == ([0.003, 0.1], [0.1], 3, 0.1)
    assert not list((asked / "robustness").glob("*.part"))


def test_what_is_there_is_not_asked_again(asked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """But with other settings, other weights, after damage, and with --redo."""
    times: list[str] = []
    monkeypatch.setattr(robustness_judge, "fit_probe", lambda *features: pytest.fail("fitted again"))

    def count(judge: Judge, args: RobustnessArgs) -> dict[str, Any]:
        times.append("asked")
        return internal.ask(judge, args)

    internal, path = FAMILIES["internal"], asked / "robustness" / "internal.json"
    before = path.read_bytes()
    monkeypatch.setitem(FAMILIES, "internal", internal._replace(ask=count, draw=lambda results, path: path.touch()))
    ask(asked, families=("internal",))
    said = capsys.readouterr()
    assert (times, path.read_bytes()) == ([], before)
    assert "internal is there already" in said.err
    assert "masked" in said.out
    for i, flags in enumerate((["--shares", "0", "0.25"], ["--shares", "0", "0.25", "--redo"], [], ["--batch-size", "9"])):
        ask(asked, *flags, families=("internal",))
        assert len(times) == min(i + 1, 3)
    assert found(asked, "internal")["protocol"]["shares"] == [0, 0.5]
    empty = json.dumps({"protocol": json.loads(before)["protocol"]}).encode()
    for damage in (b"", before[: len(before) // 2], b"[]", empty):
        path.write_bytes(damage)
        ask(asked, families=("internal",))
        assert top1s(json.loads(path.read_bytes())) == top1s(json.loads(before))
    assert len(times) == 7
    judge = judge_of(asked)
    weights = judge.weights
    with torch.no_grad():
        next(judge.run.encoder.parameters()).mul_(1.001)
    assert judge_of(asked).weights == weights != Judge(judge.run, judge.data, 0, 0, 0, 64, 0).weights


def test_a_damaged_head_is_one_clear_line(asked: Path) -> None:
    path = asked / "robustness" / "probe.pt"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-100])
        with pytest.raises(ValueError, match=r"probe\.pt .*remove it, and the head is fitted again"):
            _ = judge_of(asked).classifier
        torch.save({"protocol": judge_of(asked).probe_protocol, "mean": 3}, path)
        with pytest.raises(ValueError, match=r"probe\.pt holds no head: remove it"):
            _ = judge_of(asked).classifier
        torch.save({"protocol": "another", "mean": 3}, path)
        assert torch.equal(judge_of(asked).classifier.probe.weight, judge_of(asked).classifier.probe.weight)
    finally:
        path.write_bytes(whole)


def test_several_runs_are_lines_of_one_figure(asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    other = copied(asked, tmp_path / "two")
    robustness_main([str(asked), str(other), "--families", "crop", *FEW, "--out", str(tmp_path / "figures")])
    assert (tmp_path / "figures" / "crop.png").read_bytes().startswith(b"\x89PNG")
    title, columns, *rows = capsys.readouterr().out.strip().splitlines()
    assert title == "Accuracy on other crops than the head's: top-1, percent, 80 pictures"
    assert columns.split()[-2:] == ["one", "two"]
    top1 = top1s(found(asked, "crop"))
    assert [row.split()[-2:] for row in rows] == [[f"{value:.2f}"] * 2 for value in top1.values()]
    below = "two, one (crop-of-2-runs.png)</figcaption>"
    assert [below in runs_report(folders) for folders in ([other, asked], [asked])] == [True, False]


def test_without_matplotlib_the_numbers_are_written(
    asked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any) -> None:
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setitem(FAMILIES, "crop", FAMILIES["crop"]._replace(draw=missing))
    ask(asked, "--redo", families=("crop",))
    assert "crop.png is not drawn: matplotlib is not installed: pip install" in capsys.readouterr().err
    assert found(asked, "crop")["figures"] == []


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--eps 0 0.1", "--eps 0.0 0.1: expected numbers above 0, at most 1"),
        ("--eps-l2 -1", "--eps-l2 -1.0: expected numbers above 0"),
        ("--eps", "--eps : expected numbers above 0, at most 1"),
        ("--shares 1.1", "--shares 1.1: expected numbers from 0 to 1"),
        ("--crop-fracs nan", "--crop-fracs nan: expected numbers above 0, at most 1"),
        ("--severities 3 3 3 3 3", "--severities 3 3 3 3 3: expected some of 1 2 3 4 5, each once"),
        ("--crop-px 0", "--crop-px 0: expected 1 to 10000 px"),
        ("--pictures -1", "--pictures -1: expected 0 or more"),
        ("--batch-size 0", "--batch-size 0: expected 1 or more"),
        ("--steps 0", "0 steps of an attack: expected 1 or more"),
        ("--imagenet-c nowhere", "--imagenet-c nowhere is no folder"),
        ("--families nothing", "nothing"),
        ("--families imagenet-c", "give --imagenet-c too, the folder with the published pictures"),
        ("--px 8", "--px 8: expected 16 to 10000 px"),
        ("--corruptions fog rain", "--corruptions rain: expected some of gaussian_noise, "),
        ("--corruptions", "--corruptions : expected some of gaussian_noise, "),
        ("--corruptions fog snow fog", "saturate, each once"),
        ("--severities 0 5", "--severities 0 5: expected some of 1 2 3 4 5"),
        ("--frost-dir nowhere", "--frost-dir nowhere is no folder"),
    ],
)
def test_a_users_mistake_is_one_line(flags: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["cossl", "robustness", "run", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("cossl robustness: ")
    assert said in told
    assert "\n" not in told


def test_only_the_chosen_pictures_are_decoded(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, decoded = judge_of(run_dir, pictures=13), list[int]()
    open_split = robustness_judge.open_split

    def watched(*args: Any) -> Any:
        loader = open_split(*args)
        epoch = loader.epoch

        def counted(number: int) -> Any:
            for batch in epoch(number):
                decoded.extend(batch.index.tolist())
                yield batch

        loader.epoch = counted
        return loader

    monkeypatch.setattr(robustness_judge, "open_split", watched)
    given_out = [index for some in judge.some("test") for index in some[2].tolist()]
    assert decoded == given_out == judge.chosen.tolist()
    assert len(decoded) == 13


def test_other_classes_in_val_are_a_mistake(run_dir: Path, pictures: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for folder in sorted((pictures / split).iterdir())[split == "val" :]:
            (tmp_path / split / folder.name).mkdir(parents=True)
            picture = next(folder.iterdir())
            (tmp_path / split / folder.name / picture.name).write_bytes(picture.read_bytes())
    with pytest.raises(ValueError, match=r"train and val of .* have different classes"):
        _ = judge_of(run_dir, data=tmp_path).classifier
