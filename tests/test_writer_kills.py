"""The writer: no kill at any moment changes a byte, and what was begun is gone on with."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from ninety_pictures import content, ninety_pictures, undisturbed
from PIL import Image

import cossl.pipelines.beton_writer as writer
import cossl.pipelines.convert as conversion
from cossl.pipelines.beton import Beton
from cossl.pipelines.beton_partial import Partial, Shard
from cossl.pipelines.convert import FolderRows, convert
from cossl.tools import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ninety_pictures(tmp_path_factory.mktemp("source") / "pictures")


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    return undisturbed(folder, tmp_path_factory.mktemp("expected") / "set.beton")


class SlowRows(FolderRows):
    """Slow enough that a kill finds it at work."""

    seconds = 0.002

    def __getitem__(self, i: int):
        time.sleep(self.seconds)
        return super().__getitem__(i)


def start(folder: Path, out: Path, prepare: Callable[[], object], **options) -> multiprocessing.process.BaseProcess:
    """A conversion in a process group of its own, slow enough to be killed."""

    def run() -> None:
        os.setsid()
        conversion.FolderRows = SlowRows
        prepare()
        convert(folder, out, mode="proportion", num_workers=2, progress=False, **options)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def kill_when(process: multiprocessing.process.BaseProcess, ready: Callable[[], bool], by: signal.Signals = signal.SIGKILL) -> None:
    """A signal for the whole group as soon as `ready`."""
    assert process.pid is not None
    while os.getpgid(process.pid) != process.pid or not ready():
        assert process.is_alive()
        time.sleep(0.0005)
    os.killpg(process.pid, by)
    process.join()


def journaled(out: Path) -> int:
    """Shards in the journal of the unfinished conversion; the first line says of what."""
    journal = out.with_name(f".{out.name}.partial") / "journal"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def _grown(out: Path, before: int) -> bool:
    return journaled(out) > before


def test_kills_at_many_moments_change_nothing(folder, tmp_path, expected):
    out, kills = tmp_path / "set.beton", 0
    kill_when(start(folder, out, lambda: None), lambda: out.with_name(".set.beton.partial").exists())
    while (before := journaled(out)) < 5:
        kill_when(start(folder, out, lambda: None, resume=True), partial(_grown, out, before))
        assert [path.name for path in tmp_path.iterdir()] == [".set.beton.partial"]
        kills += 1
    assert kills >= 2
    convert(folder, out, mode="proportion", num_workers=3, resume=True, progress=False)
    assert content(out) == expected


def _die() -> None:
    os.killpg(0, signal.SIGKILL)


def _before(name: str, module=os, nth: int = 1) -> Callable[[], None]:
    """Makes the nth call of a function the end of the whole process group."""

    def prepare() -> None:
        function, calls = getattr(module, name), []

        def trapped(*args, **kwargs):
            calls.append(args)
            if len(calls) == nth:
                _die()
            return function(*args, **kwargs)

        setattr(module, name, trapped)

    return prepare


MOMENTS = {
    "before the tables": _before("_finish", writer),
    "among the tables": _before("_head", writer),
    "before the first sync": _before("fsync"),
    "before the last sync": _before("_sync", conversion, 2),
    "before the manifest has its name": _before("replace"),
    "before the beton has its name": _before("replace", nth=2),
    "before the folder is synced": _before("_sync", conversion, 3),
    "before the journal is removed": _before("close", Partial),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_the_end_changes_nothing(moment, folder, tmp_path, expected):
    out = tmp_path / "set.beton"
    process = start(folder, out, MOMENTS[moment])
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if out.exists():
        assert out.read_bytes() == expected[0]
    convert(folder, out, mode="proportion", num_workers=2, resume=True, progress=False)
    assert content(out) == expected


@pytest.fixture
def killed(folder, tmp_path) -> Path:
    """The target of a conversion that was killed with at least three shards done."""
    out = tmp_path / "set.beton"
    kill_when(start(folder, out, lambda: None), lambda: journaled(out) >= 3)
    return out


@pytest.mark.parametrize(
    "damage", ["first shard", "last shard", "cut beton", "no beton", "torn line", "line without end", "line of zeros", "other row"]
)
def test_what_a_power_failure_tore_is_done_again(damage, killed, folder, expected, monkeypatch):
    beton, journal = (killed.with_name(f".{killed.name}.partial") / name for name in ("beton", "journal"))
    lines = journal.read_bytes().splitlines(keepends=True)
    shards = [json.loads(line.partition(b" ")[2]) for line in lines[1:] if line.endswith(b"\n")]
    data = bytearray(beton.read_bytes())
    trusted = len(shards)
    if damage == "first shard":
        data[shards[0]["start"] + 5] ^= 1
        trusted = 0
    elif damage == "last shard":
        data[shards[-1]["end"] - 1] ^= 1
        trusted -= 1
    elif damage == "cut beton":
        del data[shards[2]["end"] - 3 :]
        trusted = 2
    elif damage == "torn line":
        lines[-1] = lines[-1][: len(lines[-1]) // 2]
        trusted = len(lines) - 2
    elif damage == "line without end":
        lines[-1] = lines[-1].removesuffix(b"\n")
        trusted = len(lines) - 2
    elif damage == "line of zeros":
        lines[2] = bytes(len(lines[2]) - 1) + b"\n"
        trusted = 1
    elif damage == "other row":  # the bytes of its shard are as they were
        lines[2] = lines[2].replace(b"[0,", b"[1,", 1)
        trusted = 1
    beton.write_bytes(data)
    journal.write_bytes(b"".join(lines))
    if damage == "no beton":
        beton.unlink()
        trusted = 0
    asked: list[int] = []

    def watched(partial: Partial, *rest, **more):
        asked.append(len(partial.shards))
        return writer.write_rows(partial, *rest, **more)

    monkeypatch.setattr(conversion, "write_rows", watched)
    convert(folder, killed, mode="proportion", num_workers=2, resume=True, progress=False)
    assert asked == [trusted]
    assert content(killed) == expected


@pytest.mark.parametrize("first", [b"\0\0\0\n", b"[]\n", b"\xff\n"])
def test_a_journal_that_cannot_be_read_is_said_with_the_remedy(first, killed, folder, expected):
    journal = killed.with_name(f".{killed.name}.partial") / "journal"
    journal.write_bytes(first + b"".join(journal.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"journal.* does not say what was converted; --force starts again"):
        convert(folder, killed, mode="proportion", resume=True, progress=False)
    convert(folder, killed, mode="proportion", overwrite=True, progress=False)
    assert content(killed) == expected


def test_an_unfinished_conversion_is_not_lost_by_a_slip(killed, folder, expected):
    for options, message in [
        ({}, r"holds an unfinished conversion; --resume goes on with it, --force starts again"),
        ({"resume": True, "mode": "raw"}, r"other pictures or options \(mode proportion is now raw\)"),
        ({"resume": True, "jpeg_fraction": 0.7}, r"jpeg_fraction 0.5 is now 0.7"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(folder, killed, **{"mode": "proportion", **options}, num_workers=1, progress=False)
        assert journaled(killed) >= 3
    convert(folder, killed, overwrite=True, num_workers=1, progress=False)
    clean = content(killed)
    convert(folder, killed, overwrite=True, num_workers=1, progress=False)
    assert content(killed) == clean  # nothing of the larger, unfinished one is left between the payloads


def test_the_second_converter_on_a_target_is_refused(folder, tmp_path, expected, monkeypatch, capfd):
    out = tmp_path / "set.beton"
    monkeypatch.setattr("cossl.pipelines.beton_partial.LOCK_PATIENCE_S", 0.05)
    first = start(folder, out, lambda: None)
    while not journaled(out):
        time.sleep(0.001)
    assert first.pid is not None
    os.killpg(first.pid, signal.SIGSTOP)
    try:
        for flags in ([], ["--resume"], ["--force"]):
            monkeypatch.setattr(sys, "argv", ["cossl", "convert", str(folder), str(out), "--mode", "proportion", *flags])
            with pytest.raises(SystemExit):
                cli.main()
            said = capfd.readouterr().err.splitlines()
            assert len(said) == 1
            assert "another conversion is at work in" in said[0]
    finally:
        os.killpg(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0
    assert content(out) == expected


def test_a_disk_without_locks_is_said(folder, tmp_path, expected, monkeypatch, capfd):
    def refused(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    convert(folder, tmp_path / "set.beton", mode="proportion", num_workers=2, progress=False)
    assert "knows no locks" in capfd.readouterr().err
    assert content(tmp_path / "set.beton") == expected


def test_workers_of_a_killed_command_end_and_free_the_lock(folder, tmp_path, expected, monkeypatch):
    out = tmp_path / "set.beton"
    monkeypatch.setattr("cossl.pipelines.beton_partial.LOCK_PATIENCE_S", 0.5)
    process = start(folder, out, lambda: setattr(SlowRows, "seconds", 0.05))
    while not journaled(out):
        time.sleep(0.001)
    process.kill()  # not its group
    process.join()
    convert(folder, out, mode="proportion", num_workers=1, resume=True, progress=False)
    assert content(out) == expected


def test_an_interrupt_right_after_the_first_line_of_the_journal_keeps_it(folder, tmp_path, monkeypatch):
    out = tmp_path / "set.beton"

    def interrupted(partial: Partial, shard: Shard) -> None:
        partial._append(shard._asdict())
        raise KeyboardInterrupt

    monkeypatch.setattr(Partial, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, num_workers=1, progress=False)
    assert journaled(out) == 1


def test_an_interrupt_keeps_what_is_done_and_says_so(folder, tmp_path, expected, capfd, monkeypatch):
    """Ctrl-C in a terminal: SIGINT for the command and all of its processes."""
    out, run = tmp_path / "set.beton", multiprocessing.process.BaseProcess.run

    def interrupted_run(worker: multiprocessing.process.BaseProcess) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # as early as a worker can hear it
        run(worker)

    def command() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with SIGINT ignored
        multiprocessing.process.BaseProcess.run = interrupted_run
        conversion.FolderRows = SlowRows
        sys.argv = ["cossl", "convert", str(folder), str(out), "--mode", "proportion", "--workers", "2"]
        cli.main()

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    kill_when(process, lambda: journaled(out) > 0, signal.SIGINT)
    assert process.exitcode == 130
    assert capfd.readouterr().err.splitlines() == ["cossl convert: interrupted; --resume goes on with what is done"]
    assert journaled(out) >= 1
    convert(folder, out, mode="proportion", num_workers=1, resume=True, progress=False)
    assert content(out) == expected


def test_resuming_what_is_finished_does_nothing(folder, tmp_path):
    out = tmp_path / "set.beton"
    first = convert(folder, out, num_workers=1, progress=False)
    before = out.stat()
    again = convert(folder, out, num_workers=1, resume=True, progress=False)
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (again.num_rows, again.stored, again.quarantined) == (first.num_rows, first.stored, first.quarantined)
    with pytest.raises(ValueError, match="exists, of other pictures or options; --force"):
        convert(folder, out, mode="raw", num_workers=1, resume=True, progress=False)


def test_conversion_needs_no_ffcv(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    assert convert(folder, tmp_path / "set.beton", num_workers=1, progress=False).num_rows == 87
    assert isinstance(Beton(tmp_path / "set.beton").open(0), Image.Image)
