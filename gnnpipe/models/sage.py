"""GraphSAGE: the mean or maximum over the neighbours beside the node's own row."""

from torch import Tensor, nn

from gnnpipe.models.convolution import Affine, Convolution
from gnnpipe.models.cost import dense_flops, edge_flops
from gnnpipe.models.layer import GraphView
from gnnpipe.sections import AggregatorName


class SAGELayer(Convolution):
    """Hamilton, Ying and Leskovec, "Inductive representation learning on large graphs".

    ``convolve(x) = (D^-1 A x) W_l^T + b + x W_r^T``, equal to torch_geometric's ``SAGEConv``
    with ``aggr="mean"``, or with the neighbours' maximum in each column instead of their mean, as
    with ``aggr="max"``; edge weights play no part.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        dropout: probability of a zero in the input, in [0, 1).
        aggregator: ``mean`` or ``max``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        aggregator: AggregatorName = "mean",
    ) -> None:
        super().__init__(in_channels, out_channels, dropout=dropout)
        self.is_mean = aggregator == "mean"
        self.operator = "mean" if self.is_mean else "edges"
        self.aggregates_input = self.is_mean
        self.table_channels = in_channels
        self.lin_l = nn.Linear(in_channels, out_channels)
        self.lin_r = nn.Linear(in_channels, out_channels, bias=False)

    def convolve(self, x: Tensor, graph: GraphView) -> Tensor:
        """Adds what the neighbours give, transformed, and the transformed row."""
        around = graph.aggregate(x) if self.is_mean else graph.largest(graph.gather(x)[0])
        h: Tensor = self.lin_l(around) + self.lin_r(x)
        return h

    def affine(self) -> Affine | None:
        """Both products."""
        if not self.is_mean:
            return None
        return Affine(self.lin_l.weight, rows=self.lin_r.weight, bias=self.lin_l.bias)

    def reset_parameters(self) -> None:
        """Draws the weights uniformly within ``1 / sqrt(in_channels)``."""
        super().reset_parameters()
        self.lin_l.reset_parameters()
        self.lin_r.reset_parameters()

    def kept_numbers(self, num_rows: int, num_edges: int) -> int:
        """A bit of the output; the inputs of both products lie in the table.

        Of maxima the rows, dropped out and gathered, the maxima and who gave them.
        """
        kept = 0 if self.is_mean else 4 * num_rows * self.in_channels
        return kept + num_rows * self.out_channels // 32 + self.norm_numbers(num_rows)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """Two dense products and one sum over the edges."""
        dense = dense_flops(num_nodes, self.in_channels, self.out_channels)
        return 2.0 * dense + edge_flops(num_edges, self.table_channels)
