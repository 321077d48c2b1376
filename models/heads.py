"""Projector and predictor variants: the same head maps positions of a feature map and whole-picture vectors.

Symbols: y = feature map [b c n n], Y = pooled global vector [b c], g q = global projector and predictor, g2 q2 = the local ones.
A position is row * n + column; -1 means "none".
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(in_dim: int, hidden_dim: int, out_dim: int, num_layers: int = 2, norm: str = "batch") -> nn.Sequential:
    """Linear, norm, ReLU, ..., Linear: `num_layers` linear layers.

    BYOL (Grill et al. 2020, arXiv 2006.07733, section 3.3): "a linear layer with output size 4096 followed by batch normalization,
    rectified linear units (ReLU), and a final linear layer with output dimension 256". As in its public code the last one has no bias.
    """
    layers: list[nn.Module] = []
    for i in range(num_layers - 1):
        layers += [nn.Linear(in_dim if i == 0 else hidden_dim, hidden_dim), NORMS[norm][0](hidden_dim), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden_dim if num_layers > 1 else in_dim, out_dim, bias=False))


def gather_positions(y: Float[Tensor, "b c n m"], positions: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    """The vectors of a feature map at these positions.

    A position of -1 gives that of position 0, so that shapes stay fixed: the loss has to mask it.
    """
    vectors = y.flatten(2).transpose(1, 2)
    index = positions.clamp(min=0)[:, :, None].expand(-1, -1, y.shape[1])
    return torch.gather(vectors, 1, index)


class Head(nn.Module):
    """What CO-SSL asks of a local head. The state of one variant loads into another by `transfer_state` where their layers agree.

    All take (in_dim, hidden_dim, out_dim, output_norm, norm): `norm` is the one between the layers, `output_norm` appends a batch norm
    without weight and bias, for projectors as in MoCo v3 (Chen et al. 2021, arXiv 2104.02057) and, with weight and bias, SimSiam
    (arXiv 2011.10566, table 3).
    """

    layers: nn.Sequential

    def forward(self, y: Float[Tensor, "b c n n"], positions: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """The head's output at these positions of a feature map."""
        raise NotImplementedError

    def vectors(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        """The head's output for vectors that belong to no map: the pooled global one, or positions gathered before."""
        raise NotImplementedError


class MapHead(Head):
    """Convolution, norm, ReLU, ..., convolution on the whole map, then the gather; all 1x1, but for a `kernel` of the first.

    With two layers the form of BYOL's MLP that PixPro (Xie et al. 2021, arXiv 2011.10043) uses on maps; CO-SSL's baseline.
    Trap: a 1x1 convolution *is* a per-position MLP. With all positions and equal weights this equals `PositionHead` of as many layers, to
    rounding; the difference is that a batch norm sees every position here, and the sampled ones there. A 3x3 kernel is something
    else: it widens what a position sees by two strides of the backbone, and to a vector without a map everything around is zero.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        output_norm: bool = False,
        norm: str = "batch",
        num_layers: int = 2,
        kernel: int = 1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(num_layers - 1):
            size = kernel if i == 0 else 1
            layers += [nn.Conv2d(in_dim if i == 0 else hidden_dim, hidden_dim, size, padding=size // 2), NORMS[norm][1](hidden_dim)]
            layers += [
                nn.ReLU(inplace=norm != "layer")
            ]  # a layer norm returns a permuted view, which autograd copies to change it in place
        self.layers = nn.Sequential(*layers, nn.Conv2d(hidden_dim if num_layers > 1 else in_dim, out_dim, 1, bias=False))
        if output_norm:
            self.layers.append(nn.BatchNorm2d(out_dim, affine=False))

    def forward(self, y: Float[Tensor, "b c n n"], positions: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        return gather_positions(self.layers(y), positions)

    def vectors(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        """As matrix products: with convolutions on maps of one pixel a step of conv1x1_deep took 2.1 times as long (CPU, 49 positions)."""
        flat = x.reshape(-1, x.shape[-1])
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                middle = layer.kernel_size[0] // 2
                flat = F.linear(flat, layer.weight[:, :, middle, middle], layer.bias)
            else:
                flat = layer(flat[:, :, None, None])[:, :, 0, 0]
        return flat.reshape(*x.shape[:-1], -1)


class PositionHead(Head):
    """The gather, then an `mlp` of `num_layers` on the gathered vectors: with k of n * n positions it costs k / n^2 of the whole map.

    Trap: positions of -1 enter a batch norm's statistics as copies of position 0, though the loss masks them.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int, out_dim: int, output_norm: bool = False, norm: str = "batch", num_layers: int = 2
    ) -> None:
        super().__init__()
        self.layers = mlp(in_dim, hidden_dim, out_dim, num_layers, norm)
        if output_norm:
            self.layers.append(nn.BatchNorm1d(out_dim, affine=False))

    def forward(self, y: Float[Tensor, "b c n n"], positions: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        return self.vectors(gather_positions(y, positions))

    def vectors(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        return self.layers(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Prototypes(nn.Module):
    """Cosines of vectors to `count` learned unit vectors: DINO's last layer (arXiv 2104.14294, appendix C; its gain fixed at 1)."""

    def __init__(self, in_dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, in_dim), std=0.02))

    def vectors(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b p"]:
        """The cosines; prototypes see vectors alone, so this is their forward."""
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


def _layer_norm_2d(channels: int) -> nn.Module:
    from timm.layers.norm import LayerNorm2d  # here: all of timm comes with it

    return LayerNorm2d(channels, eps=1e-5)


# What stands between the layers: for vectors, and for maps. Batch norms become synchronized ones by torch's own conversion.
NORMS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "batch": (nn.BatchNorm1d, nn.BatchNorm2d),
    "layer": (nn.LayerNorm, _layer_norm_2d),
    "none": (nn.Identity, nn.Identity),
}

HEADS: dict[str, Callable[..., Head]] = {
    "conv1x1": MapHead,
    "mlp2": PositionHead,
    "mlp3": partial(PositionHead, num_layers=3),
    "conv1x1_deep": partial(MapHead, num_layers=4),
    "linear": partial(PositionHead, num_layers=1),
    "conv3x3": partial(MapHead, kernel=3),
}


def predictor_kind(name: str) -> str:
    """The head that predicts from what the projector `name` returns. Predictors read vectors, which have no neighbours to look at."""
    return "conv1x1" if name == "conv3x3" else name


def transfer_state(source: Head, destination: Head) -> None:
    """Copies all weights and running statistics; a 1x1 convolution's [d c 1 1] and a linear layer's [d c] count as one shape."""
    shapes = destination.state_dict()
    destination.load_state_dict({name: tensor.reshape(shapes[name].shape) for name, tensor in source.state_dict().items()})
