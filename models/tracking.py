"""Where a run's figures and words go: metrics.jsonl, train.log, and TensorBoard or wandb where they are asked for.

One process of a run writes, the first rank.
"""

import contextlib
import json
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TextIO

from cossl.models.flags import replace_text
from cossl.models.run_status import FAILED, REQUEUE_EXIT_CODE

Record = dict[str, float]
Write = Callable[[Record], None]


@dataclass(frozen=True)
class TrackingConfig:
    """Where the lines of metrics.jsonl go besides."""

    tensorboard: bool = False
    """TensorBoard files in <run>/tensorboard; needs the extra `tensorboard`."""
    wandb: Literal["off", "online", "offline"] = "off"
    """online: to the server, after `wandb login`; offline: into <run>/wandb, for `wandb sync` later. Needs the extra `wandb`."""
    wandb_project: str = "cossl"
    """Project that the run is listed under."""


# ------------------------------------------------------------------------------------------------- figures


@contextlib.contextmanager
def track(run_dir: Path, tracking: TrackingConfig, config: dict[str, Any]) -> Iterator[Write]:
    """A function that takes a line of metrics ("step" is one of its names) to metrics.jsonl and to every tracker asked for.

    `config` is the flat one, shown beside the run. ImportError with the line that installs a tracker; ValueError if wandb refuses. One
    that fails later is left out from then on, which is said in one line; metrics.jsonl has everything, and its own failure is raised.
    Trap: trackers have no memory of what a killed run wrote after its last checkpoint; TensorBoard drops it, wandb keeps the first value of
    a step, which is the same.
    """
    with contextlib.ExitStack() as stack:
        asked = [name for name in TRACKERS if getattr(tracking, name) not in (False, "off")]
        trackers = {name: stack.enter_context(TRACKERS[name](run_dir, tracking, config)) for name in asked}

        def write(record: Record) -> None:
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
            for name in list(trackers):
                try:
                    trackers[name](record)
                except Exception as error:
                    del trackers[name]
                    print(f"step {record['step']:,}: {name} failed ({error}); the run goes on without it", file=sys.stderr, flush=True)

        yield write


@contextlib.contextmanager
def _tensorboard(run_dir: Path, tracking: TrackingConfig, config: dict[str, Any]) -> Iterator[Write]:
    module = _require("torch.utils.tensorboard", "tensorboard")
    writers: list[Any] = []

    def write(record: Record) -> None:
        step = int(record["step"])
        if not writers:  # with the first line one knows the step from which on files of a killed run are void
            writers.append(module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=step))
        for name, value in record.items():
            if name != "step":
                writers[0].add_scalar(name, value, step)
        writers[0].flush()

    try:
        yield write
    finally:
        for writer in writers:
            writer.close()


@contextlib.contextmanager
def _wandb(run_dir: Path, tracking: TrackingConfig, config: dict[str, Any]) -> Iterator[Write]:
    wandb = _require("wandb", "wandb")
    path = run_dir / "wandb-id"
    if not path.exists():
        replace_text(path, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))  # a sweep gives its points theirs
    place = {"project": tracking.wandb_project, "id": path.read_text().strip(), "name": run_dir.name, "dir": str(run_dir)}
    # offline there is no server to ask whether the run is there: parts of one id are joined by `wandb sync --append`
    resume = {"resume": "allow"} if tracking.wandb == "online" else {}
    try:
        run = wandb.init(**place, **resume, mode=tracking.wandb, config=config, settings=wandb.Settings(console="off"))
    except wandb.Error as error:
        raise ValueError(f"--tracking.wandb {tracking.wandb}: {error} Or use --tracking.wandb offline") from error
    ended = "finished"
    try:
        yield lambda record: run.log({k: v for k, v in record.items() if k != "step"}, step=int(record["step"]))
    except BaseException as error:
        ended = _ending(error)
        raise
    finally:
        with contextlib.suppress(Exception):  # the run has ended one way or the other, and wandb has no say in it
            run.finish(exit_code=int(ended.startswith(FAILED)))


TRACKERS: dict[str, Callable[[Path, TrackingConfig, dict[str, Any]], contextlib.AbstractContextManager[Write]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def _require(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{extra} is not installed: pip install -c constraints.txt -e '.[{extra}]'") from error


# ------------------------------------------------------------------------------------------------- words

PROGRESS_EVERY_S = 60


@contextlib.contextmanager
def train_log(run_dir: Path) -> Iterator[None]:
    """Whatever Python prints inside the block is appended to <run_dir>/train.log too, each line with its time.

    Of a progress bar, which is redrawn in place, a line a minute. The last line is how the block ended: "finished", "stopped", or
    "failed: " and the error, which has its traceback above. A log that cannot be written is given up in one line.
    Trap: what C libraries print passes by, and after SIGKILL there is no last line.
    """
    with open(run_dir / "train.log", "a", encoding="utf-8") as file:
        note = _noter(file)
        tees = _Tee(sys.stdout, note), _Tee(sys.stderr, note)
        with contextlib.redirect_stdout(tees[0]), contextlib.redirect_stderr(tees[1]):
            try:
                yield
            except BaseException as error:
                if not isinstance(error, SystemExit | KeyboardInterrupt):
                    note(*traceback.format_exc().splitlines())
                note(_ending(error))
                raise
            note("finished")


def _noter(file: TextIO) -> Callable[..., None]:
    def note(*lines: str) -> None:
        if file.closed:
            return
        try:
            file.writelines(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n" for line in lines)
            file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # what it could not flush
                file.close()
            print(f"train.log is given up: {error}", file=sys.__stderr__, flush=True)

    return note


def _ending(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in (REQUEUE_EXIT_CODE, 130)):
        return "stopped"
    if isinstance(error, SystemExit) and not error.code:
        return "finished"
    cause = (error.__context__ if isinstance(error, SystemExit) else None) or error
    return FAILED + " ".join(f"{type(cause).__name__}: {cause}".split())


class _Tee:
    """A text stream whose whole lines are noted as well; the rest of it is the stream's."""

    def __init__(self, stream: TextIO, note: Callable[..., None]) -> None:
        self.stream, self.note, self.line, self.noted = stream, note, "", time.monotonic()

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self.note(line.rpartition("\r")[2])
        drawn, _, self.line = self.line.rpartition("\r")
        if drawn.strip() and time.monotonic() - self.noted >= PROGRESS_EVERY_S:
            self.noted = time.monotonic()
            self.note(drawn.rpartition("\r")[2].strip())
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
