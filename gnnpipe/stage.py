"""Consecutive layers over all chunks of one way: forward and backward of one chunk.

Every layer keeps an autograd graph of its own per chunk. So the gradients of parameters and
carried tensors add up layer by layer and chunk by chunk in one order, wherever the list of
layers is cut, and losses do not depend on the number of stages by a single bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gnnpipe.by_hand import Buffers, ByHand, Shared
from gnnpipe.cell import WHOLE, Cell, Cells
from gnnpipe.counter import stream_key
from gnnpipe.history import Table
from gnnpipe.kernels import HalfProducts, SparseRows, dropout_rows
from gnnpipe.models.convolution import affine_of
from gnnpipe.models.layer import Layer
from gnnpipe.moments import NO_NORMS, Norms
from gnnpipe.reader import Halo, Kept, Reader, alias
from gnnpipe.record import Entry, Offload, Recipe, Record, TableRows, edge
from gnnpipe.shortage import AskingFor
from gnnpipe.stretch import Capture, Later, Stretch, add_carried
from gnnpipe.view import View


class Flow(NamedTuple):
    """What crosses a cut of the layer list: values forward, their gradients backward."""

    x: Tensor | SparseRows
    """``[num_rows, F]``; sparse only as input features."""
    carried: dict[str, Tensor]
    """Tensors on their way to later layers, ``[num_rows, F]`` each."""


class LocalLayer(NamedTuple):
    """A layer with what this rank holds for it."""

    layer_index: int
    """Position in the whole list of layers."""
    layer: Layer
    cells: Cells
    table: Table | None
    """Training table; None for row-wise layers."""
    norms: Norms = NO_NORMS
    """The layer's norms over nodes, and what each knows of them."""


