"""One layer's table without an engine around it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gnnpipe.cell import Cells, Exchange, build_cells
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.history import Table
from gnnpipe.reader import Reader
from gnnpipe.way import way_graph

LIKE = torch.empty(0, dtype=torch.float64)


class Alone:
    """The halo of a single way: there is nobody to trade with."""

    def pull(self, table: Tensor, exchanges: Sequence[Exchange]) -> Callable[[], None]:
        assert not exchanges
        return lambda: None

    def push(self, table: Tensor, exchanges: Sequence[Exchange]) -> None:
        assert not exchanges

    def add_up(self, numbers: Tensor) -> Tensor:
        return numbers

    def start_add_up(self, numbers: Tensor) -> Callable[[], None]:
        return lambda: None


class Way:
    """One way's cells and table."""

    def __init__(
        self, chunked: ChunkedGraph, operator: str, *, way: int = 0, num_ways: int = 1
    ) -> None:
        graph = way_graph(chunked, way=way, num_ways=num_ways)
        self.cells: Cells = build_cells(
            graph, operator=operator, dtype=torch.float64, device=torch.device("cpu")
        )
        is_gather = operator.startswith("edges")
        mirrors = graph.in_mirrors if is_gather else graph.out_mirrors
        self.num_rows = graph.num_rows
        self.num_values = graph.num_rows + graph.in_mirrors.row_id.size
        self.num_gradients = graph.num_rows + mirrors.row_id.size
        self.node_id = torch.from_numpy(graph.node_id)

    def table(self, channels: int = 1, *, period: int = 1) -> Table:
        sizes = (self.num_values, self.num_gradients, channels)
        return Table(*sizes, like=LIKE, period=period)


def look(reader: Reader, x: Tensor) -> Tensor:
    """What a layer would make of the neighbours."""
    if reader.cell.edges is None:
        return reader.aggregate(x)
    source, target = reader.cell.edges.edge_index
    rows = reader.gather(x)
    messages = rows[source] * (1.0 + 0.1 * x[target])
    return torch.zeros_like(x).index_add(0, target, messages)
