"""The one thing that knows about staleness: a layer's table of fresh and historical values.

A row of the table is overwritten when its chunk is computed. Whoever reads the table in between
sees fresh values of the chunks done before it in this epoch's order and last epoch's values of
the others, without asking which is which. Backward runs in exactly the reverse order, so the
same trick holds for gradients: the rows of the gradient table that are not zero belong to the
chunks that came later in the order, and those are exactly the readers of this chunk's fresh
values::

    order 0 1 2           forward of chunk 1            backward of chunk 1
    values    [fresh 0 | fresh 1 | historical 2]
    gradient                                        [0 | own of 1 | done: 2]

A gradient that crosses chunks is multiplied by ``cross_chunk_gradient`` (GNNPipe, arXiv
2308.10087): each ordered pair of chunks is fresh in half of the random orders, so a factor of 2
restores the expectation of a single crossing.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from gnnpipe.cell import Cell, Exchange, Halves
from gnnpipe.kernels import RowBlock, aggregate, prepare
from gnnpipe.recall import LateGradients, Recall


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


class Table:
    """Values and gradients of the tensor that one layer aggregates or gathers.

    A row of ``gradients`` that belongs to an aggregation is used twice: from the forward of its
    chunk to its backward it holds the aggregated row, which the layer's own backward needs, and
    from then on that row's gradient, which other chunks read. ``gate`` tells which is which.

    Args:
        num_values: own rows and in-mirrors.
        num_gradients: own rows and the mirrors of the backward; 0 for inference.
        channels: width.
        like: a tensor that gives dtype and device.
        period: epochs between refreshes of the historical values, see :meth:`start_epoch`.
        recall: what is remembered instead of the last values.
        late: last epoch's gradients, of an aggregation.
        scratch: memory for the gradients that other tables use too; only where no chunk reads
            another's rows, and where a layer's forward is run again before its backward.
        dtype: of the values; None is that of ``like``.
    """

    def __init__(
        self,
        num_values: int,
        num_gradients: int,
        channels: int,
        *,
        like: Tensor,
        period: int,
        recall: Recall | None = None,
        late: LateGradients | None = None,
        scratch: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.values = like.new_zeros((num_values, channels), dtype=dtype)
        self.is_shared = scratch is not None
        if scratch is None:
            scratch = like.new_zeros((num_gradients, channels))
        self.gradients = scratch
        self.gate = like.new_zeros(num_gradients)
        """Factor of each gradient row for its readers, 0 before it is known."""
        self.drift: Tensor | None = None
        self._is_zeroed = False
        self._period = period
        self._snapshot = self.values.clone() if period > 1 and recall is None else None
        self.recall = recall
        self.late = late

    def start_epoch(self, epoch: int, *, is_measured: bool = False) -> None:
        """Makes last epoch's values historical; with a period, the frozen snapshot instead.

        Epochs count from 1. Snapshots are taken at the end of every ``period``-th epoch.

        Args:
            epoch: the epoch that starts.
            is_measured: let :attr:`drift` add up, over the own rows, the squared change from
                historical to fresh and the squared size of the fresh values, ``[2]``, float64.
        """
        self.start_step()
        self.drift = torch.zeros(2, dtype=torch.float64) if is_measured else None
        if self._snapshot is not None and (epoch - 1) % self._period != 0:
            self.values.copy_(self._snapshot)
        if self.recall is not None:
            self.recall.start_epoch(epoch)

    def start_step(self) -> None:
        """Forgets all gradients: what is fresh from here on is so to this step's rows only."""
        self.gate.zero_()
        self._is_zeroed = False
        if self.late is not None:
            self.late.start_step()

    def end_epoch(self, epoch: int) -> None:
        """Takes the snapshot when a period ends."""
        if self._snapshot is not None and epoch % self._period == 0:
            self._snapshot.copy_(self.values)
        if self.recall is not None:
            self.recall.end_epoch()

    def warm(self) -> None:
        """Takes the values as they stand for the first history."""
        if self.recall is not None:
            self.recall.warm(self.values[: self.recall.last.shape[0]])
        if self._snapshot is not None:
            self._snapshot.copy_(self.values)

    def for_inference(self, channels: int) -> "Table":
        """A table for exact values between two steps: in the gradients' memory if they fit.

        Args:
            channels: width; an engine that only evaluates has tables without any.
        """
        num_values = self.values.shape[0]
        is_enough = self.gradients.shape[0] >= num_values
        table = Table(0 if is_enough else num_values, 0, channels, like=self.gate, period=1)
        if is_enough:
            table.values = self.gradients[:num_values]
        return table

    @property
    def is_exact(self) -> bool:
        """Whether the values are held as they were computed."""
        return self.values.dtype == self.gradients.dtype

    def zeroed_gradients(self) -> Tensor:
        """The gradients of a gather, which are added up: zero at first use in an epoch."""
        if not self._is_zeroed:
            self.gradients.zero_()
            self._is_zeroed = True
        return self.gradients

    @property
    def historical(self) -> Tensor:
        """What is kept for the next epoch, between two epochs; of own rows at least."""
        if self.recall is not None:
            return self.recall.last
        return self.values if self._snapshot is None else self._snapshot

    @property
    def num_bytes(self) -> int:
        """Memory of all arrays of its own, bytes."""
        arrays = [self.values, *([] if self.is_shared else [self.gradients])]
        arrays += [] if self._snapshot is None else [self._snapshot]
        arrays += [] if self.recall is None else self.recall.arrays
        arrays += [] if self.late is None else [self.late.rows]
        return sum(array.numel() * array.element_size() for array in arrays)


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
        kept: None where the forward will not be run again.
    """

    def __init__(
        self, table: Table, cell: Cell, halo: Halo, *, factor: float, kept: Kept | None = None
    ) -> None:
        self.table = table
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
        if is_same_memory(rows, x):
            return self.halo.pull(self.table.values, self.cell.in_exchanges)
        if self.table.drift is not None:
            squares = (rows - x).square().sum(), x.square().sum()
            self.table.drift += torch.stack(squares).cpu()
        rows.copy_(x)
        return self.halo.pull(self.table.values, self.cell.in_exchanges)

    def sum(self, wait: Callable[[], None], out: Tensor | None) -> Tensor:
        """The operator's rows times the table.

        Args:
            wait: until the rows of other ways are there.
            out: where to write; None allocates.
        """
        return self._forward(wait, out)

    def back(self, out: Tensor | None) -> Tensor:
        """The gradient of the cell's values; that of its sums lies in the table.

        Args:
            out: where to write; None allocates.
        """
        table, late = self.table, self.table.late
        wait = self.halo.pull(table.gradients, self.cell.out_exchanges)
        # Co-processed cells of the other ways belong to this chunk: factor 1 for all of it.
        for gate in self._gates:
            gate.fill_(1.0)
        dx = self._backward(wait, out)
        if late is not None:
            self._add_late(dx, late)
        # From here on these rows are read by other chunks only.
        for gate in self._gates:
            gate.fill_(self.factor)
        return dx

    def _add_late(self, dx: Tensor, late: LateGradients) -> None:
        """Adds last epoch's gradients of readers that are still to come, and keeps this one's."""
        assert self.cell.backward is not None
        for rows in (self.cell.rows, self.cell.out_mirrors):
            late.close(rows)
            late.take(self.table.gradients, rows)
        if not self.cell.is_closed:
            dx += aggregate(self.cell.backward, late.rows, gate=late.gate)

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
        # Rows of chunks that come later in the order were historical. They are done already
        # in the backward, so what is added to them here is never read.
        gradients[edges.halo] += torch.where(edges.is_fresh_halo, outside, outside * reader.factor)
        reader.halo.push(gradients, cell.in_exchanges)
        return grads[0][:num_rows] + gradients[cell.rows], None
