"""A checkpoint is whole or absent, is read without running code, and the one before is there when the last is damaged."""

import itertools
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cossl.models import checkpoint

STATE: dict[str, Any] = {"step": 7, "model": {"w": torch.arange(5000.0)}, "config": {"name": "a", "list": [1, None, True, 0.5]}}


def assert_is_state(state: dict[str, Any]) -> None:
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])
    assert {k: v for k, v in state.items() if k != "model"} == {k: v for k, v in STATE.items() if k != "model"}


def test_round_trip_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.write(path, {"old": 1})
    checkpoint.write(path, STATE)
    assert_is_state(checkpoint.load(path))
    assert os.listdir(tmp_path) == ["last.pt"]


def test_optimizer_and_generator_states_can_be_read_back(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()}
    checkpoint.write(tmp_path / "last.pt", state)
    loaded = checkpoint.load(tmp_path / "last.pt")
    optimizer.load_state_dict(loaded["optimizer"])
    assert torch.equal(loaded["generator"], state["generator"])


@pytest.mark.parametrize("failure", ["write", "fsync", "replace"])
def test_failing_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    path = tmp_path / "last.pt"
    checkpoint.write(path, STATE)
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def half(_: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        full()

    with monkeypatch.context() as patch:
        if failure == "write":
            patch.setattr(torch, "save", half)
        else:
            patch.setattr(os, failure, full)
        with pytest.raises(OSError, match=r"last.pt could not be written .*No space left.* free some space"):
            checkpoint.write(path, {"new": 1})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk_is_an_oserror(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.write(path, STATE)
    (tmp_path / "last.pt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"last.pt could not be written"):
        checkpoint.write(path, {"w": torch.zeros(100_000)})
    assert_is_state(checkpoint.load(path))
    assert os.listdir(tmp_path) == ["last.pt"]


def test_kill_in_the_middle_keeps_the_old_file_and_the_next_save_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.write(path, STATE)
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os._exit(9)  # dies between the last byte and the renaming
        checkpoint.write(path, {"new": 1})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "last.pt.part"]
    assert_is_state(checkpoint.load(path))
    checkpoint.write(path, {"new": 1})
    assert os.listdir(tmp_path) == ["last.pt"]
    assert checkpoint.load(path) == {"new": 1}


def test_unwritable_state_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.write(path, STATE)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        checkpoint.write(path, {"function": lambda: 1})
    assert_is_state(checkpoint.load(path))
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_cut_off_file_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.pt"
    checkpoint.write(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is no whole checkpoint.*--resume") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.write(path, STATE)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"no whole checkpoint.*(damaged|CRC)"):
        checkpoint.load(path)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt holds more than tensors and plain values"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_foreign_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    for name, message in (
        ("notes.txt", "no whole checkpoint"),
        ("list.pt", "it holds a list"),
        ("pickle.pt", "no whole checkpoint"),
        ("missing.pt", "does not exist"),
        ("", "is no file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            checkpoint.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


# ------------------------------------------------------------------------------------------------- the last two, and some for good


def at(step: int) -> dict[str, Any]:
    return {"step": step, "w": torch.full((3000,), float(step))}


def newest_step(run_dir: Path) -> int:
    state = checkpoint.newest(run_dir)[0]
    assert torch.equal(state["w"], at(state["step"])["w"])
    return state["step"]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def in_child(work: Callable[[], None]) -> int:
    """Exit code of a forked child that does it: 0 where it comes to the end, minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_last_two_are_kept_and_those_that_were_asked_for(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, at(step), keep=step if step % 2 == 0 else None)
    steps = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"last.pt": 5, "previous.pt": 4, "epoch-0002.pt": 2, "epoch-0004.pt": 4}
    assert checkpoint.newest(tmp_path)[1] == "last.pt"


def test_a_damaged_last_gives_way_to_the_one_before_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"last.pt does not exist: there is nothing to resume"):
        checkpoint.newest(tmp_path)
    for step in (1, 2):
        checkpoint.save(tmp_path, at(step))
    damage(tmp_path / "last.pt")
    state, found = checkpoint.newest(tmp_path)
    assert state["step"] == 1
    assert re.fullmatch(r"previous.pt, as last.pt is no whole checkpoint of this program \(.*\)", found)
    damage(tmp_path / "previous.pt")
    with pytest.raises(
        ValueError, match=r"no checkpoint that can be read: last.pt is no .*, previous.pt is no .*start a new run"
    ) as caught:
        checkpoint.newest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_from_a_kept_one_where_there_is_nothing_better(tmp_path: Path) -> None:
    """As a kill in the first save leaves it, or somebody who made room."""
    for epoch in (9998, 9999, 10000):
        checkpoint.save(tmp_path, at(epoch), keep=epoch)
    damage(tmp_path / "last.pt")
    (tmp_path / "previous.pt").unlink()
    assert newest_step(tmp_path) == 10000
    (tmp_path / "last.pt").unlink()
    (tmp_path / "epoch-10000.pt").unlink()
    assert (newest_step(tmp_path), checkpoint.newest(tmp_path)[1]) == (9999, "epoch-9999.pt")
    assert checkpoint.exists(tmp_path)


def test_no_flipped_bit_changes_what_is_read(tmp_path: Path) -> None:
    """Anywhere in the file, zip headers included: found, or without effect."""
    path, rng = tmp_path / "last.pt", random.Random(0)
    checkpoint.write(path, at(3))
    whole, found = path.read_bytes(), 0
    ends = [*range(300), *range(len(whole) - 700, len(whole))]
    for position in [*rng.sample(ends, 150), *rng.choices(range(len(whole)), k=100)]:
        content = bytearray(whole)
        content[position] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            assert newest_step(tmp_path) == 3
        except ValueError:
            found += 1
    assert found > 100
    for method in (8, 12, 14, 99):  # bytes that were stored taken for compressed ones
        content = bytearray(whole)
        content[whole.index(b"PK\x01\x02") + 10] = method
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no whole checkpoint"):
            checkpoint.load(path)


def kill_at_call(number: int) -> None:
    """From here on this process dies instead of its call `number`, from 0, of those that touch the folder."""
    calls = itertools.count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    for name in ("open", "fsync", "replace", "close"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("keep", [None, 3])
@pytest.mark.parametrize("last_is_whole", [True, False])
def test_a_kill_before_any_system_call_leaves_a_whole_checkpoint(tmp_path: Path, last_is_whole: bool, keep: int | None) -> None:
    """And never goes on from a state that was to be kept and is not."""
    start, steps, code = tmp_path / "start", [], -1
    start.mkdir()
    for step in (1, 2):
        checkpoint.save(start, at(step))
    if not last_is_whole:
        damage(start / "last.pt")
    while code:
        run_dir = shutil.copytree(start, tmp_path / str(len(steps)))
        code = in_child(lambda: (kill_at_call(len(steps)), checkpoint.save(run_dir, at(3), keep)))  # noqa: B023
        steps.append(newest_step(run_dir))
        assert not keep or steps[-1] < 3 or (run_dir / "epoch-0003.pt").exists()
        if steps[-1] < 3:
            checkpoint.save(run_dir, at(3), keep)
        checkpoint.save(run_dir, at(4))
        assert newest_step(run_dir) == 4
        assert sorted(os.listdir(run_dir)) == [*(["epoch-0003.pt"] if keep else []), "last.pt", "previous.pt"]
        assert not keep or checkpoint.load(run_dir / "epoch-0003.pt")["step"] == 3
    assert steps == sorted(steps)
    assert set(steps) == {newest_step(start), 3}
    assert len(steps) > 10


def test_kills_at_random_moments_lose_no_save_that_returned(tmp_path: Path) -> None:
    rng = random.Random(0)
    checkpoint.save(tmp_path, at(0))
    for _ in range(20):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for step in itertools.count(newest_step(tmp_path) + 1):
                    checkpoint.save(tmp_path, at(step), keep=step % 3)
                    os.write(write, step.to_bytes(4, "little"))
            finally:
                os._exit(1)
        os.close(write)
        with open(read, "rb", buffering=0) as pipe:
            returned = pipe.read(4)
            time.sleep(rng.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            returned += pipe.read()
        assert returned
        assert newest_step(tmp_path) >= int.from_bytes(returned[-4:], "little")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on a disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", disk], check=True)


def assert_full(run_dir: Path) -> None:
    with pytest.raises(OSError, match=r"next.pt could not be written .*untouched: free some space"):
        checkpoint.save(run_dir, {"step": 3, "w": torch.zeros(100_000)})


def test_a_full_disk_keeps_both_checkpoints(small_disk: Path) -> None:
    for step in (1, 2):
        checkpoint.save(small_disk, at(step))
    assert_full(small_disk)
    assert {path.name: checkpoint.load(path)["step"] for path in small_disk.iterdir()} == {"last.pt": 2, "previous.pt": 1}
    checkpoint.save(small_disk, at(3))
    assert newest_step(small_disk) == 3


def test_a_file_size_limit_keeps_the_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, at(1))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert in_child(lambda: (resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1])), assert_full(tmp_path))) == 0
    assert newest_step(tmp_path) == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_another_config_is_refused_with_every_key_that_differs() -> None:
    state = {"config": {"a": 1, "loss.local_weight": 0.3, "gone": 2, "data": "x"}}
    checkpoint.require_config(state, {"a": 1, "loss.local_weight": 0.3, "gone": 2, "data": "y"}, ["data"], "last.pt")
    with pytest.raises(ValueError, match=r"last.pt is of another config") as caught:
        checkpoint.require_config(state, {"a": 1, "loss.local_weight": 0.5, "new": None, "data": "y"}, ["data"], "last.pt")
    assert "--loss.local-weight 0.3 (now 0.5), --gone 2 (now absent), --new absent (now None): resume" in str(caught.value)
