"""What normalises hidden rows: each row by itself, or each column over all nodes."""

import torch
from torch import Tensor, nn

from gnnpipe.sections import NormName


class GraphNorm(nn.Module):
    """Cai et al., "GraphNorm: a principled approach to accelerating GNN training".

    With the mean and the variance of a column over all nodes and ``c = x - mean_scale * mean``::

        y = weight * c / sqrt(mean(c^2) + eps) + bias

    equal to torch_geometric's ``GraphNorm`` on one graph, whose parameters have the same names.
    There are no running statistics: evaluation takes those of the graph that it evaluates.

    Args:
        num_features: width.
        eps: keeps constant columns finite.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.mean_scale = nn.Parameter(torch.empty(num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The plain normalisation."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.mean_scale)


class NoNorm(nn.Identity):
    """Leaves the rows as they are."""

    def reset_parameters(self) -> None:
        """There are none."""


NodeNorm = nn.BatchNorm1d | GraphNorm
"""Norms whose statistics are over nodes: only the view of the graph can run them."""
Norm = NoNorm | nn.LayerNorm | nn.BatchNorm1d | GraphNorm


def make_norm(kind: NormName, channels: int) -> Norm:
    """The norm of a configuration's ``model.norm``."""
    match kind:
        case "none":
            return NoNorm()
        case "layer":
            return nn.LayerNorm(channels)
        case "batch":
            return nn.BatchNorm1d(channels)
        case "graph":
            return GraphNorm(channels)


def scale_and_shift(norm: NodeNorm, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The line that a norm maps each column by, ``y = x * scale + shift``.

    Args:
        norm: gives weight and bias.
        mean: of each column, ``[num_features]``.
        var: biased variance of each column, ``[num_features]``.
    """
    if isinstance(norm, GraphNorm):
        centre = norm.mean_scale * mean
        var = var + (mean - centre).square()
    else:
        centre = mean
    scale = norm.weight * (var + norm.eps).rsqrt()
    return scale, norm.bias - centre * scale
