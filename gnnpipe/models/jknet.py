"""JKNet: every layer's rows reach the last one, which takes the largest of each column."""

import torch
from torch import Tensor, nn

from gnnpipe.models.gcn import GCNLayer
from gnnpipe.models.io import OutputLayer
from gnnpipe.models.layer import GraphView, Layer

NAME = "jumps"


class JKLayer(Layer):
    """Xu et al., "Representation learning on graphs with jumping knowledge networks".

    A GCN layer that keeps the column-wise maximum of all layers' rows: one carried tensor,
    whatever the depth.

    Args:
        channels: width.
        dropout: probability of a zero in the input, in [0, 1).
        is_first: whether no layer came before.
    """

    operator = "gcn"
    writes = (NAME,)

    def __init__(self, channels: int, *, dropout: float = 0.0, is_first: bool = False) -> None:
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.reads = () if is_first else (NAME,)
        self.conv = GCNLayer(channels, channels, dropout=dropout)
        self.table_channels = self.conv.table_channels

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Convolves the rows and carries the maximum."""
        h: Tensor = self.conv(x, graph)
        graph.carry(NAME, torch.maximum(graph.carried(NAME), h) if self.reads else h)
        return h

    def reset_parameters(self) -> None:
        """Draws the convolution's weights."""
        self.conv.reset_parameters()

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """The convolution."""
        return self.conv.cost(num_nodes, num_edges)


class JKOutputLayer(Layer):
    """Maps the maximum of all layers' rows to class scores.

    Args:
        in_channels: hidden width.
        out_channels: number of classes.
        dropout: probability of a zero in the input, in [0, 1).
    """

    reads = (NAME,)

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.head: nn.Module = OutputLayer(in_channels, out_channels, dropout=dropout)

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """The rows themselves are among the carried."""
        scores: Tensor = self.head(graph.carried(NAME), graph)
        return scores

    def reset_parameters(self) -> None:
        """Draws the weights uniformly within ``1 / sqrt(in_channels)``."""
        assert isinstance(self.head, OutputLayer)
        self.head.reset_parameters()

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One dense product."""
        assert isinstance(self.head, OutputLayer)
        return self.head.cost(num_nodes, num_edges)