class Stage:
    """Layers ``layers[0].layer_index`` to ``layers[-1].layer_index`` of the model.

    Args:
        layers: consecutive layers.
        halo: moves table rows between the ways.
        seed: of the dropout masks.
        factor: multiplies gradients that cross chunks.
        mode: where what backwards need comes from: ``keep``, ``recompute`` or ``offload``.
        precision: of dense products, ``fp32`` (as everything else) or ``bf16``.
        capture: of what a chunk's layers launch, to launch it together; None captures nothing.
    """

    def __init__(
        self,
        layers: Sequence[LocalLayer],
        *,
        halo: Halo,
        seed: int,
        factor: float,
        mode: str = "keep",
        precision: str = "fp32",
        capture: Capture | None = None,
    ) -> None:
        self.layers = layers
        self._halo = halo
        self._seed = seed
        self._factor = factor
        self._mode = mode
        self._precision = precision
        self._epoch = 0
        self._records: dict[int, list[Record | Recipe]] = {}
        self._later: dict[int, Later] = {}
        self._done: list[int] = []
        """Chunks whose backward this step has run."""
        compensations = (t.compensation for t in self.tables if t.compensation is not None)
        self._stale = list(dict.fromkeys(c.stale for c in compensations))
        is_half, is_captured = precision == "bf16", capture is not None
        shared = Shared(halo, seed, factor, is_half, Buffers(), is_captured)
        self._parts = _parts(layers, shared, capture)

    def run_by_autograd(self) -> None:
        """From here on no layer runs by hand."""
        self._parts = list(self.layers)

    @property
    def stretches(self) -> list[Stretch]:
        """The layers that run without autograd."""
        return [part for part in self._parts if isinstance(part, Stretch)]

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
        for table in self.tables:
            if table.is_put_back:
                table.recount()
        for stretch in self.stretches:
            stretch.start_epoch(epoch)

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
        for stale in self._stale:
            stale.start_step()
        for stretch in self.stretches:
            stretch.start_step()

    def end_step(self, *, has_backward: bool = True) -> None:
        """Ends an optimizer step.

        Args:
            has_backward: False drops what forwards have kept.
        """
        if not has_backward:
            self._records.clear()
            for stretch in self.stretches:
                stretch.forget()
        assert not self._records, "chunks without a backward"
        assert not self._later, "backwards without their second half"
        for local in self.layers:
            self._settle(local)
            for moments in local.norms.values():
                moments.end_step()
        self._done.clear()

    def _settle(self, local: LocalLayer) -> None:
        """Leaves the step's gradients to those who read them late."""
        if local.table is None or local.table.late is None:
            return
        for cell in map(local.cells.at, self._done):
            for rows in (cell.rows, cell.out_mirrors):
                if rows.stop > rows.start:
                    local.table.late.settle(local.table.gradients, rows)

    def end_epoch(self) -> None:
        """Ends the epoch in all tables."""
        assert not self._records, "chunks without a backward"
        for table in self.tables:
            table.end_epoch(self._epoch)

    def enter(self, chunk_index: int) -> None:
        """Looks what a chunk that is to be computed next will read of historical rows."""
        for stale in self._stale:
            stale.enter(chunk_index)

    def forward(self, chunk_index: int, flow: Flow) -> Flow:
        """Computes one chunk, or :data:`~gnnpipe.cell.WHOLE`, for a backward to come.

        Args:
            chunk_index: the chunk that was entered last.
            flow: its input.
        """
        records: list[Record | Recipe] = []
        x, carried = flow.x, dict(flow.carried)
        for local in self._parts:
            if isinstance(local, Stretch):
                assert isinstance(x, Tensor)
                x = local.forward(chunk_index, x, carried)
                continue
            read = {name: carried[name] for name in local.layer.reads}
            recipe = Recipe(x, read, Kept() if self._mode == "recompute" else None)
            out, record, handed_on = self._run(local, chunk_index, recipe)
            is_record = recipe.kept is None
            records.append(record if is_record else self._shortened(local, recipe))
            x = out.detach()
            carried |= {name: value.detach() for name, value in handed_on.items()}
        self._records[chunk_index] = records
        return Flow(x, carried)

    def _shortened(self, local: LocalLayer, recipe: Recipe) -> Recipe:
        """The recipe without what lies in the layer's table."""
        table, x = local.table, recipe.x
        if table is None or not isinstance(x, Tensor) or not local.layer.input_lies_in_table:
            return recipe
        return recipe._replace(x=None)

    def _run(
        self, local: LocalLayer, chunk_index: int, recipe: Recipe
    ) -> tuple[Tensor, Record, dict[str, Tensor]]:
        """Runs one layer on one chunk: its result, its graph, what it hands on."""
        cell, layer, x = local.cells.at(chunk_index), local.layer, recipe.x
        if x is None:
            assert local.table is not None
            x = alias(local.table.values, cell.rows).to(local.table.gradients.dtype)
        entry = Entry(x) if local.layer_index > 0 and isinstance(x, Tensor) else None
        if entry is not None and isinstance(x, Tensor):
            x = entry.rows(x)
        entries = {name: Entry(value) for name, value in recipe.carried.items()}
        view = View(
            cell,
            self._reader(local.table, cell, chunk_index, recipe.kept),
            {name: entries[name].rows(value) for name, value in recipe.carried.items()},
            key=(self._seed, self._epoch, local.layer_index),
            drops_table=layer.aggregates_input,
            is_dropped=recipe.x is None,
            norms=local.norms,
        )
        asking = AskingFor("forward", f"activations of layer {local.layer_index}")
        products = HalfProducts() if self._precision == "bf16" else nullcontext()
        with asking, self._saving(local.table, view), products:
            out = layer(x, view)
        view.in_table = None  # What is saved holds its hooks, and they the view.
        ends = {name: edge(value) for name, value in view.handed_on.items()}
        return out, Record(entry, entries, edge(out), ends), view.handed_on

    def _saving(self, table: Table | None, view: View) -> AbstractContextManager[object]:
        """Where autograd keeps what the backward needs, while a forward runs."""
        if self._mode != "offload":
            if table is None or view.reader is None or table.is_exact:
                return nullcontext()
            return TableRows(view, alias(table.values, view.reader.cell.rows))
        tables = (part for t in self.tables for part in (t.values, t.gradients))
        return Offload([*tables, *self.parameters], pins=torch.cuda.is_available())

    def backward(
        self,
        chunk_index: int,
        gradient: Flow,
        *,
        layer_done: Callable[[int], None] | None = None,
        is_split: bool = False,
    ) -> Flow:
        """Adds the chunk's parameter gradients; returns the gradient of the forward's input.

        Args:
            chunk_index: a chunk whose forward has run.
            gradient: of the forward's result; carried tensors without a reader are missing.
            layer_done: called with a layer's index after its backward, last layer first.
            is_split: leave to :meth:`finish_backward` the gradients of weights that can be made
                apart, those of layers that run by hand.
        """
        assert not self._later, "a backward before the last one's second half"
        later = self._later.setdefault(chunk_index, []) if is_split else None
        self._done.append(chunk_index)
        dx, carried = gradient.x, dict(gradient.carried)
        records = self._records.pop(chunk_index)
        for part in reversed(self._parts):
            assert isinstance(dx, Tensor)
            if isinstance(part, Stretch):
                dx = part.backward(chunk_index, dx, carried, later=later, layer_done=layer_done)
                continue
            record = records.pop()  # Its gradients go when the layer before has used them.
            if isinstance(record, Recipe):
                record = self._again(part, chunk_index, record)
            dx = _backward_by_autograd(part, record, dx, carried)
            if layer_done is not None:
                layer_done(part.layer_index)
        return Flow(dx, carried)

    @torch.no_grad()
    def finish_backward(
        self, chunk_index: int, *, layer_done: Callable[[int], None] | None = None
    ) -> None:
        """Adds the gradients that a split backward has left.

        Args:
            chunk_index: of that backward.
            layer_done: called with each layer's index, last layer first.
        """
        for add in self._later.pop(chunk_index):
            add()
        if layer_done is not None:
            for local in reversed(self.layers):
                layer_done(local.layer_index)

    def _again(self, local: LocalLayer, chunk_index: int, recipe: Recipe) -> Record:
        """Runs a layer on a chunk as its forward ran."""
        assert recipe.kept is not None
        recipe.kept.is_again = True
        return self._run(local, chunk_index, recipe)[1]

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
                for moments in local.norms.values():
                    moments.warmed = [c.rows for c in local.cells.chunks] if into_tables else []
                reader = self._reader(table, cell, WHOLE)
                view = View(cell, reader, carried, key=None, norms=local.norms)
                with AskingFor("evaluation", f"all rows of layer {local.layer_index}"):
                    x = local.layer(x, view)
            carried |= view.handed_on
        return Flow(x, carried)

    def _reader(
        self, table: Table | None, cell: Cell, chunk: int, kept: Kept | None = None
    ) -> Reader | None:
        if table is None:
            return None
        return Reader(table, cell, self._halo, chunk=chunk, factor=self._factor, kept=kept)

    @contextmanager
    def _inference_table(self, local: LocalLayer, into_tables: bool) -> Iterator[Table | None]:
        trained = local.table
        if trained is None or into_tables:
            yield trained
            if trained is not None:
                trained.warm()
            return
        yield trained.for_inference(local.layer.table_channels)


