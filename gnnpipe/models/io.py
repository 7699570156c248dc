"""The first and the last layer of every model: features to hidden rows to class scores."""

from torch import Tensor, nn

from gnnpipe.kernels import linear
from gnnpipe.models.cost import dense_flops
from gnnpipe.models.layer import GraphView, Layer, Rows


class InputLayer(Layer):
    """Maps features to hidden rows, ``h0 = relu(dropout(x) W^T + b)``.

    Args:
        in_channels: number of features.
        out_channels: hidden width.
        dropout: probability of a zero in the features, in [0, 1).
        writes: names under which later layers read ``h0``.
        row_entries: mean number of stored features of a node, for the cost of sparse features;
            None for dense ones.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        writes: tuple[str, ...] = (),
        row_entries: float | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dropout = dropout
        self.writes = writes
        self.is_sparse = row_entries is not None
        self.row_entries = in_channels if row_entries is None else row_entries
        self.lin = nn.Linear(in_channels, out_channels)

    def forward(self, x: Rows, graph: GraphView) -> Tensor:
        """Maps ``[num_rows, in_channels]``, dense or sparse, to ``[num_rows, out_channels]``."""
        x = graph.dropout(x, self.dropout)
        h = graph.relu(linear(x, self.lin.weight, self.lin.bias))  # [num_rows, out_channels]
        for name in self.writes:
            graph.carry(name, h)
        return h

    def reset_parameters(self) -> None:
        """Draws the weights uniformly within ``1 / sqrt(in_channels)``."""
        weight = self.lin.weight
        weight.data = weight.data.contiguous()  # Numbers are drawn in the order of memory.
        self.lin.reset_parameters()
        if self.is_sparse:  # Products with sparse rows read, and give, columns of the weight.
            weight.data = weight.data.t().contiguous().t()

    def kept_numbers(self, num_rows: int, num_edges: int) -> int:
        """The dropped-out features and the output."""
        return num_rows * (round(self.row_entries) + self.out_channels)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One dense product, or one over the stored entries."""
        return dense_flops(num_nodes, self.row_entries, self.out_channels)


class OutputLayer(Layer):
    """Maps hidden rows to class scores, ``dropout(x) W^T + b``.

    Args:
        in_channels: hidden width.
        out_channels: number of classes.
        dropout: probability of a zero in the input, in [0, 1).
    """

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dropout = dropout
        self.lin = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Maps ``[num_rows, in_channels]`` to scores ``[num_rows, out_channels]``."""
        return linear(graph.dropout(x, self.dropout), self.lin.weight, self.lin.bias)

    def reset_parameters(self) -> None:
        """Draws the weights uniformly within ``1 / sqrt(in_channels)``."""
        self.lin.reset_parameters()

    def kept_numbers(self, num_rows: int, num_edges: int) -> int:
        """The input of the product and the scores."""
        return num_rows * (self.in_channels + self.out_channels)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One dense product."""
        return dense_flops(num_nodes, self.in_channels, self.out_channels)
