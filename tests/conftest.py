"""Generated pictures that several tests share; nothing is downloaded and no real picture is needed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from cossl.pipelines.convert import convert
from cossl.pipelines.demo_set import make_demo_set

# tqdm's own lock is shared with forked processes: one that a test kills while it holds it would stop all others for good.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # its thread could hold the lock during a fork
torch.set_num_threads(1)  # on a busy machine two threads wait for each other: a test of 2 s then takes 27 s


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (80 pictures) and val/ (40), ten classes."""
    return make_demo_set(tmp_path_factory.mktemp("cache"), count=(80, 40))


@pytest.fixture(scope="session")
def betons(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures as train.beton and val.beton."""
    folder = tmp_path_factory.mktemp("betons")
    for split in ("train", "val"):
        convert(pictures / split, folder / f"{split}.beton", num_workers=1, progress=False)
    return folder
