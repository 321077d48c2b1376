"""A trained backbone from a run: pictures in, global vectors and the map of local ones out. `cossl.load` is `load` of this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cossl.models import checkpoint
from cossl.models.co_ssl import ModelConfig, Network
from cossl.models.flags import unflatten

HEADS = ("projector.", "predictors.", "local_projector.", "local_predictors.")


class Encoder(nn.Module):
    """The online network's backbone, pooling and MLP after it, frozen, in eval mode; with its heads if they were asked for."""

    def __init__(self, network: Network, config: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.eval().requires_grad_(False)

    def forward(self, x: Float[Tensor, "b 3 s s"]) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c n n"]]:
        """(global vectors Y, feature map y) of pictures normalized by ImageNet's mean and deviation (`cossl.pipelines.augment.normalize`).

        `Y` is what `cossl eval` probes; `y[:, :, i, j]` is the local vector of position (i, j), before the MLP that Y has passed.
        """
        y = self.network.backbone(x)
        return self.network.pool(y), y

    def represent(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c"]:
        """The global vectors alone."""
        return self(x)[0]

    def train(self, mode: bool = True) -> Encoder:
        """Stays in eval mode: its batch norms keep the statistics they were trained with. To train it, use `.network`."""
        return super().train(False)


def load(path: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """The encoder of a run's folder, of one of its checkpoints, or of what `cossl export` wrote. ValueError of one line for anything else.

    Reads tensors and plain values only: nothing in a file is executed. Of a run's folder the newest whole checkpoint counts.
    """
    path = Path(path)
    if (path / "backbone.safetensors").exists():
        config, weights = _exported(path)
    elif path.is_dir() and not checkpoint.exists(path):
        raise ValueError(
            f"{path} holds neither a checkpoint nor an export: give a run's folder, a checkpoint, or what `cossl export` wrote"
        )
    else:
        state = checkpoint.newest(path)[0] if path.is_dir() else checkpoint.load(path, "give a run's folder or one of its checkpoints")
        config, weights = of_checkpoint(state, path)
    model = unflatten(ModelConfig, {key.removeprefix("model."): value for key, value in config.items() if key.startswith("model.")})
    with torch.device("meta"):
        network = Network(model, local=any(key.startswith("local_projector.") for key in weights))
    try:
        missing, unknown = network.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own config: {str(error).splitlines()[-1].strip()}") from error
    needed = [key for key in missing if not key.startswith(HEADS)]
    if needed or unknown:
        raise ValueError(f"{path} does not fit its own config: {(needed + unknown)[0]} is {'missing' if needed else 'unknown'}")
    for name in {key.partition(".")[0] for key in missing}:
        setattr(network, name, None)  # an export without heads
    return Encoder(network, config).to(device).to(memory_format=torch.channels_last)


def of_checkpoint(state: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(flat config, weights of the online network) of a checkpoint's state. ValueError if it is none of a run."""
    if not isinstance(state.get("config"), dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{path} is no checkpoint of a run: it has no config and model")
    return state["config"], {key.removeprefix("online."): value for key, value in state["model"].items() if key.startswith("online.")}


def _exported(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install -c constraints.txt -e '.[export]'") from error
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        weights = load_file(path / "backbone.safetensors")
    except Exception as error:
        raise ValueError(f"{path} is no export that can be read ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'} is no object")
    return config, weights
