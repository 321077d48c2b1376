"""`cossl bench step` times what it says it times, counts work and ratios, and `make gpu-report` runs from end to end."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cossl.tools import bench_figures, bench_step, gpu_report
from cossl.tools.bench import installed
from cossl.tools.bench_peers import PEERS, Job, Peer, Running
from cossl.tools.bench_step import SIZES, planned
from cossl.tools.bench_turns import OURS, Clock, Row, Turn, Work, ceilings, count, percentile, take_turn, write_profile
from cossl.train import demo

CPU = torch.device("cpu")
TINY = "demo --device cpu --model.width 8 --model.hidden-dim 16 --loader.workers 1 --steps 2 --repeats 2".split()


# ---- turns ------------------------------------------------------------------------------------------------------------------------


def sleeper(wait_s: float, work_s: float, made_ahead: int = 0, **changes: Any) -> Row:
    """A source that is slow but for what it made ahead, and a step that sleeps."""

    def batches() -> Iterator[int]:
        for i in range(1000):
            time.sleep(0 if i < made_ahead else wait_s)
            yield i

    row = Row(OURS, "loader", "eager", 10, lambda batch: time.sleep(work_s), batches, made_ahead, 4)
    return replace(row, **changes)


def test_waiting_and_working_are_told_apart() -> None:
    turn = take_turn(sleeper(0.02, 0.01, made_ahead=5), Clock(CPU))
    assert len(turn.waits) == len(turn.works) == 4
    assert min(turn.waits) >= 0.02  # what was made ahead is not in it
    assert all(work >= 0.01 for work in turn.works)
    assert turn.loop_wait_s == pytest.approx(sum(turn.waits), rel=0.2)
    assert turn.seconds >= sum(turn.periods) >= 4 * 0.03
    assert sum(turn.waits) > sum(turn.works)


def test_a_turn_ends_when_its_time_is_over_and_its_rate_is_that_of_the_steps_done() -> None:
    row = sleeper(0, 0.02, steps=1000, most_s=0.05)
    row.turns.append(take_turn(row, Clock(CPU)))
    done = len(row.turns[0].works)
    assert 1 <= done <= 3
    assert row.rates == [pytest.approx(10 * done / row.turns[0].seconds)]


def test_peak_memory_is_that_of_the_turn() -> None:
    def step(batch: int) -> None:
        torch.ones(2**26 * batch)  # 256 MiB each

    rows = [Row(OURS, "synthetic", "eager", 1, step, lambda n=n: iter([n] * 9), 0, 1) for n in (2, 0)]
    large, none = (take_turn(row, Clock(CPU)).peak_mib for row in rows)
    assert 400 < large - none < 640


def test_work_is_counted_as_by_hand() -> None:
    a, b = torch.ones(4, 8), torch.ones(8, 2)
    work = count(lambda: (a @ b).view(2, 4).add_(1))
    assert work.flops == 2 * 4 * 8 * 2
    assert work.product_bytes == 4 * (4 * 8 + 8 * 2 + 4 * 2)
    assert work.all_bytes == work.product_bytes + 4 * 2 * 8  # read and written in place; the view moves nothing


def test_the_95th_percentile() -> None:
    assert percentile(range(1, 101), 0.95) == 95
    assert percentile([3.0, 1.0], 0.95) == 3
    assert percentile([7.0], 0.95) == 7


# ---- figures ----------------------------------------------------------------------------------------------------------------------


def test_figures_of_a_row() -> None:
    turns = [Turn(seconds, [0.1, 0.1], [seconds / 2 - 0.1] * 2, 0.2, 5.0 * seconds, 0) for seconds in (1.0, 2.0, 4.0)]
    best = {"matmul_bf16_tflops": 2e-9, "matmul_fp32_tflops": 1e-9, "copy_gb_per_s": 4e-6}
    row = Row(OURS, "loader", "eager", 16, print, lambda: iter(()), 0, 2, turns=turns)
    shown = bench_figures.figures(row, Work(500, 2000, 1000), best, "fp32")
    assert shown["images_per_s"] == 16
    assert shown["spread"]["images_per_s"] == [8, 32]
    assert (shown["step_ms"], shown["step_p95_ms"], shown["n"], shown["steps"], shown["peak_mib"]) == (1000, 2000, 3, 6, 20)
    assert shown["data_wait_share"] == 0.1
    assert shown["mfu"] == 0.5  # 1 step a second
    assert shown["of_copy"] == 0.5
    compiled = bench_figures.figures(replace(row, mode="compiled"), Work(500, 2000, 1000), best, "bf16")
    assert (compiled["mfu"], compiled["of_copy"]) == (0.25, 0.25)
    alone = bench_figures.figures(replace(row, source="loader alone", mode="-"), Work(500, 2000, 1000), best, "bf16")
    assert alone["mfu"] is alone["data_wait_share"] is None


def line(source: str, mode: str, turns: list[float], name: str = OURS, wait: float = 0.01) -> dict[str, Any]:
    rate = sorted(turns)[1]
    return {"name": name, "source": source, "mode": mode, "batch_size": 64, "turns": turns, "images_per_s": rate, "data_wait_share": wait}


ROWS = [
    line("synthetic", "eager", [10.0, 20.0, 40.0]),
    line("loader", "eager", [9.0, 10.0, 10.0]),
    line("synthetic", "compiled", [3000.0, 3000.0, 3000.0]),
    line("loader", "compiled", [2800.0, 2800.0, 2900.0]),
    line("loader alone", "-", [20.0, 10.0, 20.0]),
    line("augmentation alone", "-", [1000.0, 1000.0, 4000.0]),
    line("loader", "eager", [700.0, 1400.0, 1450.0], name="lightly"),
]


def test_ratios_are_taken_turn_by_turn() -> None:
    found = {(r["name"], r["mode"]): (r["median"], r["spread"]) for r in bench_figures.ratios(ROWS)}
    assert found["overlap efficiency", "eager"] == (0.9, [0.5, 1.0])
    assert found["augmentation / step", "eager"] == (0.01, [0.01, 0.02])
    assert found["ours / lightly, loader", "compiled"] == (2.0, [2.0, 4.0])
    assert found["compiled / eager, synthetic", "compiled"] == (150, [75, 300])
    assert ("cached / real loader", "eager") not in found


@pytest.mark.parametrize(
    ("gpu", "preset", "met"),
    [("NVIDIA H200", "in1k", [True, True, False, False]), ("NVIDIA H100", "in1k", []), ("NVIDIA H200", "demo", []), (None, "in1k", [])],
)
def test_goals_are_judged_on_the_card_they_are_meant_for(gpu: str | None, preset: str, met: list[bool]) -> None:
    report = {"machine": {"gpu": gpu}, "settings": {"preset": preset}, "rows": ROWS, "ratios": bench_figures.ratios(ROWS)}
    assert [goal["met"] for goal in bench_figures.judged(report)] == met
    report |= {"rows": [], "ratios": []}
    assert {goal["met"] for goal in bench_figures.judged(report)} <= {None}


# ---- the command ------------------------------------------------------------------------------------------------------------------


def fake_peer(job: Job) -> Running:
    """Takes 20 ms for a step; its loader gives what it is told."""
    return Running(lambda batch: time.sleep(0.02), (), lambda: iter([()] * 99))


@pytest.fixture(scope="module")
def report(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a tiny run on two batch sizes, with a peer that is there, one that is missing and one that is broken."""

    def broken(job: Job) -> Running:
        raise RuntimeError("no such thing\nat all")

    here = {"lightly": Peer("torch", "", fake_peer), "byol-pytorch": Peer("no_such_package", "pip install byol-pytorch", fake_peer)}
    folder, profiled = tmp_path_factory.mktemp("step"), list[str]()
    argv = [*TINY, "--data", str(pictures), "--batch-sizes", "8,4", "--peers", "--json", str(folder / "out.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_step, "PEERS", here | {"broken": Peer("torch", "", broken)})
        patch.setattr(
            bench_step, "ceilings", lambda device: {name: 1.0 for name in ("matmul_bf16_tflops", "matmul_fp32_tflops", "copy_gb_per_s")}
        )
        patch.setattr(bench_step, "write_profile", lambda row, clock, folder: profiled.append(f"{row.batch_size}, {row}"))
        with pytest.raises(SystemExit) as ended:
            bench_step.step_main([*argv, "--profile", str(folder)])
    written: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return written | {"exit": ended.value.code, "profiled": profiled}


def test_every_source_is_measured_at_every_batch_size(report: dict[str, Any]) -> None:
    assert {"machine", "command", "settings", "rows", "ceilings", "ratios", "missing", "failed"} <= report.keys()
    rows = {(row["batch_size"], row["name"], row["source"]): row for row in report["rows"]}
    own = ("synthetic", "loader", "cached", "loader alone", "augmentation alone")
    assert rows.keys() == {(size, OURS, source) for size in (4, 8) for source in own} | {(4, "lightly", s) for s in ("synthetic", "loader")}
    for row in rows.values():
        low, high = row["spread"]["images_per_s"]
        assert 0 < low <= row["images_per_s"] <= high
        assert (row["n"], row["steps"], len(row["turns"])) == (2, 4, 2)
        assert row["step_ms"] <= row["step_p95_ms"]
    assert rows[8, OURS, "cached"]["data_wait_share"] < 0.1
    assert rows[4, "lightly", "synthetic"]["step_ms"] == pytest.approx(20, rel=0.3)
    work = [rows[size, OURS, "cached"] for size in (4, 8)]
    per_step = [row["tflops"] / row["images_per_s"] * row["batch_size"] for row in work]
    assert per_step[1] == pytest.approx(2 * per_step[0], rel=0.2)  # FLOPs grow with the batch


def test_missing_and_broken_peers_are_named(report: dict[str, Any]) -> None:
    assert report["missing"] == [{"name": "byol-pytorch", "batch_size": 4, "install": "pip install byol-pytorch"}]
    assert [(entry["name"], entry["reason"]) for entry in report["failed"]] == [("broken", "no such thing")]
    assert report["exit"] == 1
    shown = "\n".join(bench_figures.table(report))
    assert "missing: pip install byol-pytorch" in shown
    assert "broken, start, eager failed: no such thing" in shown
    assert shown.count("ours / lightly, loader, eager") == 1
    assert "overlap efficiency, eager" in shown


def test_rows_on_the_real_loader_are_profiled(report: dict[str, Any], tmp_path: Path) -> None:
    assert report["profiled"] == ["4, ours, loader, eager", "8, ours, loader, eager"]
    a = torch.ones(16, 16)
    text = write_profile(sleeper(0, 0, step=lambda batch: a @ a), Clock(CPU), tmp_path / "new")
    assert "aten::mm" in text
    assert (tmp_path / "new" / "ours-loader-eager-b10.txt").read_text() == text
    names = {event.get("name") for event in json.loads((tmp_path / "new" / "ours-loader-eager-b10.trace.json").read_text())["traceEvents"]}
    assert "aten::mm" in names


def test_a_row_that_fails_costs_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    def out_of_memory(batch: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    plan = planned(bench_step.parse(["demo", "--repeats", "1"])[1])
    failed: list[dict[str, Any]] = []
    rows = bench_step.measure_rows([replace(sleeper(0, 0), step=out_of_memory), sleeper(0, 0, source="cached")], plan, failed)
    assert [row.source for row in rows] == ["cached"]
    assert [(entry["source"], entry["reason"][:18]) for entry in failed] == [("loader", "CUDA out of memory")]


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_does_the_same_work(name: str, pictures: Path) -> None:
    if not installed(PEERS[name].package):
        pytest.skip(f"{name} is not installed")
    config = replace(demo(), batch_size=4, loader=replace(demo().loader, workers=0))
    running = PEERS[name].start(Job(config, CPU, pictures / "train"))
    assert running.open is not None
    for batch in (running.resident, next(running.open())):
        running.step(batch)
    shapes = [x.shape for part in (running.resident, next(running.open())) for x in (part[0] if name == "lightly" else part[:1])]
    assert set(shapes) == {(4, 3, 32, 32)}
    assert PEERS[name].start(Job(config, CPU, None)).open is None


def test_default_and_given_batch_sizes() -> None:
    assert SIZES.instance_from_str(["64,32", "8"]) == (64, 32, 8)
    assert planned(bench_step.parse(["demo"])[1]).sizes == (32,)
    assert planned(bench_step.parse(["in1k", "--device", "cpu"])[1]).sizes == (4,)
    assert planned(bench_step.parse(["demo", "--batch-sizes", "16,8,16"])[1]).sizes == (8, 16)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["dem"], "did you mean demo?"),
        (["demo", "--batch-sizes", "1"], "--batch-sizes 1: expected 2 or more"),
        (["demo", "--steps", "0"], "--steps 0: expected 1 or more"),
        (["demo", "--json", "nowhere/out.json"], "no folder nowhere"),
        (["demo", "--profile", "nowhere/out"], "no folder nowhere"),
        (["demo", "--device", "cuda"], "torch sees no GPU"),
        (["demo", "--data", "nowhere"], "--data nowhere does not exist"),
    ],
)
def test_mistakes_are_answered(argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_step, "ceilings", lambda device: {})
    with pytest.raises((ValueError, OSError), match=said.replace("?", r"\?")):
        bench_step.step_main(argv)


