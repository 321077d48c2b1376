"""A trained backbone from a run: pictures in, global vectors and the map of local ones out. `cossl.load` is `load` of this file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cossl.models import checkpoint
from cossl.models.co_ssl import ModelConfig, Network
from cossl.models.flags import read_object, unflatten, unsealed

HEADS = ("projector", "predictors", "local_projector", "local_predictors")
WEIGHTS = "backbone.safetensors"


class Encoder(nn.Module):
    """The online network's backbone, pooling and MLP after it, frozen, in eval mode; with its heads, but for an export without them.

    `config` is the run's flat config, or what an export keeps of it; `step` is how far the run was, None if the file does not say;
    `source` the name of the file that was read, and why newer ones were passed over: "previous.pt, as last.pt is ...".
    """

    def __init__(self, network: Network, config: dict[str, Any], step: int | None = None, source: str = "") -> None:
        super().__init__()
        self.network, self.config, self.step, self.source = network, config, step, source
        self.eval().requires_grad_(False)

    def forward(self, x: Float[Tensor, "b 3 s s"]) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c n n"]]:
        """(global vectors Y, feature map y) of pictures normalized by ImageNet's mean and deviation (`cossl.pipelines.augment.normalize`).

        `Y` is what `cossl eval` probes; `y[:, :, i, j]` is the local vector of position (i, j), before the MLP that Y has passed.
        """
        if not x.is_floating_point():
            raise ValueError(f"pictures of {x.dtype}: give them normalized, cossl.pipelines.augment.normalize(x)")
        y = self.network.backbone(x)
        return self.network.pool(y), y

    def represent(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c"]:
        """The global vectors alone."""
        return self(x)[0]

    def digest(self) -> str:
        """16 hexadecimal digits that tell its weights from any others."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def train(self, mode: bool = True) -> Encoder:
        """Stays in eval mode: its batch norms keep the statistics they were trained with. To train it, use `.network`."""
        return super().train(False)


def load(path: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """The encoder of a run's folder, of one of its checkpoints, or of what `cossl export` wrote. ValueError of one line for anything else.

    Reads tensors and plain values only: nothing in a file is executed. Of a run's folder the newest whole checkpoint counts.
    """
    path = Path(path)
    exported, source = (path / WEIGHTS).exists(), path.name
    if exported:
        config, weights, step = _exported(path)
    elif path.is_dir() and not checkpoint.exists(path):
        raise ValueError(
            f"{path} holds neither a checkpoint nor an export: give a run's folder, a checkpoint, or what `cossl export` wrote"
        )
    else:
        if path.is_dir():
            state, source = checkpoint.newest(path)
        else:
            state = checkpoint.load(path, "give a run's folder or one of its checkpoints")
        config, weights = of_checkpoint(state, path)
        step = state.get("step")
    try:
        network = _network(config, weights, may_lack_heads=exported)
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:  # torch's answers to sizes that no tensor can have
        said = [line.strip() for line in str(error).splitlines() if not line.startswith("Error(s) in loading")]
        raise ValueError(f"{path} does not fit its own config: {said[0]:.200}") from error
    return Encoder(network, config, step, source).to(device).to(memory_format=torch.channels_last)


def of_checkpoint(state: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(flat config, weights of the online network) of a checkpoint's state. ValueError if it is none of a run."""
    config, model = state.get("config"), state.get("model")
    if not isinstance(config, dict) or not isinstance(model, dict) or not all(isinstance(key, str) for key in (*config, *model)):
        raise ValueError(f"{path} is no checkpoint of a run: it has no config and model")
    weights = {key.removeprefix("online."): value for key, value in model.items() if key.startswith("online.")}
    for key, value in weights.items():
        # A tensor may say that it repeats one number for a terabyte, which the first copy of it would take.
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"{path} is no checkpoint of a run: its {key!r:.80} is no whole tensor")
    return config, weights


def _network(config: dict[str, Any], weights: dict[str, Tensor], may_lack_heads: bool) -> Network:
    """The network of the config with these weights. ValueError, or what torch raises, if they do not fit."""
    model = unflatten(ModelConfig, {key.removeprefix("model."): value for key, value in config.items() if key.startswith("model.")})
    if model.mlp_after_pool > len(weights):
        raise ValueError(f"it has no {model.mlp_after_pool} layers after the pooling")
    with torch.device("meta"):
        network = Network(model, "local_projector" in _parts(weights), any(key.startswith("local_predictors.1.") for key in weights))
    for head in HEADS if may_lack_heads else ():
        if head not in _parts(weights):
            setattr(network, head, None)
    expected = network.state_dict()
    for key in (*expected, *weights):
        if key not in weights or key not in expected:
            raise ValueError(f"{key!r:.80} is {'unknown' if key in weights else 'missing'}")
        if weights[key].dtype != expected[key].dtype:
            raise ValueError(f"{key} is of {weights[key].dtype}, expected {expected[key].dtype}")
    network.load_state_dict(weights, assign=True)
    return network


def _parts(weights: dict[str, Tensor]) -> set[str]:
    return {key.partition(".")[0] for key in weights}


def _exported(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], int | None]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install -c constraints.txt -e '.[export]'") from error
    try:
        config = unsealed(read_object(path / "config.json"))
        content = (path / WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() != config["weights_sha256"]:
            raise ValueError(f"{WEIGHTS} is not the one that config.json was written for")
        return config, load(content), config["step"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path} is no whole export ({error}): export the run again") from error
