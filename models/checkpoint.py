"""The state of a run on disk: whole under some name at every instant, damage found, the one before at hand.

`last.pt` and `previous.pt` are the last two checkpoints, `epoch-0010.pt` and the like are kept for good, and gone on from where there is
nothing better. `next.pt` exists only between two system calls of `save`: left behind by a kill, it is the newest of all.
"""

import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cossl.models.co_ssl import CoSsl
from cossl.models.probe import OnlineProbe
from cossl.models.run_status import checkpoints


@dataclass
class State:
    """What the steps of a run change: all of it is in a checkpoint."""

    model: CoSsl
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    probe: OnlineProbe
    step: int = 0
    timed: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """[steps, seconds] so far, which `Meter` counts."""
    window: dict[str, Tensor] = field(default_factory=dict)
    """Sums of the terms since the last line of metrics.jsonl."""

    def save(self) -> dict[str, Any]:
        """Tensors and plain values."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler", "probe")}
        return parts | {"step": self.step, "timed": self.timed, "window": self.window}

    def load(self, saved: dict[str, Any], device: torch.device) -> None:
        """Becomes what was saved."""
        for name in ("model", "optimizer", "scaler", "probe"):
            getattr(self, name).load_state_dict(saved[name])
        self.step, self.timed, self.window = saved["step"], saved["timed"], {k: v.to(device) for k, v in saved["window"].items()}


def save(run_dir: str | os.PathLike[str], state: dict[str, Any], keep: int | None = None) -> None:
    """Makes `state` (tensors and plain values) the run's last checkpoint and the last one its previous; OSError as for `write`.

    keep: an epoch, under whose name (`epoch-0010.pt`) the state is written a second time, never to be replaced by later saves.

    A kill or power cut between any two system calls leaves a whole checkpoint under one of the names that `newest` reads, even where
    `last.pt` was damaged before, and no state that was to be kept is among these without being kept. Beside the kept ones up to three
    checkpoints need room at once.
    """
    run_dir = Path(run_dir)
    if keep is not None:  # first, as a run that goes on from this state does not come by its epoch again
        write(run_dir / f"epoch-{keep:04d}.pt", state)  # no link to the last one: `cp` onto `last.pt` would overwrite both
    write(run_dir / "next.pt", state)  # from here on it is the newest, so the others may be moved, whole or not
    if (run_dir / "last.pt").exists():
        _rename(run_dir / "last.pt", run_dir / "previous.pt")
    _rename(run_dir / "next.pt", run_dir / "last.pt")


def newest(run_dir: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """(newest whole state, the name of its file and, where newer files had to be passed over, why): "previous.pt, as last.pt is ...".

    ValueError of one line where the folder has no checkpoint, or none that is whole.
    """
    run_dir = Path(run_dir)
    passed_over: list[str] = []
    for name in checkpoints(run_dir):
        try:
            return _read(run_dir / name), ", as ".join([name, *passed_over])
        except ValueError as error:
            passed_over.append(f"{name} {error}")
    if not passed_over:
        raise ValueError(f"{run_dir / 'last.pt'} does not exist: there is nothing to resume, start without --resume")
    raise ValueError(f"{run_dir} has no checkpoint that can be read: {', '.join(passed_over)}; copy one from elsewhere, or start a new run")


def exists(run_dir: str | os.PathLike[str]) -> bool:
    """Whether there is a checkpoint to go on from, be it whole or not."""
    return any(checkpoints(Path(run_dir)))


def require_config(state: dict[str, Any], config: dict[str, Any], may_change: Collection[str], where: str | os.PathLike[str]) -> None:
    """Nothing, if `state["config"]` is `config` but for the keys that may change. ValueError naming each key that differs and its values.

    Both are flat ({"loss.local_weight": 0.3}); a key that only one of them has differs. `where` is the file that the message names.
    """
    then = state["config"]
    changed = [k for k in then | config if k not in may_change and (k not in then or k not in config or then[k] != config[k])]
    if changed:
        listing = ", ".join(f"--{k.replace('_', '-')} {then.get(k, 'absent')} (now {config.get(k, 'absent')})" for k in changed)
        raise ValueError(f"{where} is of another config, made with {listing}: resume with the same flags, or start a new run")


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes one file so that `path` is at every moment the old file or the new one, whole.

    The bytes go to `<path>.part` beside it, are forced to the disk, and take the name in one step. OSError where that fails: the old file
    is then untouched and the part removed. A killed process leaves a part, which the next write overwrites and nobody reads.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _rename(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        # torch's zip writer turns a full disk into a RuntimeError about its own file format.
        if isinstance(error, OSError | RuntimeError):
            raise OSError(f"{path} could not be written ({_first_line(error)}); what was there is untouched: free some space") from error
        raise


def load(path: str | os.PathLike[str], remedy: str = "give the run's own checkpoint, or start without --resume") -> dict[str, Any]:
    """The state in one file, on the CPU. ValueError naming the file where it is missing, cut off, damaged or no checkpoint.

    Every byte is compared with the checksums in the file. Reads tensors and plain values only: a pickle that carries code is refused, not
    run.
    """
    try:
        return _read(Path(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}; {remedy}") from error


def _read(path: Path) -> dict[str, Any]:
    """`load`, but a ValueError says only what is wrong with the file."""
    if not path.is_file():
        raise ValueError("does not exist or is no file")
    try:
        state = torch.load(_proved(path), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except pickle.UnpicklingError as error:
        raise ValueError("holds more than tensors and plain values, so it is refused unread") from error
    except Exception as error:  # a flipped bit in a zip header comes out as one of a dozen kinds, zlib.error among them
        raise ValueError(f"is no whole checkpoint of this program ({_first_line(error)})") from error
    return state


def _proved(path: Path) -> io.BytesIO:
    """The archive written anew, in memory, of its parts, if every byte of them is what was written. Else an error of one of a dozen kinds.

    Anew, since a header can be damaged so that the reader which proves a part and torch's own find it in different places.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch would read what comes before an archive, and of the kind that it wrote years ago
            raise ValueError("it does not begin as an archive")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        # As torch writes them; a packed part, or parts that lie over each other, could be a thousand times as large as the file.
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("its parts are larger than it is")
        if len({part.filename for part in parts}) < len(parts):
            raise ValueError("two of its parts have one name")
        anew = io.BytesIO()
        with zipfile.ZipFile(anew, "w", zipfile.ZIP_STORED) as copy:
            for part in parts:
                copy.writestr(part.filename, archive.read(part))  # BadZipFile, with its name, if the checksum is another
    anew.seek(0)
    return anew


def _rename(path: Path, name: Path) -> None:
    """Renames a file and forces the folder to the disk; without that a power cut can undo the renaming."""
    os.replace(path, name)
    directory = os.open(name.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _first_line(error: BaseException) -> str:
    """Of what it says, shortened and without what a terminal would obey: a file's own words may be in it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return "".join(letter if letter.isprintable() else "?" for letter in line[:200])
