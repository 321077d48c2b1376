"""`cossl export`: a run's backbone for other programs: safetensors (for `cossl.load`), torchvision's and timm's names, ONNX.

config.json, backbone.safetensors   the backbone, the MLP after the pooling, the heads if asked for: `cossl.load(<out>)`
<name>.pth, <name>.json             the backbone as torchvision.models.<name>, and what to change in that network first
<name>.timm.safetensors             the same for timm.create_model("<name>", num_classes=0); the same changes
backbone.onnx                       x -> global, local for any number of pictures of one side, which config.json states

Pictures go in as `cossl.pipelines.augment.normalize` gives them: RGB in [0, 1], minus mean, over std (config.json has both).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cossl.models import checkpoint
from cossl.models.flags import parse_flags, read_object, replace_text, sealed
from cossl.models.load import HEADS, WEIGHTS, Encoder
from cossl.models.rf_resnet import ResNet, pool_to, position_grid
from cossl.models.run_folder import code_version, versions
from cossl.pipelines.augment import IMAGENET_MEAN, IMAGENET_STD
from cossl.tools.opened import Opened, open_run

Format = Literal["safetensors", "torchvision", "timm", "onnx"]
INSTALL = "pip install -c constraints.txt -e '.[export]'"
OPSET = 18
# Whose blocks a backbone is made of; the names of its parts are torchvision's for all of them.
FAMILIES = {"rf_resnet18": "resnet18", "rf_resnet34": "resnet34", "rf_resnet50": "resnet50", "rf_resnet101": "resnet101"}
FAMILIES |= {"bagnet": "resnet50", **{name: name for name in FAMILIES.values()}}


@dataclass(frozen=True)
class ExportArgs:
    """The command line of `cossl export`; each field's text is its help."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder."""

    out: Path | None = None
    """Folder to write to; default <RUN>/export. Files of the same names are replaced, others left alone."""

    formats: tuple[Format, ...] = ("safetensors", "torchvision", "timm", "onnx")
    """Which to write. One whose package is missing, or that cannot hold this backbone, is left out, and a line says so."""

    heads: bool = False
    """With the projectors and predictors, in safetensors; ONNX then gives their projections too."""

    px: int = 0
    """Side of the pictures that the ONNX network takes; 0 means the run's --eval-px."""

    checkpoint: str = ""
    """Another checkpoint of the run, such as epoch-0010.pt; default is the newest whole one."""

    def __post_init__(self) -> None:
        if not self.formats:
            raise ValueError("--formats: give at least one of safetensors, torchvision, timm, onnx")
        if self.px and not 8 <= self.px <= 4096:
            raise ValueError(f"--px {self.px}: expected 8 to 4096, or 0 for the run's --eval-px")


# ------------------------------------------------------------------------------------------------- what is the same in torchvision


class Plain(NamedTuple):
    """A backbone as the network of torchvision whose blocks it has."""

    name: str
    state: dict[str, Tensor]
    """torchvision's names and shapes. A convolution that is 1x1 here and 3x3 there lies in the middle of zeros: the same function."""
    narrowed: list[str]
    """The names of those."""
    changes: list[str]
    """Lines of Python to run on `model`, before its state is loaded, without which it is another function."""


def plain(backbone: ResNet, name: str) -> Plain:
    """The backbone as torchvision's network. ValueError if that has no such width."""
    from torchvision import models

    with torch.device("meta"):
        theirs = getattr(models, FAMILIES[name])(weights=None)
    state, narrowed, changes = dict(backbone.state_dict()), [], _stem_changes(backbone)
    if (width := state["conv1.weight"].shape[0]) != theirs.conv1.out_channels:
        raise ValueError(f"{FAMILIES[name]} is {theirs.conv1.out_channels} wide, this backbone {width}")
    convolutions = {key: layer for key, layer in backbone.named_modules() if isinstance(layer, nn.Conv2d) and key != "conv1"}
    for key, ours in convolutions.items():
        other = theirs.get_submodule(key)
        if ours.stride != other.stride:
            stage, block, *rest = key.split(".")
            changes.append(f"model.{stage}[{block}].{'.'.join(rest).replace('downsample.0', 'downsample[0]')}.stride = {ours.stride}")
        if ours.kernel_size != other.kernel_size:
            narrowed.append(key)
            state[f"{key}.weight"] = F.pad(ours.weight.detach(), (1, 1, 1, 1))
    return Plain(FAMILIES[name], {key: tensor.contiguous() for key, tensor in state.items()}, narrowed, changes)


