"""Convolutions of torch_geometric on the block of a chunk: its rows and those they read.

Two ways to hand the block to a convolution. *Bipartite*: the convolution takes a pair
``(x_src, x_dst)``. *Square*: it takes one tensor, so own and halo rows become one graph in
which halo rows receive nothing, and only the own rows of the result are kept::

    x_src  own rows | halo rows       edges  source in own or halo, target in own
    x_dst  own rows                   result own rows

What a convolution would compute from the degrees of its sources is wrong inside a block, because
the edges into halo rows are elsewhere. Such coefficients come from the whole graph, as weights.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gnnpipe.kernels import SparseRows
from gnnpipe.models.cost import dense_flops, edge_flops
from gnnpipe.models.foreign.run import dense, foreign, reset
from gnnpipe.models.layer import EdgeValue, GraphView, Layer, Operator

EDGE_ARGUMENTS: Mapping[str, EdgeValue] = {
    "edge_weight": "weight",
    "edge_attr": "attr",
    "edge_type": "type",
}
"""Arguments of a convolution that hold one value for each edge."""

BlockKind = Literal["bipartite", "square"]


class BlockLayer(Layer):
    """A foreign convolution on blocks.

    What neighbours read is the convolution's input, before its weights.

    Args:
        conv: its ``forward`` takes ``x``, ``edge_index`` and some of ``arguments``.
        kind: how it takes the rows.
        in_channels: width of the input.
        out_channels: width of the output.
        operator: ``edges``, or ``edges_gcn`` and ``edges_sym`` for normalised weights.
        arguments: names of what else it takes: ``edge_weight``, ``edge_attr``, ``edge_type``,
            ``x_0``, and ``pos_edge_index`` with ``neg_edge_index`` instead of ``edge_index``.
        first_rows: carried name of ``x_0``.
    """

    adapters: ClassVar[tuple[BlockKind, ...]] = ("bipartite", "square")

    def __init__(
        self,
        conv: nn.Module,
        kind: BlockKind,
        *,
        widths: tuple[int, int],
        operator: Operator = "edges",
        arguments: tuple[str, ...] = (),
        first_rows: str = "x_0",
    ) -> None:
        super().__init__()
        self.conv = conv
        self.kind = kind
        self.in_channels, self.out_channels = widths
        self.table_channels = self.in_channels
        self.operator = operator
        self.arguments = arguments
        self.reads = (first_rows,) if "x_0" in arguments else ()

    def forward(self, x: Tensor | SparseRows, graph: GraphView) -> Tensor:
        """Convolves the rows with those they read."""
        x = dense(x)
        x_src, edge_index = graph.gather(x)
        keywords = self._keywords(edge_index, graph, x_src.shape[0])
        rows = (x_src, x) if self.kind == "bipartite" else x_src
        with foreign(self.conv, graph):
            out: Tensor = self.conv(rows, **keywords)
        return out[: x.shape[0]]

    def reset_parameters(self) -> None:
        """Draws the convolution's weights by its own rule."""
        reset(self.conv)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """A product with every weight, and rows gathered, changed and summed edge by edge."""
        weights = sum(p.numel() for p in self.conv.parameters() if p.ndim == 2)
        width = max(self.in_channels, self.out_channels)
        return dense_flops(num_nodes, weights, 1) + 3.0 * edge_flops(num_edges, width)

    def _keywords(self, edge_index: Tensor, graph: GraphView, num_src: int) -> dict[str, Tensor]:
        found = {}
        for name in self.arguments:
            if name in EDGE_ARGUMENTS:
                value = graph.edge_values(EDGE_ARGUMENTS[name])
                assert value is not None, name
                found[name] = value
        if "x_0" in self.arguments:
            first = graph.carried(self.reads[0])
            padding = num_src - first.shape[0] if self.kind == "square" else 0
            found["x_0"] = nn.functional.pad(first, (0, 0, 0, padding))
        if "pos_edge_index" not in self.arguments:
            return {"edge_index": edge_index, **found}
        is_positive = signs(graph.edge_values("type"), graph.edge_values("weight"))
        pos, neg = edge_index[:, is_positive], edge_index[:, ~is_positive]
        return {"pos_edge_index": pos, "neg_edge_index": neg, **found}


def signs(type_id: Tensor | None, weight: Tensor | None) -> Tensor:
    """Which edges of a signed graph are positive: those of type 0, or of a weight above 0."""
    if type_id is not None:
        return type_id == 0
    assert weight is not None
    return torch.gt(weight, 0)
