"""Residual blocks around one look at the neighbours, as deep models stack them."""

from typing import Literal

from torch import Tensor, nn

from gnnpipe.kernels import SparseRows
from gnnpipe.models.foreign.run import dense, foreign, reset
from gnnpipe.models.layer import GraphView, Layer

Order = Literal["res+", "res", "plain"]


class ResidualLayer(Layer):
    """Norm, activation, dropout and a convolution beside the identity.

    ``res+``: ``x + conv(dropout(act(norm(x))))``; ``res``: ``dropout(x + act(norm(conv(x))))``;
    ``plain``: ``dropout(act(norm(conv(x))))``; equal to torch_geometric's ``DeepGCNLayer``.
    Dropout is counter-based.

    Args:
        conv: a layer that keeps the width, unless ``plain``.
        norm: row-wise, over all nodes (:mod:`gnnpipe.models.norm`), or None.
        act: activation, or None.
        order: of the parts.
        dropout: probability of a zero, in [0, 1).
    """

    def __init__(
        self,
        conv: Layer,
        *,
        norm: nn.Module | None,
        act: nn.Module | None,
        order: Order = "res+",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act
        self.order, self.dropout = order, dropout
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.operator, self.table_channels = conv.operator, conv.table_channels
        self.reads, self.writes = conv.reads, conv.writes

    def forward(self, x: Tensor | SparseRows, graph: GraphView) -> Tensor:
        """Maps the rows."""
        x = dense(x)
        if self.order == "res+":
            h = graph.dropout(self._rectified(x, graph), self.dropout)
            out: Tensor = x + self.conv(h, graph)
            return out
        h = self._rectified(self.conv(x, graph), graph)
        return graph.dropout(x + h if self.order == "res" else h, self.dropout)

    def _rectified(self, x: Tensor, graph: GraphView) -> Tensor:
        for module in (self.norm, self.act):
            if module is not None:
                with foreign(module, graph):
                    x = graph.normalise(x, module)
        return x

    def reset_parameters(self) -> None:
        """Draws the convolution's weights; the norm becomes the identity."""
        self.conv.reset_parameters()
        if self.norm is not None:
            reset(self.norm)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """The convolution; the norm is small beside it."""
        return self.conv.cost(num_nodes, num_edges)

    def carried_channels(self, name: str) -> int:
        """As the convolution says."""
        return self.conv.carried_channels(name)
