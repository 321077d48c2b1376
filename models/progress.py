"""What a run tells while it trains: the lines of metrics.jsonl, and progress on stderr."""

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from cossl.models.co_ssl import effective_rank
from cossl.models.parallel import Ranks
from cossl.models.run_status import has_collapsed


class Log:
    """The lines of metrics.jsonl: means since the line before, over the steps that counted and over all ranks."""

    def __init__(self, writers: Sequence[Callable[[dict[str, float]], None]], steps_per_epoch: int, ranks: Ranks) -> None:
        """`writers` take a line; other ranks than the first have none."""
        self._writers, self.steps_per_epoch, self.ranks, self.collapsed = writers, steps_per_epoch, ranks, False

    def write(self, window: dict[str, Tensor], step: int, shown: dict[str, float]) -> dict[str, float]:
        """The means of a window's sums, which become a line together with what is `shown`; every rank has to call it.

        Trap: here, and only here, the host waits for the device. RuntimeError naming steps and terms if one is not finite.
        """
        window = {name: self.ranks.gather(term[None]).mean(0) for name, term in window.items()}
        covariance = window.pop("covariance")
        sums = dict(zip(window, torch.stack(list(window.values())).tolist(), strict=True))
        count, skipped = sums.pop("steps"), sums.pop("skipped")
        between = f"between steps {step - count - skipped + 1:.0f} and {step}"
        record = {name: value / count if count else float("nan") for name, value in sums.items()}
        bad = [name for name, value in record.items() if not abs(value) < float("inf")]
        if bad:
            raise RuntimeError(f"{', '.join(bad)} not finite {between}: the last checkpoint is whole; lower --optim.base-lr")
        record |= {"rank": effective_rank(covariance / count)} | ({"skipped": skipped} if skipped else {})
        self.note(step, record | shown)
        if self.ranks.rank == 0:
            self._warn(step, record)
        return record

    def note(self, step: int, values: dict[str, float]) -> None:
        """A line of its own."""
        for write in self._writers:
            write({"step": step, "epoch": step / self.steps_per_epoch, **values})

    def _warn(self, step: int, record: dict[str, float]) -> None:
        before, self.collapsed = self.collapsed, has_collapsed(record["std"], record["rank"])
        if self.collapsed and not before:
            shape = f"spread {record['std']:.2f}, rank {record['rank']:.1f}"
            print(f"step {step:,}: the projections collapsed ({shape}); try --model.output-norm, a lower --optim.base-lr", flush=True)


class Meter:
    """Pictures per second, checkpoints included but no pause and no first step after a start (it compiles), and progress on stderr.

    Adds to `timed`, which is [steps, seconds] and travels in the checkpoint. Progress is a bar, or a line every 15 s without a terminal.
    """

    def __init__(self, total: int, step: int, timed: list[float], batch_size: int, silent: bool) -> None:
        self.batch_size, self.timed, self.silent = batch_size, timed, silent
        self.bar = tqdm(total=total, initial=step, unit="step", disable=silent or not sys.stderr.isatty(), dynamic_ncols=True)
        self.last: float | None = None
        self.reported = time.perf_counter()

    def tick(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self.last is not None:
            self.timed[0] += 1
            self.timed[1] += now - self.last
        self.last = now
        self.bar.update()

    def pause(self) -> None:
        """The time until the next step does not count, nor does that step."""
        self.last = None

    def rate(self) -> float:
        """Pictures per second."""
        return self.timed[0] * self.batch_size / max(self.timed[1], 1e-9)

    def report(self, record: dict[str, float], step: int, epoch: int, epochs: int) -> None:
        """Shows where the run is; without a terminal at most every 15 s."""
        text = f"epoch {epoch + 1}/{epochs}  loss {record['loss']:.3f}  spread {record['std']:.2f}  {self.rate():,.0f} pictures/s"
        if not self.bar.disable:
            self.bar.set_description(text)
        elif not self.silent and (time.perf_counter() - self.reported > 15 or step == self.bar.total):
            self.reported = time.perf_counter()
            left = (self.bar.total - step) * self.batch_size / max(self.rate(), 1e-9)
            print(f"{text}  {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


@contextmanager
def manual_gc() -> Iterator[None]:
    """Garbage is collected when a checkpoint is written and not in the middle of a step, at another moment on every rank."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
