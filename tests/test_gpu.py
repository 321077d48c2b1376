"""What only a GPU can show: batches copied on their own stream, augmentation compiled, DALI decoding by nvJPEG. Skipped without one."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from cossl import train
from cossl.pipelines import make_loader
from cossl.pipelines.augment import augment, augment_tensors
from cossl.pipelines.batch import LoaderSpec, to_device
from cossl.pipelines.synthetic import SyntheticLoader
from cossl.pipelines.views import byol

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SPEC = LoaderSpec(byol(64), 16, workers=2)


def test_batches_arrive_whole_and_in_order(betons: Path) -> None:
    """Many small batches through one stream, each used at once: a copy that is not waited for, or memory reused too soon, shows."""
    loader, device = make_loader("ffcv", betons / "train.beton", SPEC), torch.device("cuda")
    for epoch in range(20):
        for here, there in zip(loader.epoch(epoch), to_device(loader.epoch(epoch), device), strict=True):
            assert here.memory.is_pinned()
            assert there.views[0].device.type == "cuda"
            torch.testing.assert_close(there.views[0].cpu(), here.views[0], rtol=0, atol=0)
            torch.testing.assert_close(there.boxes.cpu(), here.boxes, rtol=0, atol=0)
    loader.close()


def test_augmentation_waits_for_nothing_and_equals_the_cpus(betons: Path) -> None:
    loader = make_loader("ffcv", betons / "train.beton", SPEC)
    batch = next(loader.epoch(0))
    there = batch.to(torch.device("cuda"))
    augment(there.split()[0], there.photometry[:, 0])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [augment(view, there.photometry[:, v]) for v, view in enumerate(there.split())]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for v, (view, result) in enumerate(zip(batch.split(), results, strict=True)):
        assert result.is_contiguous(memory_format=torch.channels_last)
        difference = (augment_tensors(view, batch.photometry[:, v]) - result.cpu()).abs()
        assert np.quantile(difference.numpy(), 0.999) < 1e-3
    loader.close()


def test_dali_decodes_on_the_gpu(pictures: Path, betons: Path) -> None:
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    dali, reference = (make_loader(backend, pictures / "train", replace(SPEC, workers=1)) for backend in ("dali", "torch"))
    for ours, expected in zip(dali.epoch(0), reference.epoch(0), strict=True):
        assert ours.views[0].device.type == "cuda"
        assert torch.equal(ours.boxes.cpu(), expected.boxes)
        assert torch.equal(ours.label.cpu(), expected.label)
        error = (ours.views[0].cpu().float() - expected.views[0].float()).square().mean((2, 3, 4))
        assert (10 * torch.log10(255**2 / error)).min() > 30
    dali.close()


@pytest.mark.parametrize("flags", [(), ("--model.method", "dino", "--model.prototypes", "1024"), ("--precision", "bf16", "--compile")])
def test_the_trainers_step_waits_for_nothing(tmp_path: Path, flags: tuple[str, ...]) -> None:
    config, device = train.parse(["demo", "--batch-size", "16", *flags])[1], torch.device("cuda")
    model = train.build(config, device)
    loader = SyntheticLoader(None, LoaderSpec(config.views.specs(), 16, positions=train.position_specs(config, model)))
    state, forward = train.begin(config, model, loader, device, tmp_path)
    for turn, batch in zip(range(5), to_device(loader.epoch(0), device), strict=False):
        torch.cuda.set_sync_debug_mode("error" if turn > 2 else "default")  # the first ones compile
        try:
            train.step_(state, forward, batch, config, 1e-3, 0.99, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert state.window["loss"].isfinite()
