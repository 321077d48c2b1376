"""A checkpoint is whole or absent, and is read without running code."""

import os
import pickle
import re
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
