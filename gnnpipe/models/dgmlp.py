"""DGMLP's decoupled depth: many hops without weights, then many row-wise layers without hops."""

import torch
from torch import Tensor, nn

from gnnpipe.kernels import linear
from gnnpipe.models.cost import dense_flops, edge_flops
from gnnpipe.models.io import OutputLayer
from gnnpipe.models.layer import GraphView, Layer

NAME = "hops"


class WeighedHopLayer(Layer):
    """Zhang et al., "Model degradation hinders deep graph neural networks" (DGMLP), one hop.

    ``z_k = D^-1/2 (A + I) D^-1/2 z_(k-1)``, and each node adds up its hops with weights of its
    own, ``t_k = t_(k-1) + sigmoid(z_k . g_k + b_k) z_k``. The sum is carried: one tensor, whatever
    the depth. Learned gates stand where the paper has distances to the smoothed state.

    Args:
        channels: width.
        is_first: adds the rows before any hop, with a gate of their own.
        is_last: gives the sum instead of the last hop.
    """

    operator = "gcn"

    def __init__(self, channels: int, *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.in_channels = self.out_channels = self.table_channels = channels
        self.reads = () if is_first else (NAME,)
        self.writes = () if is_last else (NAME,)
        self.own_gate = nn.Linear(channels, 1) if is_first else None
        self.gate = nn.Linear(channels, 1)

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Propagates once and adds up."""
        z = graph.aggregate(x)
        own = None if self.own_gate is None else self.own_gate(x).sigmoid() * x
        before = graph.carried(NAME) if own is None else own
        total: Tensor = before + self.gate(z).sigmoid() * z
        if not self.writes:
            return total
        graph.carry(NAME, total)
        return z

    def reset_parameters(self) -> None:
        """Draws the gates uniformly within ``1 / sqrt(channels)``."""
        for gate in (self.own_gate, self.gate):
            if gate is not None:
                gate.reset_parameters()

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One sum over the edges."""
        return edge_flops(num_edges + num_nodes, self.table_channels)


class ResidualDenseLayer(Layer):
    """One layer of the deep perceptron: ``x + relu(dropout(x) W^T + b)``.

    Args:
        channels: width.
        dropout: probability of a zero in the input, in [0, 1).
    """

    def __init__(self, channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.dropout = dropout
        self.lin = nn.Linear(channels, channels)

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Adds the transformed rows to the rows."""
        h = linear(graph.dropout(x, self.dropout), self.lin.weight, self.lin.bias)
        return x + torch.relu(h)

    def reset_parameters(self) -> None:
        """Draws the weights uniformly within ``1 / sqrt(channels)``."""
        self.lin.reset_parameters()

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One dense product."""
        return dense_flops(num_nodes, self.in_channels, self.out_channels)


def dgmlp_layers(*, widths: tuple[int, int], num_layers: int, dropout: float) -> list[Layer]:
    """Half of the layers hops, rounded up, the others row-wise; then the class scores.

    Args:
        widths: hidden width and number of classes.
        num_layers: at least 1.
        dropout: probability of a zero, in [0, 1).
    """
    hidden, classes = widths
    num_hops = (num_layers + 1) // 2
    hops: list[Layer] = [
        WeighedHopLayer(hidden, is_first=hop == 1, is_last=hop == num_hops)
        for hop in range(1, num_hops + 1)
    ]
    dense = [ResidualDenseLayer(hidden, dropout=dropout) for _ in range(num_layers - num_hops)]
    return [*hops, *dense, OutputLayer(hidden, classes, dropout=dropout)]
