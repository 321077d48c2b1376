"""`cossl models`: what every backbone and every local head costs and sees, counted on shapes alone: no weights, no pictures, no GPU."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from cossl.models.flags import parse_flags, replace_text
from cossl.models.heads import HEADS
from cossl.models.rf_resnet import BACKBONES, PositionGrid, ResNet, position_grid, reachable_fields
from cossl.tools.bench import machine, require_folder_of

HEAD_MAP = "rf_resnet50"  # the local heads are counted on the feature map of this backbone, at its default receptive field
HIDDEN_DIM, OUT_DIM = 4096, 256
SAMPLED = 16


@dataclass(frozen=True)
class ModelsArgs:
    """The command line of `cossl models`; each field's text is its help."""

    view_px: int = 224
    """Side of the square view in px."""

    all: bool = False
    """Every reachable receptive field of every backbone, on the stem that it has by itself; else its default."""

    json: Path | None = None
    """Write both tables here."""

    def __post_init__(self) -> None:
        if self.view_px < 1:
            raise ValueError(f"--view-px {self.view_px}: expected at least 1 px")
        require_folder_of("--json", self.json)


class BackboneRow(NamedTuple):
    """One backbone: what a position sees, and what one view costs. MACs are multiply-accumulates of the forward pass."""

    name: str
    stem: str
    receptive_field_px: int
    stride_px: int
    positions_per_side: int
    parameters: int
    gmacs: float
    activations_bf16_mib: float


class HeadRow(NamedTuple):
    """One local projector: GMACs of the forward pass of one view for all positions and for `sampled` of them."""

    name: str
    receptive_field_px: int
    parameters: int
    gmacs_all: float
    sampled: int
    gmacs_sampled: float


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def forward_cost(backbone: ResNet, view_px: int) -> tuple[float, float]:
    """GMACs of one view, and MiB that autograd keeps of it for the backward pass when every activation has the weights' precision.

    Each storage counts once; the weights and what has no place in the picture (a norm's statistics) do not. Measured in training mode,
    the backbone on the meta device, so that the sizes are those that torch would allocate, the indices of a max-pool (int64) included.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*backbone.parameters(), *backbone.buffers())}
    kept: dict[int, Tensor] = {}  # keeps the tensors alive too, or an address would be used again

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    views = 2  # a batch norm refuses to take statistics of a single value
    x = torch.empty(views, 3, view_px, view_px, device="meta", dtype=next(backbone.parameters()).dtype)
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone.train()(x)
    stored = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return counter.get_total_flops() / 2 / views / 1e9, stored / views / 2**20


def backbone_row(name: str, receptive_field: int | None, view_px: int) -> BackboneRow:
    """The row of one backbone; `receptive_field` None is its default."""
    with torch.device("meta"):
        backbone = BACKBONES[name](**({} if receptive_field is None else {"receptive_field": receptive_field})).to(torch.bfloat16)
    grid = position_grid(backbone, view_px)
    gmacs, mib = forward_cost(backbone, view_px)
    stem = "3x3/1" if isinstance(backbone.maxpool, nn.Identity) else "7x7/2, pool/2"
    seen = (grid.receptive_field_px, grid.stride_px, grid.size)
    return BackboneRow(name, stem, *seen, num_parameters(backbone), round(gmacs, 4), round(mib, 2))


def backbone_rows(view_px: int, every_field: bool) -> list[BackboneRow]:
    """All backbones in the order of their dict, each at its default or at every receptive field that it can have."""
    rows = []
    for name in BACKBONES:
        fields = reachable_fields(name) if every_field else []
        rows += [backbone_row(name, field, view_px) for field in fields or (None,)]
    return rows


def head_row(name: str, in_dim: int, grid: PositionGrid) -> HeadRow:
    """The row of one local head on a feature map with this position grid. A kernel of k widens what is seen by (k - 1) strides."""
    with torch.device("meta"):
        head = HEADS[name](in_dim, HIDDEN_DIM, OUT_DIM, False).eval()
        y = torch.empty(1, in_dim, grid.size, grid.size)
    sampled, gmacs = min(SAMPLED, grid.size**2), []
    for count in (grid.size**2, sampled):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            head(y, torch.zeros(1, count, dtype=torch.long, device="meta"))
        gmacs.append(counter.get_total_flops() / 2 / 1e9)
    wider = sum((module.kernel_size[0] - 1) * grid.stride_px for module in head.modules() if isinstance(module, nn.Conv2d))
    field = grid.receptive_field_px + wider
    return HeadRow(name, field, num_parameters(head), round(gmacs[0], 4), sampled, round(gmacs[1], 4))


def head_rows(view_px: int) -> list[HeadRow]:
    """All local heads on the feature map of HEAD_MAP."""
    with torch.device("meta"):
        backbone = BACKBONES[HEAD_MAP]()
    return [head_row(name, backbone.out_channels, position_grid(backbone, view_px)) for name in HEADS]


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report for people, line by line."""
    px = report["settings"]["view_px"]
    yield f"{'backbone':<14}{'stem':<15}{'sees px':>8}{'stride':>8}{'positions':>11}{'parameters M':>14}{'GMACs':>9}{'activations MiB':>17}"
    for row in map(BackboneRow._make, (row.values() for row in report["backbones"])):
        yield (
            f"{row.name:<14}{row.stem:<15}{row.receptive_field_px:>8}{row.stride_px:>8}"
            f"{f'{row.positions_per_side} x {row.positions_per_side}':>11}"
            f"{row.parameters / 1e6:>14.2f}{row.gmacs:>9.2f}{row.activations_bf16_mib:>17.1f}"
        )
    yield f"One view of {px} px, forward. Activations: what autograd keeps for the backward pass in bf16 (float32: about twice as much)."
    heads = [HeadRow(**row) for row in report["heads"]]
    yield f"\n{'local head':<14}{'':<15}{'sees px':>8}{'':>19}{'parameters M':>14}{'GMACs':>9}{f'GMACs, {heads[0].sampled} positions':>22}"
    for head in heads:
        yield (
            f"{head.name:<14}{'':<15}{head.receptive_field_px:>8}{'':>19}"
            f"{head.parameters / 1e6:>14.2f}{head.gmacs_all:>9.3f}{head.gmacs_sampled:>22.3f}"
        )
    yield f"Projectors of widths {HIDDEN_DIM} and {OUT_DIM} on the feature map of {HEAD_MAP}, for all its positions and for a sample."


def models_main(argv: Sequence[str]) -> None:
    """`cossl models`. Raises ValueError or OSError for a user's mistake."""
    args = parse_flags(ModelsArgs, argv, "cossl models", __doc__ or "")
    report: dict[str, Any] = {
        "machine": machine(),
        "command": shlex.join(["cossl", "models", *argv]),
        "settings": {"view_px": args.view_px, "head_map": HEAD_MAP, "hidden_dim": HIDDEN_DIM, "out_dim": OUT_DIM},
        "backbones": [row._asdict() for row in backbone_rows(args.view_px, args.all)],
        "heads": [row._asdict() for row in head_rows(args.view_px)],
    }
    if args.json is not None:
        replace_text(args.json, json.dumps(report, indent=1))
    print("\n".join(table(report)))
