"""GCN: the symmetrically normalised sum over the neighbours and the node itself."""

import torch
from torch import Tensor, nn

from gnnpipe.models.convolution import Affine, Convolution, glorot
from gnnpipe.models.cost import dense_flops, edge_flops
from gnnpipe.models.layer import GraphView


class GCNLayer(Convolution):
    """Kipf and Welling, "Semi-supervised classification with graph convolutional networks".

    ``convolve(x) = D^-1/2 (A + I) D^-1/2 x W^T + b``, equal to torch_geometric's ``GCNConv``.
    The product is associative; what neighbours read is the narrower of ``x`` and ``x W^T``.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        dropout: probability of a zero in the input, in [0, 1).
    """

    operator = "gcn"

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__(in_channels, out_channels, dropout=dropout)
        self.table_channels = min(in_channels, out_channels)
        self.aggregates_input = out_channels >= in_channels
        self.lin = nn.Linear(in_channels, out_channels, bias=False)
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def convolve(self, x: Tensor, graph: GraphView) -> Tensor:
        """Multiplies with the weight before or after the sum, whichever is narrower there."""
        if self.out_channels < self.in_channels:
            return graph.aggregate(self.lin(x)) + self.bias
        h: Tensor = nn.functional.linear(graph.aggregate(x), self.lin.weight, self.bias)
        return h

    def affine(self) -> Affine:
        """The product after the sum."""
        return Affine(self.lin.weight, bias=self.bias)

    def reset_parameters(self) -> None:
        """Draws the weight by Glorot's rule; the bias starts at zero."""
        super().reset_parameters()
        glorot(self.lin.weight)
        nn.init.zeros_(self.bias)

    def kept_numbers(self, num_rows: int, num_edges: int) -> int:
        """A bit of the output; the product's input lies in the table."""
        return num_rows * self.out_channels // 32 + self.norm_numbers(num_rows)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One dense product and one sum over the edges."""
        dense = dense_flops(num_nodes, self.in_channels, self.out_channels)
        return dense + edge_flops(num_edges + num_nodes, self.table_channels)
