"""Decoupled depth: the class scores are made first and propagated over many hops after."""

import torch
from torch import Tensor, nn

from gnnpipe.kernels import linear
from gnnpipe.models.cost import dense_flops, edge_flops
from gnnpipe.models.layer import GraphView, Layer

NAME = "predictions"


class PredictLayer(Layer):
    """Maps hidden rows to class scores, ``z = dropout(x) W^T + b``, and carries them.

    Args:
        in_channels: hidden width.
        out_channels: number of classes.
        dropout: probability of a zero in the input, in [0, 1).
    """

    writes = (NAME,)

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout = dropout
        self.lin = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Maps ``[num_rows, in_channels]`` to scores ``[num_rows, out_channels]``."""
        z = linear(graph.dropout(x, self.dropout), self.lin.weight, self.lin.bias)
        graph.carry(NAME, z)
        return z

    def reset_parameters(self) -> None:
        """Draws the weights uniformly within ``1 / sqrt(in_channels)``."""
        self.lin.reset_parameters()

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One dense product."""
        return dense_flops(num_nodes, self.in_channels, self.out_channels)


class GatedHopLayer(Layer):
    """One hop of DAGNN; Liu, Gao and Ji, "Towards deeper graph neural networks".

    ``z_k = D^-1/2 (A + I) D^-1/2 z_(k-1)``; the last hop gives ``sum_k sigmoid(z_k . s) z_k``
    over all hops, z itself included. The hops travel side by side in one carried tensor.

    Args:
        channels: number of classes.
        hop: from 1.
        is_last: whether to weigh the hops.
    """

    operator = "gcn"
    reads = (NAME,)

    def __init__(self, channels: int, hop: int, *, is_last: bool) -> None:
        super().__init__()
        self.in_channels = self.out_channels = self.table_channels = channels
        self.hop = hop
        self.writes = () if is_last else (NAME,)
        self.gate = nn.Linear(channels, 1) if is_last else None

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Propagates once."""
        z = graph.aggregate(x)
        hops = torch.cat((graph.carried(NAME), z), dim=1)  # [num_rows, (hop + 1) * channels]
        if self.gate is None:
            graph.carry(NAME, hops)
            return z
        each = hops.view(-1, self.hop + 1, self.in_channels)
        share: Tensor = self.gate(each).sigmoid()  # [num_rows, hop + 1, 1]
        return (share * each).sum(dim=1)

    def reset_parameters(self) -> None:
        """Draws the gate uniformly within ``1 / sqrt(channels)``."""
        if self.gate is not None:
            self.gate.reset_parameters()

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One sum over the edges."""
        return edge_flops(num_edges + num_nodes, self.table_channels)

    def carried_channels(self, name: str) -> int:
        """Width of the hops so far."""
        return self.in_channels * (self.hop + 1)
