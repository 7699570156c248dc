"""GIN: the plain sum over the neighbours and the node itself, through a small MLP."""

import torch
from torch import Tensor, nn

from gnnpipe.models.convolution import Convolution
from gnnpipe.models.cost import dense_flops, edge_flops
from gnnpipe.models.layer import GraphView


class GINLayer(Convolution):
    """Xu et al., "How powerful are graph neural networks?".

    ``convolve(x) = MLP((1 + eps) x + A x)``, equal to torch_geometric's ``GINConv`` around
    Linear, ReLU, Linear; ``eps`` starts at 0; edge weights play no part.

    Args:
        in_channels: width of the input.
        out_channels: width of the hidden and of the output rows.
        dropout: probability of a zero in the input, in [0, 1).
        train_eps: whether ``eps`` is a parameter or stays 0.
    """

    operator = "sum"
    aggregates_input = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        train_eps: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, dropout=dropout)
        self.table_channels = in_channels
        self.first = nn.Linear(in_channels, out_channels)
        self.second = nn.Linear(out_channels, out_channels)
        self.eps = nn.Parameter(torch.zeros(1)) if train_eps else None

    def convolve(self, x: Tensor, graph: GraphView) -> Tensor:
        """Transforms the sum of the neighbours and the row."""
        own = x if self.eps is None else (1.0 + self.eps) * x
        h: Tensor = self.second(graph.relu(self.first(graph.aggregate(x) + own)))
        return h

    def reset_parameters(self) -> None:
        """Draws the weights uniformly within ``1 / sqrt(in_channels)``; ``eps`` becomes 0."""
        super().reset_parameters()
        self.first.reset_parameters()
        self.second.reset_parameters()
        if self.eps is not None:
            nn.init.zeros_(self.eps)

    def kept_numbers(self, num_rows: int, num_edges: int) -> int:
        """The input of each product, a bit of either result."""
        kept = num_rows * (self.in_channels + self.out_channels + 2 * self.out_channels // 32)
        return kept + self.norm_numbers(num_rows)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """Two dense products and one sum over the edges."""
        dense = dense_flops(num_nodes, self.in_channels + self.out_channels, self.out_channels)
        return dense + edge_flops(num_edges, self.table_channels)
