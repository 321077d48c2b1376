"""The benchmark counts what it says it counts, and `cossl bench loaders` and `cossl doctor` run end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cossl.tools import bench, bench_loaders, bench_pictures, bench_rows, doctor
from cossl.tools.bench import Stopwatch, descendants, peak_rss_mib
from cossl.tools.bench_kernels import sampling
from cossl.tools.bench_pictures import generated_folder, prepare, shrunk_folder
from cossl.tools.bench_rows import ROWS, VIEWS, Job

ISSUE_NAMES = "ours-ffcv ours-torch ours-dali-cpu stock-ffcv torchvision-pil torchvision-v2 dali-cpu floor-decode".split()
ISSUE_KEYS = {"name", "views", "workers", "images_per_s", "cpu_ms_per_image", "first_batch_s", "peak_rss_mib"}
BURN_S = 0.3


def burn(seconds: float = BURN_S) -> None:
    """Uses so much CPU time of this thread."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


WORKER = f"""
import sys, time
for line in sys.stdin:
    until = time.process_time() + {BURN_S}
    while time.process_time() < until:
        pass
    print("done", flush=True)
"""


# ---- accounting -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker() -> Iterator[subprocess.Popen]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", WORKER], stdin=pipe, stdout=pipe, text=True) as process:
        yield process


def ask(worker: subprocess.Popen) -> None:
    print("burn", file=worker.stdin, flush=True)


def wait_for(worker: subprocess.Popen) -> None:
    assert worker.stdout is not None
    assert worker.stdout.readline() == "done\n"


def test_cpu_time_counts_threads_and_children_that_live_and_that_are_reaped(worker: subprocess.Popen) -> None:
    with Stopwatch() as idle:
        time.sleep(0.2)
    assert idle.cpu_s < 0.05
    ask(worker)
    wait_for(worker)
    with Stopwatch() as living:  # what the worker used before is not counted
        ask(worker)
        wait_for(worker)
    assert BURN_S <= living.cpu_s < 1.3 * BURN_S
    with Stopwatch() as reaped:
        ask(worker)
        wait_for(worker)
        worker.communicate()
    assert BURN_S <= reaped.cpu_s < 1.3 * BURN_S + 0.1  # and the end of a process
    with Stopwatch() as threads:
        thread = threading.Thread(target=burn)
        thread.start()
        thread.join()
    assert BURN_S <= threads.cpu_s < 1.3 * BURN_S


def test_work_done_ahead_is_counted_where_it_was_asked_for(worker: subprocess.Popen) -> None:
    ask(worker)
    wait_for(worker)
    with Stopwatch() as watch:
        ask(worker)  # still at it when the block ends
    wait_for(worker)
    assert BURN_S <= watch.cpu_s < 1.3 * BURN_S
    assert watch.wall_s >= 0.9 * BURN_S


def test_peak_memory_is_that_of_the_whole_family() -> None:
    before = peak_rss_mib()
    code = "import sys; x = bytearray(b'x') * 2**26; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in descendants()
        assert 64 <= peak_rss_mib() - before < 128
        child.communicate()


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


# ---- the pictures -----------------------------------------------------------------------------------------------------------------


def test_generated_pictures_are_the_same_every_time_and_weigh_what_photographs_weigh(tmp_path: Path) -> None:
    one, other = (generated_folder(tmp_path / name, 12) for name in "ab")
    files = sorted(one.glob("*/*.jpg"))
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in sorted(other.glob("*/*.jpg"))]
    assert generated_folder(tmp_path / "a", 12) == one
    assert len(files) == 12
    assert 35e3 < np.mean([file.stat().st_size for file in files]) < 75e3
    assert {size_of(file) for file in files} == {(500, 375)}


