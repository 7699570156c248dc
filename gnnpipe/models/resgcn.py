"""ResGCN+: pre-activated residual blocks around GraphSAGE's mean convolution."""

from torch import Tensor, nn

from gnnpipe.kernels import linear
from gnnpipe.models.convolution import pre_activated
from gnnpipe.models.cost import dense_flops
from gnnpipe.models.layer import GraphView, Layer
from gnnpipe.models.norm import make_norm
from gnnpipe.models.sage import SAGELayer
from gnnpipe.sections import NormName


class ResGCNLayer(Layer):
    """Li et al., "DeeperGCN: all you need to train deeper GCNs".

    ``forward(x) = x + convolve(dropout(relu(norm(x))))``, equal to torch_geometric's
    ``DeepGCNLayer`` with ``block="res+"`` around ``SAGEConv``.

    Args:
        channels: width of the input and of the output.
        dropout: probability of a zero before the convolution, in [0, 1).
        norm: which one.
    """

    operator = "mean"
    aggregates_input = True

    def __init__(self, channels: int, *, dropout: float = 0.0, norm: NormName = "layer") -> None:
        super().__init__()
        self.in_channels = channels
        self.out_channels = channels
        self.table_channels = channels
        self.dropout = dropout
        self.norm = make_norm(norm, channels)
        self.conv = SAGELayer(channels, channels)

    def convolve(self, x: Tensor, graph: GraphView) -> Tensor:
        """The convolution alone: ``[num_rows, channels]`` to ``[num_rows, channels]``."""
        return self.conv.convolve(x, graph)

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Adds the convolved rows to the rows."""
        h = graph.dropout(pre_activated(x, self.norm, graph), self.dropout)
        return x + self.convolve(h, graph)

    def reset_parameters(self) -> None:
        """Draws the convolution's weights; the norm becomes the identity."""
        self.norm.reset_parameters()
        self.conv.reset_parameters()

    def kept_numbers(self, num_rows: int, num_edges: int) -> int:
        """The output, a bit of the rectified rows, the norm's statistics."""
        return num_rows * (self.out_channels + self.out_channels // 32 + 2)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """The convolution; the norm is small beside it."""
        return self.conv.cost(num_nodes, num_edges)


class ResGCNOutputLayer(Layer):
    """Maps the residual stream to class scores, ``dropout(relu(norm(x))) W^T + b``.

    Args:
        in_channels: hidden width.
        out_channels: number of classes.
        dropout: probability of a zero before the product, in [0, 1).
        norm: which one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        norm: NormName = "layer",
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dropout = dropout
        self.norm = make_norm(norm, in_channels)
        self.lin = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Maps ``[num_rows, in_channels]`` to scores ``[num_rows, out_channels]``."""
        h = graph.dropout(pre_activated(x, self.norm, graph), self.dropout)
        return linear(h, self.lin.weight, self.lin.bias)

    def reset_parameters(self) -> None:
        """Draws the weights uniformly within ``1 / sqrt(in_channels)``."""
        self.norm.reset_parameters()
        self.lin.reset_parameters()

    def kept_numbers(self, num_rows: int, num_edges: int) -> int:
        """The input of the product, a bit of it, the scores, the norm's statistics."""
        return num_rows * (self.in_channels + self.in_channels // 32 + self.out_channels + 2)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One dense product."""
        return dense_flops(num_nodes, self.in_channels, self.out_channels)
