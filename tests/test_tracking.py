"""What a run writes about itself: metrics.jsonl, TensorBoard, wandb (a stand-in where it is missing), train.log, curves.png."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tqdm import tqdm

from cossl.models import tracking
from cossl.models.run_status import REQUEUE_EXIT_CODE
from cossl.models.tracking import TrackingConfig, track, train_log
from cossl.pipelines import picture
from cossl.pipelines.picture import draw_curves


def record(step: int) -> dict[str, float]:
    return {"step": step, "epoch": step / 100, "loss": 1 / step}


def write(run_dir: Path, config: TrackingConfig, steps: range, ending: BaseException | None = None) -> None:
    with track(run_dir, config, {"loss.local_weight": 0.3}) as line:
        for step in steps:
            line(record(step))
        if ending is not None:
            raise ending


def read(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- figures


def test_metrics_are_a_line_a_record_and_nothing_else_is_written_unasked(tmp_path: Path) -> None:
    with track(tmp_path, TrackingConfig(), {}) as line:
        for step in (10, 20):
            line(record(step))
            assert read(tmp_path)[-1] == record(step)  # at once
    write(tmp_path, TrackingConfig(), range(30, 31))
    assert read(tmp_path) == [record(10), record(20), record(30)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="the extra tensorboard is missing")
    write(tmp_path, TrackingConfig(tensorboard=True), range(1, 5))
    write(tmp_path, TrackingConfig(tensorboard=True), range(3, 7))  # killed after step 4, its checkpoint is of step 2
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"epoch", "loss"}
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(step, pytest.approx(1 / step)) for step in range(1, 7)]


class FakeWandb(types.ModuleType):
    """What tracking uses of wandb, and a list of what was done with it."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[Any] = []
        self.fails_at, self.refuses = 10**9, False

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> FakeWandb:
        if self.refuses:
            raise self.Error("No API key configured.")
        self.calls.append(arguments)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if step >= self.fails_at:
            raise BrokenPipeError("the service is gone")
        self.calls.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.calls.append(exit_code)
        raise self.Error("nobody listens")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    return fake


@pytest.mark.parametrize(("mode", "resume"), [("offline", None), ("online", "allow")])
def test_wandb_keeps_its_id_across_requeues(tmp_path: Path, wandb: FakeWandb, mode: Any, resume: str | None) -> None:
    config = TrackingConfig(wandb=mode, wandb_project="grids")
    with pytest.raises(SystemExit):
        write(tmp_path, config, range(1, 3), SystemExit(REQUEUE_EXIT_CODE))
    write(tmp_path, config, range(2, 3))
    (started, *_, ended), (again, *logged, _) = wandb.calls[:4], wandb.calls[4:]
    assert started == again
    assert (started["project"], started["name"], started["mode"], started.get("resume")) == ("grids", tmp_path.name, mode, resume)
    assert started["config"] == {"loss.local_weight": 0.3}
    assert re.fullmatch("[0-9a-f]{8}", started["id"])
    assert (ended, logged) == (0, [(2, {"epoch": 0.02, "loss": 0.5})])
    write(tmp_path / "..", config, range(0))  # another folder, another id
    assert wandb.calls[-2]["id"] != started["id"]
    (tmp_path / ".." / "wandb-id").unlink()


def test_wandb_is_told_of_a_failure(tmp_path: Path, wandb: FakeWandb) -> None:
    with pytest.raises(RuntimeError):
        write(tmp_path, TrackingConfig(wandb="offline"), range(1, 2), RuntimeError("loss not finite"))
    assert wandb.calls[-1] == 1


def test_a_refusal_of_wandb_names_the_way_out(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.refuses = True
    with pytest.raises(ValueError, match=r"--tracking.wandb online: No API key configured. Or use --tracking.wandb offline"):
        write(tmp_path, TrackingConfig(wandb="online"), range(1, 2))


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]) -> None:
    wandb.fails_at = 2
    write(tmp_path, TrackingConfig(wandb="offline"), range(1, 5))
    assert len(read(tmp_path)) == 4
    assert capsys.readouterr().err == "step 2: wandb failed (the service is gone); the run goes on without it\n"
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path, TrackingConfig(), range(1, 2))


@pytest.mark.parametrize(
    ("config", "module"),
    [(TrackingConfig(tensorboard=True), "torch.utils.tensorboard"), (TrackingConfig(wandb="offline"), "wandb")],
)
def test_a_missing_tracker_says_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrackingConfig, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    extra = module.split(".")[-1]
    with pytest.raises(ImportError, match=rf"^{extra} is not installed: pip install -c constraints.txt -e '.\[{extra}\]'$"):
        write(tmp_path, config, range(1, 2))


def test_real_wandb_works_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is missing")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    for steps in (range(1, 3), range(2, 4)):
        write(tmp_path, TrackingConfig(wandb="offline"), steps)
    identity = (tmp_path / "wandb-id").read_text()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))) >= 1


