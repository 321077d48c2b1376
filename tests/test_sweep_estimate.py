"""What a sweep will cost: measured speeds of that network, or no number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cossl.models.flags import flatten
from cossl.slurm import estimate
from cossl.slurm.grids import points
from cossl.train import PRESETS


def bench(path: Path, *rates: float) -> Path:
    rows = [{"name": "ours", "source": "loader", "images_per_s": rate} for rate in rates]
    rows += [{"name": "peer", "source": "loader", "images_per_s": 9e9}, {"name": "ours", "source": "synthetic", "images_per_s": 9e9}]
    step = {"rows": rows, "settings": {"config": json.loads(json.dumps(flatten(PRESETS["in1k"]())))}}
    path.write_text(json.dumps({"parts": [{"name": "other", "result": None}, {"name": "step", "result": step}]}))
    return path


def test_hours_are_pictures_by_speed(tmp_path: Path) -> None:
    rate = estimate.rate_of("h200", 0, bench(tmp_path / "b.json", 1000.0, 2000.0))
    (one, *_), (other_, *_) = points("weighting", (), (0,), (), ()), points("weighting", ("in100",), (0,), (), ())
    assert estimate.gpu_hours(one, rate) == pytest.approx(100 * 1_281_167 / 2000 / 3600)
    assert estimate.gpu_hours(other_, rate) == pytest.approx(400 * 126_689 / 2000 / 3600)
    states = {one.identity: "new", other_.identity: "done"}
    *_, total, source = estimate.table([one, other_], states, rate, 1)
    assert total.startswith("2 points, 24.8 GPU-hours; not done: 1, 17.8 GPU-hours")
    assert "b.json" in source
    (small, *_) = points("weighting", ("in100-resnet18",), (0,), (), ())
    assert estimate.gpu_hours(small, rate) is None  # of another network it says nothing


def test_a_beton_says_how_many_pictures_it_has(tmp_path: Path) -> None:
    (one, *_) = points("weighting", (), (0,), (str(tmp_path),), ())
    assert estimate.pictures_of(one) == 1_281_167
    (tmp_path / "train.beton.json").write_text('{"num_rows": 80}')
    assert estimate.pictures_of(one) == 80
    for damaged in ("[", "[]", "{}", '{"num_rows": []}'):
        (tmp_path / "train.beton.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"train.beton.json is no manifest that can be read .*: see cossl verify$"):
            estimate.pictures_of(one)


def test_a_speed_that_nobody_measured_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "RESULTS", tmp_path)
    (one, *_) = points("weighting", (), (0,), (), ())
    for gpu, said in (("", "the cluster's record names no gpu"), ("h200", "no benchmark of a h200 in tools/results")):
        rate = estimate.rate_of(gpu, 0, None)
        assert rate.images_per_s is None
        assert rate.source.startswith(said)
        assert "1 points, - GPU-hours" in "\n".join(estimate.table([one], {one.identity: "new"}, rate, 8))
    for name, speed in (("gpu-h200-2026-01-02.json", 2.0), ("gpu-h200-2026-01-01.json", 1.0), ("gpu-a100-2026-01-03.json", 3.0)):
        bench(tmp_path / name, speed)
    assert estimate.rate_of("H200", 0, None).images_per_s == 2
    assert estimate.rate_of("h200", 5.0, None)[:2] == (5.0, "as given, not measured")
    for text, message in (("{", "holds no step of ours with a loader"), ('{"rows": []}', "holds no step of ours with a loader")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=f"x.json {message}"):
            estimate.rate_of("", 0, tmp_path / "x.json")