def _stem_changes(backbone: ResNet) -> list[str]:
    if not isinstance(backbone.maxpool, nn.Identity):
        return []
    return [
        "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)",
        "model.maxpool = torch.nn.Identity()",
    ]


def described(ours: Plain, encoder: Encoder) -> dict[str, Any]:
    """What stands beside a torchvision state."""
    after = encoder.network.after_pool
    return {
        "network": f"torchvision.models.{ours.name}()",
        "load": "model.load_state_dict(torch.load(file, weights_only=True), strict=False) lacks fc.weight and fc.bias alone",
        "timm": f"timm.create_model({ours.name!r}, num_classes=0) takes the other file whole",
        "changes_before_loading": ours.changes,
        "narrowed_to_1x1": ours.narrowed,
        "left_out": [] if isinstance(after, nn.Identity) else ["the MLP after the pooling, so what they pool is not the global vector"],
    }


# ------------------------------------------------------------------------------------------------- the formats


class Job(NamedTuple):
    """What every format is made of."""

    run: Opened
    out: Path
    px: int
    heads: bool


def write_torchvision(job: Job) -> list[Path]:
    """<name>.pth, a state without code, and <name>.json, which says what to change in torchvision's network."""
    ours = plain(job.run.encoder.network.backbone, job.run.config.model.backbone)
    stream = io.BytesIO()
    torch.save(ours.state, stream)
    text = json.dumps(described(ours, job.run.encoder), indent=1)
    return [_replace(job.out / f"{ours.name}.pth", stream.getvalue()), _replace(job.out / f"{ours.name}.json", text.encode())]


def write_timm(job: Job) -> list[Path]:
    """<name>.timm.safetensors: timm's names of these networks are torchvision's."""
    from safetensors.torch import save

    ours = plain(job.run.encoder.network.backbone, job.run.config.model.backbone)
    return [_replace(job.out / f"{ours.name}.timm.safetensors", save(ours.state, {"format": "pt"}))]


def write_safetensors(job: Job) -> list[Path]:
    """backbone.safetensors and config.json, which `cossl.load` reads. A kill between the two leaves a pair that it refuses."""
    from safetensors.torch import save

    kept = {key: tensor for key, tensor in job.run.encoder.network.state_dict().items() if job.heads or key.split(".")[0] not in HEADS}
    # Shared heads have two names, and safetensors refuses what shares memory.
    content = save({key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in kept.items()}, {"format": "pt"})
    config = config_of(job) | {"weights_sha256": hashlib.sha256(content).hexdigest()}
    weights = _replace(job.out / WEIGHTS, content)
    replace_text(job.out / "config.json", json.dumps(sealed(config), indent=1))
    return [weights, job.out / "config.json"]


def config_of(job: Job) -> dict[str, Any]:
    """What config.json says beside the hash of the weights."""
    encoder, network = job.run.encoder, job.run.encoder.network
    grid = position_grid(network.backbone, job.px)
    return {
        **{key: value for key, value in encoder.config.items() if key.startswith("model.")},
        "px": job.px,
        "receptive_field_px": grid.receptive_field_px,
        "stride_px": grid.stride_px,
        "positions_per_side": grid.size,
        "channels": network.backbone.out_channels,
        "heads": job.heads,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "run": job.run.run_dir.resolve().name,
        "preset": job.run.preset,
        "step": encoder.step,
        "code_version": code_version(),
        "versions": versions("numpy", "torch"),
    }


