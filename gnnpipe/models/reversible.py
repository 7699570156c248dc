"""RevGNN's reversible blocks: every layer's input can be computed back from its output."""

import torch
from torch import Tensor, nn

from gnnpipe.errors import UserError
from gnnpipe.kernels import linear
from gnnpipe.models.convolution import glorot, pre_activated
from gnnpipe.models.cost import dense_flops, edge_flops
from gnnpipe.models.layer import GraphView, Layer
from gnnpipe.models.norm import make_norm
from gnnpipe.sections import NormName


class ReversibleLayer(Layer):
    """Li et al., "Training graph neural networks with 1000 layers" (RevGNN), half a block.

    The channels are two halves ``[a | b]``, of which one is changed and they swap places::

        f(b) = D^-1/2 (A + I) D^-1/2 dropout(relu(norm(b))) W^T + c
        forward([a | b]) = [b | a + f(b)]

    Two layers make the paper's block with two groups. The pipeline keeps what autograd asks for:
    the blocks bring the paper's architecture, not its saving of memory.

    Args:
        channels: width, even.
        dropout: probability of a zero in what is convolved, in [0, 1).
        norm: which one.

    Raises:
        UserError: the width is odd.
    """

    operator = "gcn"
    aggregates_input = True

    def __init__(self, channels: int, *, dropout: float = 0.0, norm: NormName = "layer") -> None:
        if channels % 2:
            raise UserError(
                f"`model.hidden_channels` (={channels}) must be even for reversible layers, which "
                "halve it; add one"
            )
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.table_channels = half = channels // 2
        self.dropout = dropout
        self.norm = make_norm(norm, half)
        self.lin = nn.Linear(half, half)
        self.reset_parameters()

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Changes one half by the other."""
        a, b = x.chunk(2, dim=1)
        return torch.cat((b, a + self._change(b, graph)), dim=1)

    def inverse(self, y: Tensor, graph: GraphView) -> Tensor:
        """The input that :meth:`forward` has mapped to ``y``, up to rounding."""
        b, changed = y.chunk(2, dim=1)
        return torch.cat((changed - self._change(b, graph), b), dim=1)

    def _change(self, b: Tensor, graph: GraphView) -> Tensor:
        h = graph.dropout(pre_activated(b, self.norm, graph), self.dropout)
        return linear(graph.aggregate(h), self.lin.weight, self.lin.bias)

    def reset_parameters(self) -> None:
        """Draws the weight by Glorot's rule; the bias starts at zero, the norm as the identity."""
        self.norm.reset_parameters()
        glorot(self.lin.weight)
        nn.init.zeros_(self.lin.bias)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """A product and a sum over the edges, both of half the width."""
        half = self.table_channels
        return dense_flops(num_nodes, half, half) + edge_flops(num_edges + num_nodes, half)
