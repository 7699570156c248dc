"""How one chunk reads and writes a layer's table, under autograd or by hand.

An aggregation or a gather writes the chunk's rows into the table, which makes them fresh, and
reads its neighbours' rows, whichever they are; its backward does the same with gradients. What
the table's rows mean is told in :mod:`gnnpipe.history`.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from gnnpipe.cell import WHOLE, Cell, Exchange, Halves
from gnnpipe.history import Table
from gnnpipe.kernels import RowBlock, prepare
from gnnpipe.recall import LateGradients


class Halo(Protocol):
    """Moves table rows between the ways of a stage."""

    def pull(self, table: Tensor, exchanges: Sequence[Exchange]) -> Callable[[], None]:
        """Starts to send own rows to the peers that mirror them, and to receive the mirrors.

        Returns:
            Waits until all mirrors are in place.
        """
        ...

    def push(self, table: Tensor, exchanges: Sequence[Exchange]) -> None:
        """Sends mirror rows to their owners, who add them to their rows, peer by peer."""

    def add_up(self, numbers: Tensor) -> Tensor:
        """Sums a few numbers over the ways, in place: the same bits on all of them."""
        ...

    def start_add_up(self, numbers: Tensor) -> Callable[[], None]:
        """The same; returns at once with a function that waits for the sum."""
        ...


class Kept:
    """What the forward of a chunk leaves for being run again: tables will have moved on by then.

    An aggregation's rows lie in the table until its backward. Where no chunk reads another's rows
    they are not kept: the values that they were made of are still those.
    """

    def __init__(self) -> None:
        self.is_again = False
        """Whether the forward has run, and what runs now is its repetition."""
        self.halo: Tensor | None = None
        """The rows of other cells that a gather has read."""


class Reader:
    """Reads and writes one table for one cell, under autograd.

    Args:
        table: the layer's.
        cell: whose rows.
        halo: moves rows between ways.
        factor: multiplies gradients that cross chunks.
        chunk: the cell's, or :data:`~gnnpipe.cell.WHOLE`, to which nothing is historical.
        kept: None where the forward will not be run again.
    """

    def __init__(
        self,
        table: Table,
        cell: Cell,
        halo: Halo,
        *,
        factor: float,
        chunk: int = WHOLE,
        kept: Kept | None = None,
    ) -> None:
        self.table = table
        self.chunk = chunk
        self.compensation = None if chunk == WHOLE else table.compensation
        self.cell = cell
        self.halo = halo
        self.factor = factor
        self.kept = kept
        self.is_again = kept is not None and kept.is_again
        self._is_kept = False

    def aggregate(self, x: Tensor) -> Tensor:
        """The operator's rows times the table, after ``x`` became the cell's rows."""
        out: Tensor = _Aggregate.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def gather(self, x: Tensor) -> Tensor:
        """``x`` and below it the halo rows, after ``x`` became the cell's rows."""
        out: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def keep(self, x: Tensor) -> None:
        """Keeps rows that are about to be dropped out and written, for the next epoch."""
        recall = self.table.recall
        if recall is not None and recall.is_taking and recall.is_clean and not self.is_again:
            recall.take(self.cell.rows, x.detach())
            self._is_kept = True

    def own_rows(self, x: Tensor) -> Tensor | None:
        """Where ``x`` may be made in place, so that :meth:`write` need not copy it."""
        values = self.table.values
        is_alike = values.dtype == x.dtype and values.shape[1] == x.shape[1]
        # Measuring the drift needs the old rows beside the new ones.
        return self._own_rows if is_alike and self.table.drift is None else None

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` as the table will hold it; its gradient is that of ``x``."""
        if self.table.values.dtype == x.dtype:
            return x
        rows: Tensor = _Round.apply(x, self.table.values.dtype)  # type: ignore[no-untyped-call]
        return rows

    def write(self, x: Tensor) -> Callable[[], None]:
        """Makes the cell's rows fresh, here and in the mirrors of the other ways.

        Returns:
            Waits until the other ways' rows of the chunk have arrived here.
        """
        if self.is_again:
            return lambda: None
        rows, recall = self.table.values[self.cell.rows], self.table.recall
        if recall is not None and recall.is_taking and not self._is_kept:
            recall.take(self.cell.rows, x)
        self._is_kept = False
        if not is_same_memory(rows, x):
            if self.table.drift is not None:
                squares = (rows - x).square().sum(), x.square().sum()
                self.table.drift += torch.stack(squares).cpu()
            rows.copy_(x)
        wait = self.halo.pull(self.table.values, self.cell.in_exchanges)
        if self.compensation is None:
            return wait
        count = self.compensation.arrive(self.chunk)

        def arrived() -> None:
            wait()
            count()

        return arrived

    def sum(self, wait: Callable[[], None], out: Tensor | None) -> Tensor:
        """The operator's rows times the table.

        Args:
            wait: until the rows of other ways are there.
            out: where to write; None allocates.
        """
        out = self._forward(wait, out)
        if self.compensation is not None:
            self.compensation.add(self.chunk, out)
        return out

    def owe(self, gradient: Tensor, late: Tensor | None = None) -> Callable[[Tensor], None]:
        """Takes the gradient of what compensated rows have been given.

        Args:
            gradient: of the cell's sums, or of the rows of its halo.
            late: what historical rows have got for it already.

        Returns:
            Adds to the gradient of the cell's own rows what they are owed for it, and for what
            later chunks have been given.
        """
        if self.compensation is None:
            return _nothing_owed
        return self.compensation.owe(self.chunk, gradient if late is None else gradient - late)

    def back(self, out: Tensor | None) -> Tensor:
        """The gradient of the cell's values; that of its sums lies in the table.

        Args:
            out: where to write; None allocates.
        """
        table, late = self.table, self.table.late
        wait = self.halo.pull(table.gradients, self.cell.out_exchanges)
        if late is not None:
            return self._back_late(wait, out, late)
        pay = self.owe(table.gradients[self.cell.rows])
        # Co-processed cells of the other ways belong to this chunk: factor 1 for all of it.
        for gate in self._gates:
            gate.fill_(1.0)
        dx = self._backward(wait, out)
        pay(dx)
        # From here on these rows are read by other chunks only.
        for gate in self._gates:
            gate.fill_(self.factor)
        return dx

    def _back_late(
        self, wait: Callable[[], None], out: Tensor | None, late: LateGradients
    ) -> Tensor:
        """The same, where readers to come have late gradients."""
        gradients, own, mirrors = self.table.gradients, self.cell.rows, self.cell.out_mirrors

        def wait_and_show() -> None:
            wait()
            if mirrors.stop > mirrors.start:
                self._show_mirrors()

        pay = self.owe(gradients[own], late.rows[own])
        self._show_own()
        dx = self._backward(wait_and_show, out)
        pay(dx)
        if self.factor != 1.0:  # From here on these rows are read by other chunks only.
            for rows in (own, mirrors):
                late.rows[rows] *= self.factor
        return dx

    @cached_property
    def _show_own(self) -> Callable[[], object]:
        assert self.table.late is not None
        return self.table.late.prepare_show(self.table.gradients, self.cell.rows)

    @cached_property
    def _show_mirrors(self) -> Callable[[], object]:
        assert self.table.late is not None
        return self.table.late.prepare_show(self.table.gradients, self.cell.out_mirrors)

    @cached_property
    def _own_rows(self) -> Tensor:
        return alias(self.table.values, self.cell.rows)

    @cached_property
    def _gates(self) -> list[Tensor]:
        chunk = (self.cell.rows, self.cell.out_mirrors)
        return [self.table.gate[rows] for rows in chunk if rows.stop > rows.start]

    @cached_property
    def _forward(self) -> "_Sum":
        return _overlapped(self.cell.forward, self.cell.forward_halves, self.table.values)

    @cached_property
    def _backward(self) -> "_Sum":
        cell, table = self.cell, self.table
        if table.late is not None:
            return _overlapped(cell.backward, cell.backward_halves, table.late.rows)
        gate = None if cell.is_closed else table.gate
        return _overlapped(cell.backward, cell.backward_halves, table.gradients, gate)


_Sum = Callable[[Callable[[], None], Tensor | None], Tensor]
"""Waits for messages on the way, and writes into the second argument or a new tensor."""


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:  # Any: torch's context
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Aggregate(torch.autograd.Function):
    """``z = A[cell, :] @ values``, and ``dx = A.T[cell, :] @ gradients``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reader: Reader) -> Tensor:  # Any: torch's context
        ctx.reader = reader
        cell, table, wait = reader.cell, reader.table, reader.write(x.detach())
        out = alias(table.gradients, cell.rows) if table.gradients.shape[0] else None
        if out is not None and reader.is_again and not table.is_shared:
            return out
        out = reader.sum(wait, out)
        # A layer may change what it gets; what it will get again must stay as it is.
        is_pristine = reader.kept is not None and not table.is_shared
        return out.clone() if is_pristine else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        reader: Reader = ctx.reader
        reader.table.gradients[reader.cell.rows] = grads[0]
        return reader.back(None), None


def _overlapped(
    block: RowBlock | None, halves: Halves, table: Tensor, gate: Tensor | None = None
) -> _Sum:
    """An aggregation of the rows that need no message while messages travel, then the others."""
    assert block is not None
    first = prepare(block, table, rows=halves.interior, gate=gate)
    second = None
    if halves.boundary.numel():
        second = prepare(block, table, rows=halves.boundary, gate=gate)

    def run(wait: Callable[[], None], out: Tensor | None) -> Tensor:
        if out is None:
            out = block.empty_product(table)
        first(out)
        wait()
        return out if second is None else second(out)

    return run


def alias(table: Tensor, rows: slice) -> Tensor:
    """Some rows of a table as a tensor of its own: no view, as far as autograd can tell.

    Other chunks write other rows of the table; a view would count that as changing its own.
    """
    part = table[rows]
    place = part.storage_offset(), part.shape, part.stride()
    return table.new_empty(0).set_(table.untyped_storage(), *place)


def _nothing_owed(dx: Tensor) -> None:
    """Pays where nothing is compensated."""


def is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors are the same numbers in the same place."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype


class _Gather(torch.autograd.Function):
    """``x_src = [x; values[halo]]``; gradients of halo rows are added to the gradient table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reader: Reader) -> Tensor:  # Any: torch's context
        ctx.reader = reader
        reader.write(x.detach())()
        assert reader.cell.edges is not None
        halo = reader.kept.halo if reader.kept is not None else None
        if halo is None:
            halo = reader.table.values[reader.cell.edges.halo].to(x.dtype)
            if reader.compensation is not None:
                reader.compensation.add(reader.chunk, halo)
        if reader.kept is not None:
            reader.kept.halo = halo
        return torch.cat((x.detach(), halo))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        reader: Reader = ctx.reader
        cell, gradients = reader.cell, reader.table.zeroed_gradients()
        edges, num_rows = cell.edges, cell.rows.stop - cell.rows.start
        assert edges is not None
        outside = grads[0][num_rows:]
        pay = reader.owe(outside)
        # Rows of chunks that come later in the order were historical. They are done already
        # in the backward, so what is added to them here is never read.
        gradients[edges.halo] += torch.where(edges.is_fresh_halo, outside, outside * reader.factor)
        reader.halo.push(gradients, cell.in_exchanges)
        dx = grads[0][:num_rows] + gradients[cell.rows]
        pay(dx)
        return dx, None
