"""GCNII: a deep GCN that keeps adding its first hidden rows, so depth does not wash them out."""

import math

import torch
from torch import Tensor, nn

from gnnpipe.models.convolution import Affine, Convolution, glorot
from gnnpipe.models.cost import dense_flops, edge_flops
from gnnpipe.models.layer import GraphView


class GCNIILayer(Convolution):
    """Chen et al., "Simple and deep graph convolutional networks".

    With ``P = D^-1/2 (A + I) D^-1/2``, ``beta = ln(theta / layer_index + 1)`` and the carried
    rows ``h0`` of the input layer::

        s = (1 - alpha) P x + alpha h0
        convolve(x) = (1 - beta) s + beta s W

    equal to torch_geometric's ``GCN2Conv`` with shared weights.

    Args:
        channels: width of the input and of the output.
        layer_index: place among the convolutions, from 1.
        dropout: probability of a zero in the input, in [0, 1).
        alpha: share of ``h0``.
        theta: strength of the weight; it fades with depth.
    """

    operator = "gcn"
    aggregates_input = True
    reads = ("h0",)

    def __init__(
        self,
        channels: int,
        layer_index: int,
        *,
        dropout: float = 0.0,
        alpha: float = 0.1,
        theta: float = 0.5,
    ) -> None:
        super().__init__(channels, channels, dropout=dropout)
        self.table_channels = channels
        self.alpha = alpha
        self.beta = math.log(theta / layer_index + 1.0)
        self.weight1 = nn.Parameter(torch.empty(channels, channels))
        self.reset_parameters()

    def convolve(self, x: Tensor, graph: GraphView) -> Tensor:
        """Mixes the normalised sum with ``h0`` and, a little, with its transformed self."""
        s = graph.aggregate(x).lerp_(graph.carried("h0"), self.alpha)  # [num_rows, channels]
        # (1 - beta) s + beta s W as one product: the identity goes into the small matrix.
        return s @ self.affine().matrix()

    def affine(self) -> Affine:
        """The mix and its product."""
        return Affine(self.weight1, carried="h0", share=self.alpha, beta=self.beta)

    def reset_parameters(self) -> None:
        """Draws the weight by Glorot's rule."""
        super().reset_parameters()
        glorot(self.weight1)

    @property
    def step_numbers(self) -> int:
        """The mixed weight."""
        return self.in_channels * self.out_channels

    def kept_numbers(self, num_rows: int, num_edges: int) -> int:
        """A bit of the output; the mixed sum lies in the table. With a norm the mixed weight."""
        bits, norm = num_rows * self.out_channels // 32, self.norm_numbers(num_rows)
        return bits + (norm + self.in_channels * self.out_channels if norm else 0)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One dense product and one sum over the edges."""
        dense = dense_flops(num_nodes, self.in_channels, self.out_channels)
        return dense + edge_flops(num_edges + num_nodes, self.table_channels)