# ------------------------------------------------------------------------------------------------- words


def log_of(run_dir: Path) -> list[str]:
    lines = (run_dir / "train.log").read_text().splitlines()
    assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    return [line[21:] for line in lines]


def test_the_log_has_what_is_said_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    for _ in range(2):
        with train_log(tmp_path):
            print("one", "two")
            print("a warning\nof two lines", file=sys.stderr)
    assert log_of(tmp_path) == ["one two", "a warning", "of two lines", "finished"] * 2
    assert capsys.readouterr() == ("one two\n" * 2, "a warning\nof two lines\n" * 2)
    assert (sys.stdout, sys.stderr) == before


def after(context: BaseException, error: SystemExit) -> SystemExit:
    error.__context__ = context
    return error


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (RuntimeError("loss not\n finite"), "failed: RuntimeError: loss not finite"),
        (after(OSError(28, "disk full"), SystemExit(1)), "failed: OSError: [Errno 28] disk full"),
        (SystemExit(3), "failed: SystemExit: 3"),
        (SystemExit(REQUEUE_EXIT_CODE), "stopped"),
        (after(KeyboardInterrupt(), SystemExit(130)), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (SystemExit(0), "finished"),
    ],
)
def test_the_last_line_says_how_a_run_ended(tmp_path: Path, error: BaseException, last: str) -> None:
    with pytest.raises(type(error)), train_log(tmp_path):
        raise error
    *traceback, said = log_of(tmp_path)
    assert said == last
    assert any("in test_the_last_line" in line for line in traceback) == isinstance(error, RuntimeError)


def test_of_a_progress_bar_the_log_has_a_line_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    with train_log(tmp_path):
        now[0] = 100
        with tqdm(total=100, mininterval=0, miniters=1, file=sys.stderr, desc="epoch 1/8", leave=False) as bar:
            for _ in range(100):
                now[0] += 5
                bar.update()
    shown = log_of(tmp_path)
    assert [int(re.findall(r"epoch 1/8: +(\d+)%", line)[0]) for line in shown[:-1]] == list(range(0, 100, 12))
    assert shown[-1] == "finished"
    assert capsys.readouterr().err.count("epoch 1/8") >= 100


def test_a_full_disk_costs_the_log_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").symlink_to("/dev/full")
    with train_log(tmp_path):
        print("one")
        print("two")
    assert capsys.readouterr().out == "one\ntwo\n"


# ------------------------------------------------------------------------------------------------- curves


def metrics_file(path: Path, lines: int, **more: float) -> Path:
    path.write_text(
        "".join(json.dumps(record(step) | {"std": 1.0, "rank": 9.0, "images_per_s": 7.0} | more) + "\n" for step in range(1, lines))
    )
    return path


def panels(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Title to number of points of each curve, of what is drawn from now on."""
    figure = pytest.importorskip("matplotlib.figure", reason="the extra log is missing").Figure
    drawn: dict[str, list[int]] = {}
    save = figure.savefig

    def savefig(self: Any, *arguments: Any, **options: Any) -> None:
        drawn.update({axes.get_title(): [len(line.get_xdata()) for line in axes.lines] for axes in self.axes})
        save(self, *arguments, **options)

    monkeypatch.setattr(figure, "savefig", savefig)
    return drawn


def test_curves_are_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = panels(monkeypatch)
    metrics = metrics_file(tmp_path / "metrics.jsonl", 4)
    draw_curves(metrics, tmp_path / "curves.png")
    assert drawn == {"loss": [3], "pictures/s": [3], "spread": [3], "effective rank": [3]}
    with open(metrics, "a") as file:
        file.write(json.dumps(record(4) | {"knn_top1": 50.0, "global": 0.1}) + "\n")
    draw_curves(metrics, tmp_path / "curves.png")
    assert drawn == {"loss": [4, 1], "top-1, percent": [1], "pictures/s": [3], "spread": [3], "effective rank": [3]}
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width == 2000
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}


def test_of_a_long_run_few_lines_are_drawn_the_last_and_all_knn_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = panels(monkeypatch)
    monkeypatch.setattr(picture, "LINES_DRAWN", 10)
    metrics = metrics_file(tmp_path / "metrics.jsonl", 96)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line | ({"knn_top1": 1.0} if i in (12, 13, 14) else {})) + "\n" for i, line in enumerate(lines)))
    draw_curves(metrics, tmp_path / "curves.png")
    assert drawn["top-1, percent"] == [3]
    assert drawn["spread"] == [10 + 2]  # one of the three is drawn anyway


@pytest.mark.parametrize(
    "text", [None, "", '{"step": 1, "epo', '{"step": 1, "loss": 2}\n', '{"epoch": 1, "loss": "much"}\n{"epoch": {}, "loss": 1}\n']
)
def test_what_cannot_be_drawn_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("no curves.png: ")
    assert not (tmp_path / "curves.png").exists()