# ---- the report -------------------------------------------------------------------------------------------------------------------


def test_ceilings_are_measured() -> None:
    assert all(value > 0 for value in ceilings(CPU).values())


@pytest.mark.parametrize(("memory", "sizes"), [(139.8, (256, 512)), (79.0, (256, 512)), (39.0, (128, 256)), (8.0, (32, 64)), (2.0, (32,))])
def test_batch_sizes_that_fit(memory: float, sizes: tuple[int, ...]) -> None:
    assert gpu_report.fitting(memory) == sizes


@pytest.mark.parametrize(
    ("gpu", "slug"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb")]
)
def test_the_card_in_the_file_name(gpu: str, slug: str) -> None:
    assert gpu_report.card(gpu) == slug


def test_a_report_of_parts_that_work_fail_and_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def part(name: str, code: str, most_s: float = 30, reads: Any = "json") -> gpu_report.Part:
        return gpu_report.Part(name, [sys.executable, "-c", code, "{json}"], most_s, reads)

    write = "import sys, json; json.dump({'rows': [], 'missing': [], 'ratios': [], 'goals': []}, open(sys.argv[1], 'w'))"
    kernel = '[{"name": "augment", "value": 0.5, "unit": "ms per view", "low": 0.4, "high": 0.6}]'
    those = [
        part("tests", "print('== 3 passed in 1 s ==')", reads="code"),
        part("heads", "raise SystemExit('out | of luck')"),
        part("step", write + "; import time; sys.stdout.flush(); time.sleep(60)", 2),
        part("augmentation", f"print('noise'); print('{kernel}')", reads="line"),
        part("loaders", write),
    ]
    monkeypatch.setattr(gpu_report, "parts", lambda args, memory: those)
    with pytest.raises(SystemExit) as ended:
        gpu_report.report_main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert ended.value.code == 1
    (file,) = tmp_path.glob("gpu-*-torch*.json")
    done = {entry["name"]: entry for entry in json.loads(file.read_text())["parts"]}
    assert [entry["exit_code"] for entry in done.values()] == [0, 1, None, 0, 0]
    assert done["loaders"]["result"] == done["step"]["result"] == {"rows": [], "missing": [], "ratios": [], "goals": []}
    assert done["step"]["seconds"] < 30
    shown = capsys.readouterr().out
    for said in ("| 3 passed in 1 s |", "| exit code 1: out / of luck |", "| stopped, its time was over;", "augment: 0.5000 ms per view"):
        assert said in shown


def test_what_is_run_on_a_gpu_fits_into_its_time() -> None:
    for quick in (False, True):
        every = gpu_report.parts(gpu_report.ReportArgs(quick=quick), 139.8)
        assert [part.name for part in every] == ["tests", "heads", "step", "augmentation", "loaders"]
        step = every[2].command
        preset, args = bench_step.parse(step[step.index("step") + 1 :])
        assert (preset, args.batch_sizes, args.peers) == ("in1k", (256, 512), True)
        assert sum(part.most_s for part in every[:4]) < 720


def test_without_a_gpu_it_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, said in (([], "no GPU here"), (["--device", "cpu"], "add --quick and --out DIR"), (["--minutes", "0"], "--minutes 0")):
        monkeypatch.setattr(sys, "argv", ["gpu_report", *argv])
        with pytest.raises(SystemExit) as ended:
            gpu_report.main()
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("gpu-report: ")
        assert said in line
    assert not math.isnan(gpu_report.require_gpu(gpu_report.ReportArgs(device="cpu", quick=True, out=Path())))
