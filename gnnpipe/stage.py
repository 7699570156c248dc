"""Consecutive layers over all chunks of one way: forward and backward of one chunk.

Every layer keeps an autograd graph of its own per chunk. So the gradients of parameters and
carried tensors add up layer by layer and chunk by chunk in one order, wherever the list of
layers is cut, and losses do not depend on the number of stages by a single bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gnnpipe.cell import Cell, Cells
from gnnpipe.counter import stream_key
from gnnpipe.history import Halo, Reader, Table
from gnnpipe.kernels import SparseRows, dropout_edges, dropout_rows
from gnnpipe.models.layer import EdgeValue, Layer, Rows


class Flow(NamedTuple):
    """What crosses a cut of the layer list: values forward, their gradients backward."""

    x: Tensor | SparseRows
    """``[num_rows, F]``; sparse only as input features."""
    carried: dict[str, Tensor]
    """Tensors on their way to later layers, ``[num_rows, F]`` each."""


class View:
    """The :class:`~gnnpipe.models.layer.GraphView` of one layer, one cell and one forward.

    Args:
        cell: the rows.
        reader: of the layer's table; None for row-wise layers.
        carried: tensors that the layer reads.
        key: (seed, epoch, layer index) of dropout; None in evaluation.
    """

    def __init__(
        self,
        cell: Cell,
        reader: Reader | None,
        carried: Mapping[str, Tensor],
        *,
        key: tuple[int, int, int] | None,
    ) -> None:
        self._cell = cell
        self._reader = reader
        self._carried = carried
        self._key = key
        self._num_sites = 0
        self.handed_on: dict[str, Tensor] = {}

    def aggregate(self, x: Tensor) -> Tensor:
        assert self._reader is not None
        return self._reader.aggregate(x)

    def gather(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self._reader is not None
        assert self._cell.edges is not None
        return self._reader.gather(x), self._cell.edges.edge_index

    def dropout(self, x: Rows, p: float) -> Rows:
        key = self._next_key()
        if key is None or p == 0.0:
            return x
        return dropout_rows(x, self._cell.node_id, p=p, key=key)

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


class _Record(NamedTuple):
    """One layer's graph of one chunk."""

    x: Tensor | SparseRows
    carried: dict[str, Tensor]
    out: Tensor
    handed_on: dict[str, Tensor]


class LocalLayer(NamedTuple):
    """A layer with what this rank holds for it."""

    layer_index: int
    """Position in the whole list of layers."""
    layer: Layer
    cells: Cells
    table: Table | None
    """Training table; None for row-wise layers."""


class Stage:
    """Layers ``layers[0].layer_index`` to ``layers[-1].layer_index`` of the model.

    Args:
        layers: consecutive layers.
        halo: moves table rows between the ways.
        seed: of the dropout masks.
        factor: multiplies gradients that cross chunks.
    """

    def __init__(
        self, layers: Sequence[LocalLayer], *, halo: Halo, seed: int, factor: float
    ) -> None:
        self.layers = layers
        self._halo = halo
        self._seed = seed
        self._factor = factor
        self._epoch = 0
        self._records: dict[int, list[_Record]] = {}

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, layer by layer."""
        return (p for local in self.layers for p in local.layer.parameters())

    @property
    def tables(self) -> Iterator[Table]:
        """The tables of the layers that have one."""
        return (local.table for local in self.layers if local.table is not None)

    def start_epoch(self, epoch: int, *, is_measured: bool = False) -> None:
        """Makes the tables ready for an epoch; epochs count from 1."""
        self._epoch = epoch
        for table in self.tables:
            table.start_epoch(epoch, is_measured=is_measured)

    def end_epoch(self) -> None:
        """Ends the epoch in all tables."""
        assert not self._records, "chunks without a backward"
        for table in self.tables:
            table.end_epoch(self._epoch)

    def forward(self, chunk_index: int, flow: Flow) -> Flow:
        """Computes one chunk and remembers its graphs for the backward."""
        records = []
        x, carried = flow.x, dict(flow.carried)
        for local in self.layers:
            cell = local.cells.chunks[chunk_index]
            x = x if local.layer_index == 0 else _leaf(x)
            read = {name: _leaf(carried[name]) for name in local.layer.reads}
            key = (self._seed, self._epoch, local.layer_index)
            view = View(cell, self._reader(local.table, cell), read, key=key)
            out = local.layer(x, view)
            records.append(_Record(x, read, out, view.handed_on))
            x = out.detach()
            carried |= {name: value.detach() for name, value in view.handed_on.items()}
        self._records[chunk_index] = records
        return Flow(x, carried)

    def backward(
        self,
        chunk_index: int,
        gradient: Flow,
        *,
        layer_done: Callable[[LocalLayer], None] | None = None,
    ) -> Flow:
        """Adds the chunk's parameter gradients; returns the gradient of the forward's input.

        Args:
            chunk_index: a chunk whose forward has run.
            gradient: of the forward's result; carried tensors without a reader are missing.
            layer_done: called after each layer's backward, last layer first.
        """
        dx, carried = gradient.x, dict(gradient.carried)
        records = self._records.pop(chunk_index)
        for local, record in zip(reversed(self.layers), reversed(records), strict=True):
            assert isinstance(dx, Tensor)
            roots, grads = [record.out], [dx]
            for name, value in record.handed_on.items():
                if name in carried:
                    roots.append(value)
                    grads.append(carried.pop(name))
            pairs = [p for p in zip(roots, grads, strict=True) if p[0].requires_grad]
            if pairs:  # Not below a first layer without weights.
                torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
            for name, leaf in record.carried.items():
                assert leaf.grad is not None
                carried[name] = carried[name] + leaf.grad if name in carried else leaf.grad
            dx = _gradient(record.x)
            if layer_done is not None:
                layer_done(local)
        return Flow(dx, carried)

    @torch.no_grad()
    def infer(self, flow: Flow, *, into_tables: bool = False) -> Flow:
        """Computes all rows of the way exactly: no history, no dropout.

        Args:
            flow: input of all rows.
            into_tables: leave the exact values in the training tables, as first history.
        """
        x, carried = flow.x, dict(flow.carried)
        for local in self.layers:
            cell = local.cells.whole
            with self._inference_table(local, into_tables) as table:
                view = View(cell, self._reader(table, cell), carried, key=None)
                x = local.layer(x, view)
            carried |= view.handed_on
        return Flow(x, carried)

    def _reader(self, table: Table | None, cell: Cell) -> Reader | None:
        return None if table is None else Reader(table, cell, self._halo, factor=self._factor)

    @contextmanager
    def _inference_table(self, local: LocalLayer, into_tables: bool) -> Iterator[Table | None]:
        trained = local.table
        if trained is None or into_tables:
            yield trained
            if trained is not None:
                trained.warm()
            return
        num_values, channels = trained.values.shape
        yield Table(num_values, 0, channels, like=trained.values, period=1)


def _leaf(x: Tensor | SparseRows) -> Tensor:
    assert isinstance(x, Tensor)
    return x.detach().requires_grad_()


def _gradient(x: Tensor | SparseRows) -> Tensor:
    """The gradient of a leaf; input features have none, ``[0]``."""
    if not isinstance(x, Tensor) or not x.requires_grad:
        return torch.empty(0)
    return torch.zeros_like(x) if x.grad is None else x.grad
