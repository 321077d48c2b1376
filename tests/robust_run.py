"""A small run that `cossl robustness` is asked of, and the same numbers by other means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cossl
from cossl import train
from cossl.models.features import features
from cossl.models.probe import fit_probe
from cossl.pipelines import make_loader
from cossl.pipelines.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from cossl.pipelines.batch import LoaderSpec
from cossl.pipelines.views import evaluation
from cossl.tools.opened import open_run
from cossl.tools.robustness import robustness_main
from cossl.tools.robustness_judge import Judge

SMALL = (
    "--epochs 1 --batch-size 16 --log-every 1 --views.size-px 16 --eval-px 32 --model.width 8 --model.receptive-field 9"
    " --model.hidden-dim 16 --model.out-dim 8 --optim.warmup-epochs 0.5 --loader.backend torch --loader.workers 0 --device cpu"
).split()
FEW = "--eps 0.003 0.1 --eps-l2 0.1 --steps 3 --shares 0 0.5 --crop-fracs 0.5 1 --crop-px 16".split()


def alike(pictures: Path, folder: Path) -> Path:
    """80 pictures, train and val alike, so that a head knows most of them."""
    for split in ("train", "val"):
        (folder / split).symlink_to(pictures / "train")
    return folder


def trained(data: Path, folder: Path) -> Path:
    """A run of one epoch of 5 steps."""
    run_dir = folder / "one"
    train.main(["demo", "--data", str(data), "--run-dir", str(run_dir), *SMALL])
    return run_dir


def ask(run_dir: Path, *flags: str, families: tuple[str, ...] = ("pgd", "internal", "crop")) -> None:
    robustness_main([str(run_dir), "--families", *families, *FEW, *flags])


def found(run_dir: Path, family: str) -> dict[str, Any]:
    return json.loads((run_dir / "robustness" / f"{family}.json").read_text())


def top1s(result: dict[str, Any]) -> dict[tuple[Any, ...], float]:
    return {tuple(row[:3]): row[3] for row in result["table"]["rows"]}


class Independent:
    """The run's encoder and a head of its own, by other means than the command's."""

    def __init__(self, run_dir: Path, data: Path) -> None:
        self.encoder, self.data = cossl.load(run_dir), data
        (x, label) = features({"run": self.encoder}, self.batches("train"))
        self.probe = fit_probe(x["run"], label)

    def batches(self, split: str, px: int = 32, centre_frac: float = 0.875) -> list[tuple[Tensor, Tensor, Tensor]]:
        loader = make_loader("torch", self.data / split, LoaderSpec(evaluation(px, centre_frac), 1000, workers=0, shuffle=False))
        return [(batch.split()[0], normalize(batch.split()[0]), batch.label) for batch in loader.epoch(0)]

    def logits(self, x: Tensor) -> Tensor:
        """Of pictures in [0, 1]."""
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
        return self.probe.logits(self.encoder((x - mean) / std)[0])


def percent(logits: Tensor, label: Tensor) -> float:
    return 100 * (logits.argmax(1) == label).double().mean().item()


def judge_of(run_dir: Path, **changes: Any) -> Judge:
    run = open_run(run_dir, "cpu")
    assert run.config.data is not None
    return Judge(
        **{"run": run, "data": run.config.data, "pictures": 0, "probe_pictures": 0, "seed": 0, "batch_size": 64, "workers": 0} | changes
    )


def copied(run_dir: Path, folder: Path) -> Path:
    """The run alone, without results."""
    folder.mkdir()
    for name in ("config.json", "last.pt"):
        (folder / name).write_bytes((run_dir / name).read_bytes())
    return folder