def _backward_by_autograd(
    local: LocalLayer, record: Record, dx: Tensor, carried: dict[str, Tensor]
) -> Tensor:
    roots, grads = [record.out], [dx]
    for name, value in record.handed_on.items():
        if name in carried:
            roots.append(value)
            grads.append(carried.pop(name))
    pairs = [(end, grad) for end, grad in zip(roots, grads, strict=True) if end is not None]
    if pairs:  # Not below a first layer without weights.
        with AskingFor("backward", f"gradients of layer {local.layer_index}"):
            torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])
    for name, entry in record.carried.items():
        assert entry.grad is not None
        add_carried(carried, name, entry.grad)
    return torch.empty(0) if record.x is None else record.x.gradient()


def _parts(
    layers: Sequence[LocalLayer], shared: Shared, capture: Capture | None
) -> list[LocalLayer | Stretch]:
    """The layers; neighbours that can run without autograd stand together."""
    parts: list[LocalLayer | Stretch] = []
    hands: list[ByHand] = []
    for local in layers:
        hand = _hand_of(local, shared)
        if hand is None:
            parts.append(local)
            hands = []
            continue
        if not hands:
            parts.append(Stretch(hands, capture))
        hands.append(hand)
    return parts


def _hand_of(local: LocalLayer, shared: Shared) -> ByHand | None:
    index, layer, cells, table, _ = local
    affine = affine_of(layer) if index > 0 else None
    if affine is None or table is None or not table.gradients.numel():
        return None
    return ByHand(affine, table, cells, shared, layer_index=index, dropout=layer.dropout)
