"""What a sweep's folder says: numbers that are right, and points that are missing and shown as such."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from finished_sweeps import HEADS, PROTOCOL, cells, crossed_sweep, finish, nasty_sweep, point, results, rows_of, sweep_of
from hypothesis import given
from hypothesis import strategies as st

from cossl.models.flags import sealed
from cossl.slurm.collect import as_markdown, collect, notes
from cossl.slurm.outcomes import DONE, Collected, Outcome, Setting


def setting_of(*tops: float) -> Setting:
    outcomes = [Outcome(point({}, seed), Path(), (), DONE, {"linear_top1": top}) for seed, top in enumerate(tops)]
    return Setting("demo", (), outcomes, len(tops))


@pytest.fixture
def crossed(tmp_path: Path) -> Collected:
    return crossed_sweep(tmp_path)


@pytest.fixture
def nasty(tmp_path: Path) -> Collected:
    return nasty_sweep(tmp_path)


# ------------------------------------------------------------------------------------------------- numbers


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=9))
def test_mean_and_spread_are_exact(hundredths: list[int]) -> None:
    exact = [Fraction(value, 100) for value in hundredths]
    mean = sum(exact) / len(exact)
    setting = setting_of(*map(float, exact))
    assert setting.mean("linear_top1") == pytest.approx(float(mean), rel=1e-12, abs=1e-12)
    spread = setting.spread("linear_top1")
    if len(exact) == 1:
        assert spread is None
    else:
        variance = sum((value - mean) ** 2 for value in exact) / (len(exact) - 1)
        assert spread is not None
        assert spread**2 == pytest.approx(float(variance), rel=1e-9, abs=1e-12)


def test_a_cell_is_the_mean_and_the_sample_deviation_of_its_own_setting(tmp_path: Path) -> None:
    points = [point({"model.local_head": head}, seed) for seed in (0, 1, 2) for head in ("mlp2", "mlp3")]
    sweep = sweep_of(tmp_path, *points)
    for one, top in zip(points, (10, 50.2, 11, 49.2, 15, 50.0), strict=True):
        finish(sweep, one, results(top, top / 2, images_per_s=100 * top))
    markdown = as_markdown(collect(sweep))
    assert cells(markdown, "mlp2") == ["12.0 ± 2.6", "6.0 ± 1.3", "1,200"]
    assert cells(markdown, "mlp3") == ["**49.8 ± 0.5**", "**24.9 ± 0.3**", "4,980"]
    assert "divided by n - 1" in markdown
    assert "n = 3 (seeds 0, 1, 2)" in markdown


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, point({}))
    finish(sweep, sweep.points[0], results(33.33))
    markdown = as_markdown(collect(sweep))
    assert cells(markdown, "heads") == ["**33.3**", "**40.0**", "88.5"]
    assert "n = 1 (seed 0)" in markdown


def test_incomplete_settings_say_n_and_are_never_best(tmp_path: Path) -> None:
    points = [point({"model.local_head": head}, seed) for head in ("mlp2", "mlp3") for seed in (0, 1, 2)]
    sweep = sweep_of(tmp_path, *points)
    for one, top in zip(points, (50.0, 51.0, 52.0, 90.0, 92.0), strict=False):
        finish(sweep, one, results(top))
    markdown = as_markdown(collect(sweep))
    assert cells(markdown, "mlp3")[0] == "91.0 ± 1.4 (2 of 3)"
    assert cells(markdown, "mlp2")[0] == "**51.0 ± 1.0**"
    assert "missing of 6 points: 1 missing" in markdown


def test_a_setting_that_has_fewer_seeds_than_others_says_so_and_is_never_best(tmp_path: Path) -> None:
    points = [*(point({"model.local_head": "mlp2"}, seed) for seed in (0, 1, 2)), point({"model.local_head": "mlp3"})]
    sweep = sweep_of(tmp_path, *points)
    for one, top in zip(points, (50.0, 50.0, 50.0, 99.0), strict=True):
        finish(sweep, one, results(top))
    markdown = as_markdown(collect(sweep))
    assert (cells(markdown, "mlp3")[0], cells(markdown, "mlp2")[0]) == ("99.0 (1 of 1)", "**50.0 ± 0.0**")


def test_all_that_print_alike_are_best(tmp_path: Path) -> None:
    points = [point({"model.local_head": head}) for head in HEADS]
    sweep = sweep_of(tmp_path, *points)
    for one, top in zip(points, (50.01, 50.04, 49.9, 9.0), strict=True):
        finish(sweep, one, results(top))
    bold = [cells(as_markdown(collect(sweep)), head)[0] for head in HEADS]
    assert bold == ["**50.0**", "**50.0**", "49.9", "9.0"]


# ------------------------------------------------------------------------------------------------- missing ones

HALF = json.dumps(results()).encode()[:-40]
NO_RESULTS: dict[str, Any] = {
    "half": HALF,
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "a list": b"[1]",
    "unsealed": json.dumps(results(60.0)).encode(),
    "changed": json.dumps(sealed(results(50.0)) | results(60.0)).encode(),
    "NaN": results(float("nan")),
    "infinite": results(50.0, float("inf")),
    "a word": results() | {"linear_top1": {"trained": "50"}},
    "true": results() | {"linear_top1": {"trained": True}},
    "no 20-NN": {key: value for key, value in results().items() if key != "knn_top1"},
    "more than all": results(5000.0),
    "less than none": results(-1.0),
}


@pytest.mark.parametrize("case", NO_RESULTS)
def test_what_is_no_result_is_missing(tmp_path: Path, case: str) -> None:
    good, bad = point({}, 0), point({}, 1)
    sweep = sweep_of(tmp_path, good, bad)
    finish(sweep, good, results(50.0))
    finish(sweep, bad, NO_RESULTS[case])
    collected = collect(sweep)
    damaged = isinstance(NO_RESULTS[case], bytes)
    assert [row["state"] for row in rows_of(collected)] == ["done", "damaged" if damaged else "missing"]
    assert ("- results.json damaged, or of another version (" in as_markdown(collected)) is damaged
    assert rows_of(collected)[1]["linear_top1"] == rows_of(collected)[1]["protocol"] == ""
    assert cells(as_markdown(collected), "heads")[0] == "50.0 (1 of 2)"


def test_damaged_results_are_named_whatever_the_state(tmp_path: Path) -> None:
    """Also where the scheduler has a word for the point."""
    points = [point({"model.local_head": head}) for head in HEADS]
    sweep = sweep_of(tmp_path, *points)
    for one in points[1:3]:
        finish(sweep, one, json.dumps(results()).encode())
    markdown = as_markdown(collect(sweep, {points[0].identity: "failed", points[1].identity: "lost"}))
    assert [cells(markdown, head)[0] for head in HEADS] == ["— failed", "— lost", "— damaged", "— missing"]
    why = "results.json damaged, or of another version (it has no sha256 of its content), its numbers are left out"
    assert f"- {why}: demo, local_head mlp2 (seed 0); demo, local_head mlp3 (seed 0)\n" in markdown.replace("\\_", "_")


def test_a_half_written_file_beside_is_not_read(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, point({}))
    folder = finish(sweep, sweep.points[0], results())
    (folder / "results.json").rename(folder / "results.json.part")
    assert [row["state"] for row in rows_of(collect(sweep))] == ["missing"]


@pytest.mark.parametrize("change", [{"seed": 7}, {"model.local_head": "mlp3"}, None])
def test_the_results_of_another_run_are_none(tmp_path: Path, change: dict[str, Any] | None) -> None:
    sweep = sweep_of(tmp_path, point({}))
    folder = finish(sweep, sweep.points[0], results())
    assert collect(sweep).outcomes[0].state == "done"
    (folder / "config.json").write_text(json.dumps(sweep.points[0].config | change) if change is not None else '{"seed": ')
    assert collect(sweep).outcomes[0].state == "missing"


def test_a_missing_one_is_called_by_its_state_and_no_state_makes_or_hides_a_number(tmp_path: Path) -> None:
    points = [point({"model.local_head": head}, seed) for head in HEADS for seed in (0, 1)]
    sweep = sweep_of(tmp_path, *points)
    words = ["failed", "failed", "lost", "running", "done", "finished", "failed", "done"]
    for one in points[6:]:
        finish(sweep, one, results())
    collected = collect(sweep, {one.identity: word for one, word in zip(points, words, strict=True)})
    markdown = as_markdown(collected)
    firsts = [cells(markdown, head)[0] for head in HEADS]
    assert firsts == ["— failed", "— 1 lost, 1 running", "— missing", "**50.0 ± 0.0**"]
    assert "missing of 8 points: 2 failed, 1 lost, 1 running, 2 missing" in markdown
    assert cells(markdown, "mlp2")[2] == "—"


def test_values_that_a_run_does_not_tell_are_empty(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, point({}))
    found = results(images_per_s=float("nan"), seconds=None, device=7, protocol="none", collapsed="no")
    folder = finish(sweep, sweep.points[0], found | {"linear_top1": {"trained": 50.0}})
    (folder / "environment.json").write_text("[{}]")
    row = rows_of(collect(sweep))[0]
    empty = "images_per_s seconds device protocol collapsed untrained_linear_top1 pixels_linear_top1 hardware code_version".split()
    assert [row[name] for name in empty] == [""] * len(empty)
    markdown = as_markdown(collect(sweep))
    assert cells(markdown, "heads")[2] == "—"
    assert "protocol of demo: not recorded" in markdown


def test_a_sweep_without_points_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no points: submit the grid first"):
        collect(sweep_of(tmp_path))


# ------------------------------------------------------------------------------------------------- what varies


def test_settings_stand_in_order_of_their_values(tmp_path: Path) -> None:
    changes = [{"optim.base_lr": lr, "model.local_head": head} for lr in (0.5, 0.05, 10) for head in ("mlp3", "conv1x1")]
    collected = collect(sweep_of(tmp_path, *(point(change, seed) for seed in (1, 0) for change in changes)))
    assert [axis.label for axis in collected.axes] == ["local_head", "base_lr"]
    expected = [(head, lr) for head in ("mlp3", "conv1x1") for lr in ("0.05", "0.5", "10")]
    assert [setting.words for setting in collected.settings] == expected


def test_what_differs_only_between_presets_does_not_vary(tmp_path: Path) -> None:
    points = [point({"epochs": epochs, "model.local_head": head}, 0, preset) for preset, epochs in (("a", 1), ("b", 2)) for head in HEADS]
    assert [axis.key for axis in collect(sweep_of(tmp_path, *points)).axes] == ["model.local_head"]


def test_labels_are_unique(tmp_path: Path) -> None:
    keys = ("model.hidden_dim", "probe.hidden_dim", "device")
    collected = collect(sweep_of(tmp_path, *(point(dict.fromkeys(keys[:2], value) | {"device": f"d{value}"}) for value in (1, 2))))
    assert [axis.label for axis in collected.axes] == ["model.hidden_dim", "probe.hidden_dim", "device"]
    row = rows_of(collected)[1]
    assert (row["model.hidden_dim"], row["config.device"], row["device"]) == ("2", "d2", "")


def test_values_that_would_be_called_alike_are_not(tmp_path: Path) -> None:
    values: list[Any] = [None, "none", 1, 1.0, 0.1234567, 0.1234568, True, [1, 2]]
    collected = collect(sweep_of(tmp_path, *(point({"optim.x": value}) for value in values)))
    assert len({setting.words for setting in collected.settings}) == len(values)
    points = [point({"optim.x": value}) for value in (0.25, 0.1234567)]
    assert [setting.words for setting in collect(sweep_of(tmp_path, *points)).settings] == [("0.1234567",), ("0.25",)]


def test_a_seed_counts_once_so_other_pictures_are_another_setting(tmp_path: Path) -> None:
    moved = [point({"data": "/b"}, 0), point({"data": "/c"}, 1)]
    together = collect(sweep_of(tmp_path, *moved))
    assert [len(setting.outcomes) for setting in together.settings] == [2]
    apart = collect(sweep_of(tmp_path, *moved, point({"data": "/b"}, 1)))
    assert [(setting.words, len(setting.outcomes)) for setting in apart.settings] == [(("/b",), 2), (("/c",), 1)]


def test_pictures_of_several_folders_are_told(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, point({"data": "/b"}, 0), point({"data": "/c"}, 1))
    for one in sweep.points:
        finish(sweep, one, results())
    assert any(note.startswith("PICTURES of demo") and "/b (1 points), /c (1 points)" in note for note in notes(collect(sweep)))


# ------------------------------------------------------------------------------------------------- notes


def test_each_protocol_stands_once_and_a_second_one_in_a_preset_loudly(tmp_path: Path) -> None:
    points = [point({"model.local_head": head}, 0, preset) for preset in ("in1k", "in100") for head in HEADS]
    sweep = sweep_of(tmp_path, *points)
    for one in points:
        own = {"knn_k": 200} if one.preset == "in1k" and one.config["model.local_head"] == "mlp3" else {}
        finish(sweep, one, results(protocol=PROTOCOL | own))
    markdown = as_markdown(collect(sweep))
    lines = [line for line in markdown.splitlines() if line.startswith("- protocol")]
    assert [line.partition(":")[0] for line in lines] == ["- protocol of in1k, in100", "- protocol of in1k ‡"]
    loud = [line for line in markdown.splitlines() if "PROTOCOLS DIFFER" in line]
    assert len(loud) == 1
    assert "in1k (knn_k)" in loud[0]
    assert loud[0].endswith("in1k, local_head mlp3 (seed 0)")
    assert cells(markdown, "mlp3")[0] == "50.0‡"
    assert [cells(markdown, "mlp2")[column] for column in (0, 3)] == ["50.0", "**50.0**"]


def test_collapsed_runs_are_marked_and_named(tmp_path: Path) -> None:
    points = [point({"model.local_head": head}, seed) for head in ("mlp2", "mlp3") for seed in (0, 1)]
    sweep = sweep_of(tmp_path, *points)
    for i, one in enumerate(points):
        finish(sweep, one, results(collapsed=i == 3))
    markdown = as_markdown(collect(sweep))
    assert cells(markdown, "mlp3")[0] == "**50.0 ± 0.0†**"
    assert "† collapsed, the projections say nothing of their picture: demo, local_head mlp3 (seed 1)" in markdown
    assert "collapsed" not in as_markdown(collect(sweep._replace(points=points[:2])))


def test_machines_are_those_of_the_last_start_and_code_that_of_all(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, *(point({}, seed) for seed in (0, 1, 2)))
    for one, version in zip(sweep.points, ("0.1.0+gabc", "0.1.0+gabc", "0.1.0+gdef"), strict=True):
        folder = finish(sweep, one, results(device="cuda"), version)
    starts = [{"cpu": "Xeon", "gpus": ["H200", "H200"], "code": {"version": one}} for one in ("0.1.0+gabc", version)]
    (folder / "environment.json").write_text(json.dumps(starts))
    said = list(notes(collect(sweep)))
    assert "code: 0.1.0+gabc (2 points), 0.1.0+gabc then 0.1.0+gdef (1 points)" in said
    assert "ran on: cuda, Xeon (2 points), cuda, 2 x H200 (1 points); compare images/s only within one of them" in said
    assert "torch: 2.11.0" in said
