"""Consecutive layers over all chunks of one way: forward and backward of one chunk.

Every layer keeps an autograd graph of its own per chunk. So the gradients of parameters and
carried tensors add up layer by layer and chunk by chunk in one order, wherever the list of
layers is cut, and losses do not depend on the number of stages by a single bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gnnpipe.cell import Cell, Cells
from gnnpipe.counter import stream_key
from gnnpipe.history import Halo, Reader, Table
from gnnpipe.kernels import EdgeDrop, SparseRows, attend, dropout_edges, dropout_rows, relu
from gnnpipe.models.layer import NEGATIVE_SLOPE, EdgeValue, Layer, Rows
from gnnpipe.shortage import AskingFor


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
        drops_table: what the first dropout gives is what the layer aggregates, so it may be made
            in the table.
    """

    def __init__(
        self,
        cell: Cell,
        reader: Reader | None,
        carried: Mapping[str, Tensor],
        *,
        key: tuple[int, int, int] | None,
        drops_table: bool = False,
    ) -> None:
        self._drops_table = drops_table
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
        if not isinstance(x, Tensor):
            return dropout_rows(x, self._cell.node_id, p=p, key=key)
        out = None
        if self._drops_table and self._num_sites == 1 and self._reader is not None:
            self._reader.keep(x)
            out = self._reader.own_rows(x)
        return dropout_rows(x, self._cell.node_id, p=p, key=key, out=out)

    def relu(self, x: Tensor) -> Tensor:
        return relu(x)

    def attend(self, x_src: Tensor, logits: tuple[Tensor, Tensor], p: float) -> Tensor:
        key, edges = self._next_key(), self._cell.edges
        assert edges is not None
        ids = (edges.source_id, edges.target_id)
        drop = None if key is None or p == 0.0 else EdgeDrop(*ids, p, key)
        return attend(x_src, *logits, order=edges.order, slope=NEGATIVE_SLOPE, drop=drop)

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

    x: "_Entry | None"
    """None where the rows have no gradient: input features."""
    carried: "dict[str, _Entry]"
    out: GradientEdge | None
    handed_on: dict[str, GradientEdge | None]


class _Entry:
    """Where a layer's graph ends: takes the gradient, and does not hold the values.

    Why not a leaf: it would keep the rows until the backward, whether or not anyone needs them.
    """

    def __init__(self, value: Tensor) -> None:
        self.grad: Tensor | None = None
        self._like = value.shape, value.dtype, value.device

    def rows(self, value: Tensor) -> Tensor:
        """The values, with this end behind them."""
        handle = value.new_zeros(()).requires_grad_()
        rows: Tensor = _Enter.apply(handle, value, self)  # type: ignore[no-untyped-call]
        return rows

    def gradient(self) -> Tensor:
        """What has arrived; zeros if the layer did not use the rows."""
        shape, dtype, device = self._like
        return torch.zeros(shape, dtype=dtype, device=device) if self.grad is None else self.grad


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, value: Tensor, entry: _Entry) -> Tensor:  # Any: torch's
        ctx.entry = entry
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.entry.grad = grads[0]
        return None, None, None


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
        for local in self.layers:
            self._recall(local)

    def _recall(self, local: LocalLayer) -> None:
        """Puts kept rows into the table, dropped out as the epoch's fresh rows will be."""
        table, cell = local.table, local.cells.whole
        if table is None or table.recall is None:
            return
        rows, p = table.recall.rows(), local.layer.dropout
        if table.recall.is_clean and local.layer.aggregates_input and p:
            key = stream_key(self._seed, self._epoch, local.layer_index, 0)
            rows = dropout_rows(rows, cell.node_id, p=p, key=key)
        table.values[cell.rows] = rows
        self._halo.pull(table.values, cell.in_exchanges)()

    def start_step(self) -> None:
        """No gradient of the step before reaches the next; its rows are historical now."""
        for table in self.tables:
            table.start_step()

    def end_step(self, *, has_backward: bool = True) -> None:
        """Ends an optimizer step.

        Args:
            has_backward: False drops what forwards have kept.
        """
        if not has_backward:
            self._records.clear()
        assert not self._records, "chunks without a backward"

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
            entry = _Entry(x) if local.layer_index > 0 and isinstance(x, Tensor) else None
            if entry is not None and isinstance(x, Tensor):
                x = entry.rows(x)
            entries = {name: _Entry(carried[name]) for name in local.layer.reads}
            read = {name: entries[name].rows(carried[name]) for name in entries}
            key = (self._seed, self._epoch, local.layer_index)
            reader, in_place = self._reader(local.table, cell), local.layer.aggregates_input
            view = View(cell, reader, read, key=key, drops_table=in_place)
            with AskingFor("forward", f"activations of layer {local.layer_index}"):
                out = local.layer(x, view)
            edges = {name: _edge(value) for name, value in view.handed_on.items()}
            records.append(_Record(entry, entries, _edge(out), edges))
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
        for local in reversed(self.layers):
            record = records.pop()  # Its gradients go when the layer before has used them.
            assert isinstance(dx, Tensor)
            roots, grads = [record.out], [dx]
            for name, value in record.handed_on.items():
                if name in carried:
                    roots.append(value)
                    grads.append(carried.pop(name))
            pairs = [
                (edge, grad) for edge, grad in zip(roots, grads, strict=True) if edge is not None
            ]
            if pairs:  # Not below a first layer without weights.
                with AskingFor("backward", f"gradients of layer {local.layer_index}"):
                    torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])
            for name, entry in record.carried.items():
                assert entry.grad is not None
                carried[name] = carried[name] + entry.grad if name in carried else entry.grad
            dx = torch.empty(0) if record.x is None else record.x.gradient()
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
                with AskingFor("evaluation", f"all rows of layer {local.layer_index}"):
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
        yield trained.for_inference(local.layer.table_channels)


def _edge(value: Tensor) -> GradientEdge | None:
    """Where the backward of a value starts; the value itself need not be kept for it."""
    return get_gradient_edge(value) if value.requires_grad else None
