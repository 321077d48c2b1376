"""The state of a run in one file that is either whole or absent."""

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes `state` (tensors and plain values) so that `path` is at every moment the old file or the new one, whole.

    The bytes go to `<path>.part` beside it, are forced to the disk, and take the name in one step. OSError where that fails: the old file
    is then untouched and the part removed. A killed process leaves a part, which the next save overwrites and `load` never reads.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        # torch's zip writer turns a full disk into a RuntimeError about its own file format.
        if isinstance(error, OSError | RuntimeError):
            raise OSError(f"{path} could not be written ({_first_line(error)}); what was there is untouched: free some space") from error
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # without it a power cut can undo the renaming
    finally:
        os.close(directory)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that `save` wrote, on the CPU. ValueError naming the file where it is missing, cut off, damaged or no checkpoint.

    Reads tensors and plain values only: a pickle that carries code is refused, not run.
    """
    path = Path(path)
    remedy = "give the run's own last checkpoint, or start without --resume"
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file; {remedy}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its part {damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, so it is refused unread; {remedy}") from error
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no whole checkpoint of this program ({_first_line(error)}); {remedy}") from error
    return state


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