def test_pictures_of_a_folder_are_shrunk_and_taken_again_until_there_are_enough(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "source" / "class").mkdir(parents=True)
    for i, size in enumerate([(1000, 400), (60, 80)]):
        Image.new("RGB", size, (40 * i, 90, 20)).save(tmp_path / "source" / "class" / f"{i}.png")
    pictures = prepare(tmp_path / "source", 5, tmp_path, tmp_path / "scratch", with_beton=False)
    sizes = [size_of(file) for file in sorted(pictures.folder.glob("*/*"))]
    assert sizes == [(500, 200), (60, 80), (500, 200), (60, 80), (500, 200)]
    assert (pictures.count, pictures.different, pictures.beton) == (5, 2, None)
    monkeypatch.setattr(bench_pictures, "LARGEST_SET", 4)
    few = prepare(None, 3, tmp_path, tmp_path / "few", with_beton=False)
    assert (few.count, few.different, len(list(few.folder.glob("*/*")))) == (3, 3, 3)
    (tmp_path / "source" / "class" / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of 3 pictures .* cannot be read, the first is .*2\.png"):
        shrunk_folder(tmp_path / "source", 3, tmp_path / "again")


# ---- the command ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a tiny run, on the demo pictures, where DALI is said to be missing."""
    out = tmp_path_factory.mktemp("bench") / "out.json"
    argv = [str(pictures / "train"), *"--rows ours-torch dali-cpu floor-union --images 8 --repeats 2 --workers 1 --views 2x224".split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_loaders, "installed", lambda package: package != "nvidia.dali")
        bench_loaders.loaders_main([*argv, "--json", str(out)])
    return json.loads(out.read_text())


def test_every_row_of_the_issue_can_be_asked_for() -> None:
    assert set(ISSUE_NAMES) <= set(ROWS)
    assert list(VIEWS) == ["2x224", "2x224+6x96"]
    assert [len(views) for views in VIEWS.values()] == [2, 8]
    assert {goal.peer for goal in bench_loaders.GOALS} <= set(ROWS)


def test_the_json_says_what_was_measured_on_what(report: dict[str, Any]) -> None:
    assert {"machine", "command", "rows"} <= set(report)
    assert {"cpu", "cores", "memory_gib", "python", "torch", "torchvision", "numba", "pillow", "date"} <= set(report["machine"])
    assert report["command"].startswith("cossl bench loaders")
    assert [(row["name"], row["views"], row["workers"]) for row in report["rows"]] == [
        (n, "2x224", 1) for n in ("ours-torch", "floor-union")
    ]
    for row in report["rows"]:
        assert set(row) >= ISSUE_KEYS | {"n", "spread"}
        assert (row["views"], row["workers"]) == ("2x224", 1)
        assert all(row[key] > 0 for key in ISSUE_KEYS - {"name", "views"})
        assert row["n"] == 2
        low, high = row["spread"]["cpu_ms_per_image"]
        assert low <= row["cpu_ms_per_image"] <= high
        assert row["first_batch_s"] < 60
        assert 100 < row["peak_rss_mib"] < 10_000
    assert {kernel["name"] for kernel in report["kernels"]} >= {"geometry", "positions-overlap", "positions-disjoint", "augment"}


def test_a_row_whose_package_is_missing_has_the_install_line_and_no_number(report: dict[str, Any]) -> None:
    (missing,) = report["missing"]
    assert missing["name"] == "dali-cpu"
    assert "pip install" in missing["install"]
    shown = [line for line in bench_loaders.table(report) if line.startswith("  dali-cpu")]
    assert len(shown) == 1
    assert "missing: pip install" in shown[0]


def test_a_row_that_fails_is_named_with_its_reason_and_costs_no_other_row(tmp_path: Path, pictures: Path) -> None:
    results = bench_loaders.Results()
    folder = str(pictures / "train")
    jobs = [
        Job(name, "2x224", 0 if name == "ours-torch" else 1, 4, 1, folder, str(tmp_path / "none")) for name in ("floor-union", "ours-torch")
    ]
    bench_loaders.measure_group(jobs, 1, results)
    assert [row["name"] for row in results.rows] == ["ours-torch"]
    (failed,) = results.failed
    assert failed["name"] == "floor-union"
    assert "no beton at" in failed["reason"]


def test_ratios_are_taken_turn_by_turn_and_judged() -> None:
    def row(name: str, turns: list[float]) -> dict[str, Any]:
        return {"name": name, "views": "2x224", "workers": 1, "turns": turns}

    rows = [row("ours-ffcv", [1, 2, 4]), row("stock-ffcv", [4, 4, 12]), row("floor-decode", [0.5, 1, 2]), row("ours-torch", [2, 2, 8])]
    bench_loaders.add_ratios(rows)
    assert [r["ratio_to_ours"] for r in rows] == [1, 3, 0.5, 2]
    verdicts = {v["goal"]: (v["figure"], v["met"]) for v in bench_loaders.judged(rows)}
    assert verdicts == {"at least 2.5x better than stock-ffcv": (3, True), "at most 1.25x of floor-decode": (2, False)}
    bench_loaders.add_ratios(alone := [row("stock-ffcv", [3])])
    assert alone[0]["ratio_to_ours"] is None
    assert bench_loaders.judged(alone) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["bench", "loader"], "did you mean loaders?"),
        (["bench", "loaders", "--rows", "our-ffcv"], "did you mean ours-ffcv?"),
        (["bench", "loaders", "--views", "3x224"], "did you mean 2x224?"),
        (["bench", "loaders", "--workers", "0"], "--workers"),
        (["bench", "loaders", "--images", "0"], "--images 0: expected 1 or more"),
        (["bench", "loaders", "nowhere", "--rows", "ours-torch"], "no such folder: nowhere"),
        (["bench", "loaders", "--json", "nowhere/out.json"], "there is no folder nowhere"),
        (["bench", "parity", "--images", "49"], "--images 49: expected at least 50"),
        (["bench", "parity", "--json", "nowhere/out.json"], "there is no folder nowhere"),
        (["bench", "parity", "--picture", "nowhere/out.png"], "there is no folder nowhere"),
        (["doctor", "--workers", "0"], "--workers 0"),
        (["doctor", "--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_answered_in_one_line(argv: list[str], said: str, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    from cossl.tools import cli

    monkeypatch.setattr(sys, "argv", ["cossl", *argv])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("bench: ")]
    assert exit_info.value.code == 2
    assert len(errors) == 1
    assert said in errors[0]


def test_positions_take_less_than_the_goal() -> None:
    """An absolute time, but with a factor of five to spare."""
    costs = {kernel.name: kernel.value for kernel in sampling()}
    assert len(costs) == 6
    assert all(cost is not None and cost < 20 for cost in costs.values()), costs


# ---- the doctor -------------------------------------------------------------------------------------------------------------------


def test_the_doctor_names_a_limit_a_knob_and_what_is_missing(pictures: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(doctor, "STAGE_S", 0.1)
    monkeypatch.setattr(doctor, "installed", lambda package: package != "ffcv")
    doctor.doctor_main(["--data", str(pictures), "--preset", "demo", "--workers", "1"])
    said = capsys.readouterr().out
    for stage in ("storage, cold", "decode and cut", "transfer", "augment", "step"):
        assert f"\n{stage}" in said
    assert "\nlimit      step: " in said
    assert "\nknob       " in said
    assert "missing    ffcv" in said
    assert "pip install" in said
    assert len(said.splitlines()) <= 24  # one screen
    assert max(map(len, said.splitlines())) <= doctor.SCREEN_COLUMNS


def test_the_doctor_blames_the_slowest_stage() -> None:
    def stages(**rates: float) -> list[doctor.Stage]:
        known = {"storage, cold": 1e4, "decode and cut": 2e3, "augment": 1e4, "step": 1e3}
        return [doctor.Stage(name, rate, "", f"turn {name}") for name, rate in (known | rates).items()]

    limit, knob, expect, workers = doctor.verdict(stages(), cost_ms=1.0, gpu=True)
    assert "step: 1,000" in limit
    assert "turn step" in knob
    assert "909 pictures/s" in expect  # augmentation and step share the GPU
    assert "--loader.workers 2 " in workers
    assert "625 pictures/s" in doctor.verdict(stages(), 1.0, gpu=False)[2]
    limit, _, expect, _ = doctor.verdict(stages(**{"storage, cold": 50.0}), 1.0, gpu=True)
    assert "storage, cold: 50" in limit
    assert "50 pictures/s" in expect
    assert f"would take 1,364 cores, and there are {bench.num_cores()}" in doctor.verdict(stages(), 1e3, gpu=True)[3].replace(
        "1364", "1,364"
    )


def test_stock_ffcv_gives_one_output_per_view(betons: Path) -> None:
    """Without iterating: that compiles for seconds."""
    pytest.importorskip("cv2")
    job = Job("stock-ffcv", "2x224+6x96", 1, 4, 1, "", str(betons / "train.beton"))
    assert bench_rows.ROWS["stock-ffcv"].reads == "beton"
    from cossl.pipelines.ffcv_stock import stock_ffcv

    loader = stock_ffcv(job.source, job.batch_size, job.workers, job.sizes, job.scales)
    assert len(loader) == 20
    assert set(loader.pipeline_specs) == {"image", *(f"image_{v}" for v in range(1, 8)), "label"}


def test_a_row_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr(bench_loaders.sys, "executable", str(silent))
    monkeypatch.setattr(bench_loaders, "PATIENCE_S", 0.2)
    results = bench_loaders.Results()
    bench_loaders.measure_group([Job("ours-torch", "2x224", 1, 2, 1, str(tmp_path), None)], 1, results)
    assert [(entry["name"], entry["reason"]) for entry in results.failed] == [("ours-torch", "no answer within 0.2 s")]
    assert results.rows == []
