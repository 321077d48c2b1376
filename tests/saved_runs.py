"""Run folders with random weights, for the tests that open them: nothing is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cossl.models import checkpoint
from cossl.models.co_ssl import CoSsl, ModelConfig
from cossl.models.flags import flatten
from cossl.train import PRESETS, Config


def config_of(model: ModelConfig) -> Config:
    return replace(PRESETS["demo"](), model=model)


_SMALL = replace(PRESETS["demo"]().model, hidden_dim=24, out_dim=16)
DEMO = config_of(_SMALL)
NETWORKS = {
    "demo": DEMO,
    "resnet18": config_of(replace(_SMALL, backbone="resnet18", receptive_field=None, width=64)),
    "rf_resnet18 of 64 channels": config_of(replace(_SMALL, width=64, receptive_field=29)),
    "rf_resnet50 of 8 channels": config_of(replace(_SMALL, backbone="rf_resnet50", receptive_field=99, width=8, mlp_after_pool=2)),
    "rf_resnet50 of 64 channels": config_of(replace(_SMALL, backbone="rf_resnet50", receptive_field=99, width=64, mlp_after_pool=1)),
    "resnet50": config_of(replace(_SMALL, backbone="resnet50", receptive_field=None, width=64)),
}


def network_of(config: Config, seed: int = 0) -> CoSsl:
    """Its networks, whose batch norms have statistics of their own, as after a training."""
    torch.manual_seed(seed)
    model = CoSsl(config.model, config.loss)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.normal_(module.bias, 0, 0.1)
    return model


def run_of(config: Config, folder: Path, preset: str = "demo") -> Path:
    """A run's folder with config.json and last.pt, of step 7; the checkpoint has what an encoder is made of."""
    folder.mkdir(parents=True)
    weights = {key: value for key, value in network_of(config).state_dict().items() if key.startswith("online.")}
    checkpoint.write(folder / "last.pt", {"model": weights, "config": flatten(config), "step": 7})
    (folder / "config.json").write_text(json.dumps({"preset": preset} | flatten(config)))
    return folder
