"""What the figures of a sweep show: every run, means, what is missing, and names that can be read."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from finished_sweeps import HEADS, WEIGHTS, crossed_sweep, finish, nasty_sweep, point, results, sweep_of
from hypothesis import given
from hypothesis import strategies as st

from cossl.slurm import figures
from cossl.slurm.collect import Collected, collect
from cossl.slurm.figures import draw_accuracy, draw_speed, spread_out


@pytest.fixture
def crossed(tmp_path: Path) -> Collected:
    return crossed_sweep(tmp_path)


@pytest.fixture
def nasty(tmp_path: Path) -> Collected:
    return nasty_sweep(tmp_path)


def axes_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of what is drawn from now on."""
    figure = pytest.importorskip("matplotlib.figure", reason="the extra log is missing").Figure
    drawn: list[Any] = []
    save = figure.savefig

    def savefig(self: Any, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        drawn.extend(self.axes)

    monkeypatch.setattr(figure, "savefig", savefig)
    return drawn


def test_accuracy_shows_every_run_the_means_and_what_is_missing(
    crossed: Collected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = axes_of(monkeypatch)
    draw_accuracy(crossed, tmp_path / "accuracy.png")
    assert [axes.get_title() for axes in drawn] == [
        f"ablation_plan, {preset}: n = 2 seeds, 3 of 24 runs missing" for preset in ("in1k", "in100")
    ]
    for axes, preset in zip(drawn, crossed.presets, strict=True):
        dots = sorted(y for line in axes.lines if line.get_marker() == "." for y in line.get_ydata())
        assert dots == sorted(top for setting in crossed.of(preset) for top in setting.numbers("linear_top1"))
        means = [container.lines[0].get_ydata()[0] for container in axes.containers]
        assert means == [mean for setting in crossed.of(preset) if (mean := setting.mean("linear_top1")) is not None]
        bottom, top = axes.get_ylim()
        assert all(bottom < dot < top for dot in dots)
        assert [label.get_text() for label in axes.get_xticklabels()] == list(HEADS)
        missing = {text.get_text(): text.get_position()[0] for text in axes.texts}
        assert missing["missing"] == pytest.approx(2)
        assert 1 < missing["1 of 2"] < 1.5
        assert not any(abs(container.lines[0].get_xdata()[0] - 2) < 0.1 for container in axes.containers)
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend[:3] == [f"local_to_global {weight}" for weight in WEIGHTS]
        assert legend[-1] == "untrained network, 20.5"


def test_the_untrained_network_is_drawn_where_it_is_near_and_told_where_it_is_not(
    crossed: Collected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = axes_of(monkeypatch)
    draw_accuracy(crossed, tmp_path / "near.png")
    far = point({})
    sweep = sweep_of(tmp_path, far)
    finish(sweep, far, results(70.0))
    draw_accuracy(collect(sweep), tmp_path / "far.png")
    heights = [{y for path in collection.get_paths() for _, y in path.vertices} for axes in drawn for collection in axes.collections]
    assert heights.count({20.5}) == 2
    assert drawn[0].get_ylim()[0] < 20.5
    assert drawn[-1].get_ylim()[0] > 60
    assert drawn[-1].get_legend().get_texts()[-1].get_text() == "untrained network, 20.5:\nbelow what is shown"


def test_speed_names_every_point(crossed: Collected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = axes_of(monkeypatch)
    draw_speed(crossed, tmp_path / "speed.png")
    for axes, preset in zip(drawn, crossed.presets, strict=True):
        settings = [setting for setting in crossed.of(preset) if setting.done]
        points = sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines)
        assert points == sorted((setting.mean("images_per_s"), setting.mean("linear_top1")) for setting in settings)
        named = {text.get_text(): text.xy for text in axes.texts}
        assert named["conv1x1, 0.2"] == (2000.0, 40.5)
        assert named["mlp2, 0.8 (1 of 2)"] == (2001.0, 50.0)
        assert len(named) == len(settings) == 11
        assert min(text.get_fontsize() for text in axes.texts) >= 9


@pytest.mark.parametrize("settings", [2, 12, 24])
def test_no_name_covers_another_where_all_points_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: int) -> None:
    drawn = axes_of(monkeypatch)
    from matplotlib.text import Text

    sweep = sweep_of(tmp_path, *(point({"optim.x": i}) for i in range(settings)))
    for i, one in enumerate(sweep.points):
        finish(sweep, one, results(50.0 + i / 1000))
    draw_speed(collect(sweep), tmp_path / "speed.png")
    boxes = sorted((Text.get_window_extent(text) for text in drawn[0].texts), key=lambda box: box.y0)
    assert len(boxes) == settings
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))


def test_of_many_settings_the_best_are_named_and_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = axes_of(monkeypatch)
    monkeypatch.setattr(figures, "LABELLED", 3)
    sweep = sweep_of(tmp_path, *(point({"optim.x": i}) for i in range(6)))
    for i, one in enumerate(sweep.points):
        finish(sweep, one, results(50.0 + i))
    draw_speed(collect(sweep), tmp_path / "speed.png")
    assert [text.get_text() for text in drawn[0].texts] == ["3", "4", "5"]
    assert "named are the 3 best of 6" in drawn[0].get_xlabel()


@given(st.lists(st.floats(-0.5, 1.5), max_size=40), st.floats(0.001, 0.2))
def test_names_are_spread_out(wanted: list[float], apart: float) -> None:
    places = spread_out(sorted(wanted), apart)
    assert len(places) == len(wanted)
    least = min(apart, 1 / max(1, len(wanted) - 1))
    assert all(b - a >= least - 1e-9 for a, b in itertools.pairwise(places))
    assert all(-1e-9 <= place <= 1 for place in places)


@pytest.mark.parametrize("keys", [0, 1, 3])
def test_any_number_of_varied_keys_and_no_results_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: int) -> None:
    drawn = axes_of(monkeypatch)
    sweep = sweep_of(
        tmp_path, *(point({f"optim.k{i}": value for i in range(keys)}, seed) for seed in (0, 1) for value in (1, 2)[: keys + 1])
    )
    draw_accuracy(collect(sweep), tmp_path / "accuracy.png")
    draw_speed(collect(sweep), tmp_path / "speed.png")
    ticks = [label.get_text() for label in drawn[0].get_xticklabels()]
    assert ticks == {0: ["heads"], 1: ["1", "2"], 3: ["1\n1\n1", "2\n2\n2"]}[keys]
    assert [text.get_text() for text in drawn[0].texts] == ["missing"] * len(ticks)
    assert [text.get_text() for text in drawn[1].texts] == ["no results yet"]


def test_any_name_can_be_drawn(nasty: Collected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = axes_of(monkeypatch)
    draw_accuracy(nasty, tmp_path / "accuracy.png")
    draw_speed(nasty, tmp_path / "speed.png")
    ticks = [label.get_text() for label in drawn[0].get_xticklabels()]
    assert ticks[:2] == ["a|b", "_x_"]
    assert r"\$5 and \$6" in ticks  # which matplotlib prints as dollar signs
