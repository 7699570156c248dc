"""What one layer sees of the graph while it runs on the rows of one cell."""

from collections.abc import Mapping

from torch import Tensor, nn

from gnnpipe.cell import Cell
from gnnpipe.counter import stream_key
from gnnpipe.kernels import (
    EdgeDrop,
    attend,
    dropout_edges,
    dropout_rows,
    dropped_rows,
    largest,
    relu,
)
from gnnpipe.models.layer import NEGATIVE_SLOPE, EdgeValue, Rows
from gnnpipe.moments import NO_NORMS, Norms
from gnnpipe.reader import Reader


class View:
    """The :class:`~gnnpipe.models.layer.GraphView` of one layer, one cell and one forward.

    Args:
        cell: the rows.
        reader: of the layer's table; None for row-wise layers.
        carried: tensors that the layer reads.
        key: (seed, epoch, layer index) of dropout; None in evaluation.
        drops_table: what the first dropout gives is what the layer aggregates, so it may be made
            in the table.
        is_dropped: the layer was given what the first dropout has made in the table before.
        norms: the layer's norms over nodes.
    """

    def __init__(
        self,
        cell: Cell,
        reader: Reader | None,
        carried: Mapping[str, Tensor],
        *,
        key: tuple[int, int, int] | None,
        drops_table: bool = False,
        is_dropped: bool = False,
        norms: Norms = NO_NORMS,
    ) -> None:
        self._norms = norms
        self._is_dropped = is_dropped
        self._drops_table = drops_table
        self._cell = cell
        self.reader = reader
        self._carried = carried
        self._key = key
        self._num_sites = 0
        self.handed_on: dict[str, Tensor] = {}
        self.in_table: Tensor | None = None
        """What the first dropout gave, if the table is going to hold the same numbers."""

    def aggregate(self, x: Tensor) -> Tensor:
        assert self.reader is not None
        return self.reader.aggregate(x)

    def gather(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.reader is not None
        assert self._cell.edges is not None
        return self.reader.gather(x), self._cell.edges.edge_index

    def dropout(self, x: Rows, p: float) -> Rows:
        key = self._next_key()
        if key is None:
            return x
        if not isinstance(x, Tensor):
            return dropout_rows(x, self._cell.node_id, p=p, key=key) if p else x
        if self._drops_table and self._num_sites == 1 and self.reader is not None:
            return self._dropout_for(self.reader, x, p, key)
        return dropout_rows(x, self._cell.node_id, p=p, key=key) if p else x

    def _dropout_for(self, reader: Reader, x: Tensor, p: float, key: int) -> Tensor:
        """The rows that the layer will aggregate, in the table if they can be made there."""
        node_id = self._cell.node_id
        if self._is_dropped:
            x = dropped_rows(x, node_id, p=p, key=key) if p else x
        elif p:
            reader.keep(x)
            x = dropout_rows(x, node_id, p=p, key=key, out=reader.own_rows(x))
        self.in_table = reader.rounded(x)
        return self.in_table

    def normalise(self, x: Tensor, norm: nn.Module) -> Tensor:
        if norm not in self._norms:
            normed: Tensor = norm(x)
            return normed
        moments = self._norms[norm]
        return moments.infer(x) if self._key is None else moments.train(x, self._cell.place[0])

    def relu(self, x: Tensor) -> Tensor:
        return relu(x)

    def attend(self, x_src: Tensor, logits: tuple[Tensor, Tensor], p: float) -> Tensor:
        key, edges = self._next_key(), self._cell.edges
        assert edges is not None
        ids = (edges.source_id, edges.target_id)
        drop = None if key is None or p == 0.0 else EdgeDrop(*ids, p, key)
        return attend(x_src, *logits, order=edges.order, slope=NEGATIVE_SLOPE, drop=drop)

    def largest(self, x_src: Tensor) -> Tensor:
        edges = self._cell.edges
        assert edges is not None
        return largest(x_src, order=edges.order, source_id=edges.source_id)

    def edge_dropout(self, alpha: Tensor, p: float) -> Tensor:
        key = self._next_key()
        if key is None or p == 0.0:
            return alpha
        edges = self._cell.edges
        assert edges is not None
        ids = (edges.source_id, edges.target_id)
        return dropout_edges(alpha, *ids, p=p, key=key)

    def edge_values(self, name: EdgeValue) -> Tensor | None:
        assert self._cell.edges is not None
        return self._cell.edges.values.get(name)

    def foreign_seed(self) -> int | None:
        return None if self._key is None else stream_key(*self._key, *self._cell.place)

    def carry(self, name: str, value: Tensor) -> None:
        self.handed_on[name] = value

    def carried(self, name: str) -> Tensor:
        return self._carried[name]

    def _next_key(self) -> int | None:
        if self._key is None:
            return None
        self._num_sites += 1
        return stream_key(*self._key, self._num_sites - 1)