class Exported(nn.Module):
    """What the ONNX network computes: x -> global, local; with the heads also global_projected [b d] and local_projected [b d m m].

    The latter are of the map that the local head was trained on (`model.local_stage`, `model.local_grid`), if the run had one.
    """

    def __init__(self, encoder: Encoder, heads: bool) -> None:
        super().__init__()
        self.network = encoder.network
        self.outputs = ["global", "local"]
        if heads:
            self.outputs += ["global_projected"] + ["local_projected"] * (encoder.network.local_projector is not None)
        self.eval()

    def forward(self, x: Float[Tensor, "b 3 s s"]) -> tuple[Tensor, ...]:
        network = self.network
        maps = network.backbone.maps(x)
        found = [network.pool(maps[-1]), maps[-1]]
        if "global_projected" in self.outputs:
            found.append(network.projector.vectors(found[0]))
        if network.local_projector is not None and "local_projected" in self.outputs:
            y = pool_to(maps[network.stage - 1], network.grid)
            every = torch.arange(y.shape[-1] ** 2).expand(y.shape[0], -1)
            found.append(network.local_projector(y, every).transpose(1, 2).unflatten(2, y.shape[2:]))
        return tuple(found)


def write_onnx(job: Job) -> list[Path]:
    """backbone.onnx, opset 18, float32: any number of pictures, of job.px by job.px."""
    import onnxscript  # noqa: F401  what torch's exporter is made of; without it torch prints a page
    from onnx import StringStringEntryProto

    network = Exported(job.run.encoder, job.heads)
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, job.px, job.px),),
        input_names=["x"],
        output_names=network.outputs,
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]  # they name files of this machine
    config = config_of(job)
    model.metadata_props.extend(
        StringStringEntryProto(key=key, value=json.dumps(config[key])) for key in ("px", "mean", "std", "run", "step")
    )
    return [_replace(job.out / "backbone.onnx", model.SerializeToString())]


FORMATS: dict[Format, Callable[[Job], list[Path]]] = {
    "safetensors": write_safetensors,
    "torchvision": write_torchvision,
    "timm": write_timm,
    "onnx": write_onnx,
}


def _replace(path: Path, content: bytes) -> Path:
    """Writes the file whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


# ------------------------------------------------------------------------------------------------- the command


def export(
    run: Opened, out: Path, formats: Sequence[Format] = tuple(FORMATS), heads: bool = False, px: int = 0
) -> tuple[list[Path], dict[Format, str]]:
    """(files written, the formats that were left out and why). OSError if the folder cannot be written to."""
    job = Job(run, out, px or run.config.eval_px, heads)
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    left_out: dict[Format, str] = {}
    for name in dict.fromkeys(formats):
        try:
            written += FORMATS[name](job)
        except ModuleNotFoundError as error:
            left_out[name] = f"{error.name} is not installed: {INSTALL}"
        except ValueError as error:
            left_out[name] = str(error)
    return written, left_out


def _is_run(folder: Path) -> bool:
    """An export's config.json has a preset too, and the hash of its weights."""
    try:
        config = read_object(folder / "config.json")
    except (OSError, ValueError):
        config = {}
    return checkpoint.exists(folder) or ("preset" in config and "weights_sha256" not in config)


def export_main(argv: Sequence[str]) -> None:
    """`cossl export`. Raises ValueError, OSError or ImportError for a user's mistake."""
    args = parse_flags(ExportArgs, argv, "cossl export", __doc__ or "")
    run, out = open_run(args.run, "cpu", args.checkpoint), args.out or args.run / "export"
    if _is_run(out):
        raise ValueError(f"--out {out} is a run's folder, whose config.json would be replaced: give another")
    if blocking := [path for path in (out, *out.parents) if path.exists() and not path.is_dir()]:
        raise ValueError(f"--out {out}: {blocking[0]} is a file, give a folder")
    written, left_out = export(run, out, args.formats, args.heads, args.px)
    for path in written:
        print(f"{path}  {path.stat().st_size:,} bytes")
    for name, why in left_out.items():
        print(f"{name}: left out, {why}")
    if not written:
        raise ValueError("nothing was written")
