"""Projector and predictor variants: the same head maps positions of a feature map and whole-picture vectors.

Symbols: y = feature map [b c n n], Y = pooled global vector [b c], g q = global projector and predictor, g2 q2 = the local ones.
A position is row * n + column; -1 means "none".
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def mlp(in_dim: int, hidden_dim: int, out_dim: int, num_layers: int = 2) -> nn.Sequential:
    """Linear, batch norm, ReLU, ..., Linear: `num_layers` linear layers.

    BYOL (Grill et al. 2020, arXiv 2006.07733, section 3.3): "a linear layer with output size 4096 followed by batch normalization,
    rectified linear units (ReLU), and a final linear layer with output dimension 256". As in its public code the last one has no bias.
    """
    layers: list[nn.Module] = []
    for i in range(num_layers - 1):
        layers += [nn.Linear(in_dim if i == 0 else hidden_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
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

    All take (in_dim, hidden_dim, out_dim, output_norm): the last appends a batch norm without weight and bias, for projectors as in
    MoCo v3 (Chen et al. 2021, arXiv 2104.02057) and, with weight and bias, SimSiam (arXiv 2011.10566, table 3).
    """

    layers: nn.Sequential

    def forward(self, y: Float[Tensor, "b c n n"], positions: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """The head's output at these positions of a feature map."""
        raise NotImplementedError

    def vectors(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        """The head's output for vectors that belong to no map: the pooled global one, or positions gathered before."""
        raise NotImplementedError


class Conv1x1(Head):
    """1x1 convolution, batch norm, ReLU, 1x1 convolution on the whole map, then the gather.

    The form of BYOL's MLP that PixPro (Xie et al. 2021, arXiv 2011.10043) uses on maps; CO-SSL's baseline.
    Trap: a 1x1 convolution *is* a per-position MLP. With all positions and equal weights this equals `Mlp2` to rounding;
    the difference is that the norm sees every position here, and the sampled ones there.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, output_norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_dim, hidden_dim, 1),
            nn.BatchNorm2d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_dim, out_dim, 1, bias=False),
        )
        if output_norm:
            self.layers.append(nn.BatchNorm2d(out_dim, affine=False))

    def forward(self, y: Float[Tensor, "b c n n"], positions: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        return gather_positions(self.layers(y), positions)

    def vectors(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        return self.layers(x.reshape(-1, x.shape[-1], 1, 1)).reshape(*x.shape[:-1], -1)


class Mlp2(Head):
    """The gather, then Linear, batch norm, ReLU, Linear on the gathered vectors.

    Trap: positions of -1 enter the norm's statistics as copies of position 0, though the loss masks them.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, output_norm: bool = False) -> None:
        super().__init__()
        self.layers = mlp(in_dim, hidden_dim, out_dim)
        if output_norm:
            self.layers.append(nn.BatchNorm1d(out_dim, affine=False))

    def forward(self, y: Float[Tensor, "b c n n"], positions: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        return self.vectors(gather_positions(y, positions))

    def vectors(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        return self.layers(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


HEADS: dict[str, Callable[[int, int, int, bool], Head]] = {"conv1x1": Conv1x1, "mlp2": Mlp2}


def transfer_state(source: Head, destination: Head) -> None:
    """Copies all weights and running statistics; a 1x1 convolution's [d c 1 1] and a linear layer's [d c] count as one shape."""
    shapes = destination.state_dict()
    destination.load_state_dict({name: tensor.reshape(shapes[name].shape) for name, tensor in source.state_dict().items()})
