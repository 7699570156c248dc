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

import torch
from torch import Tensor

from gnnpipe.compensation import Compensation
from gnnpipe.recall import LateGradients, Recall


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
        late: earlier epochs' gradients, of an aggregation; with them nothing needs a gate.
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
        """Adds up while a measured epoch runs."""
        self.measured: Tensor | None = None
        """What the last measured epoch has added up."""
        self._is_zeroed = False
        self._period = period
        self._snapshot = self.values.clone() if period > 1 and recall is None else None
        self.recall = recall
        self.late = late
        self.compensation: Compensation | None = None
        """What is added to historical rows where they are read."""

    def start_epoch(self, epoch: int, *, is_measured: bool = False) -> None:
        """Makes last epoch's values historical; with a period, the frozen snapshot instead.

        Epochs count from 1. Snapshots are taken at the end of every ``period``-th epoch.

        Args:
            epoch: the epoch that starts.
            is_measured: let :attr:`drift` add up, over the own rows, the squared change from
                historical to fresh and the squared size of the fresh values, ``[2]``, float64.
        """
        self.start_step()
        self.measured = None
        self.drift = torch.zeros(2, dtype=torch.float64) if is_measured else None
        if self._snapshot is not None and (epoch - 1) % self._period != 0:
            self.values.copy_(self._snapshot)
        if self.recall is not None:
            self.recall.start_epoch(epoch)
        if self.late is not None:
            self.late.start_epoch(epoch)

    def start_step(self) -> None:
        """Forgets all gradients: what is fresh from here on is so to this step's rows only."""
        self.gate.zero_()
        self._is_zeroed = False
        if self.compensation is not None:
            self.compensation.start_step()

    def recount(self) -> None:
        """Takes note of rows that were replaced otherwise than by a chunk's forward."""
        if self.compensation is not None:
            self.compensation.count()

    def end_epoch(self, epoch: int) -> None:
        """Takes the snapshot when a period ends; rows that follow are no part of the drift."""
        self.measured, self.drift = self.drift, None
        if self._snapshot is not None and epoch % self._period == 0:
            self._snapshot.copy_(self.values)
        if self.recall is not None:
            self.recall.end_epoch()

    def warm(self) -> None:
        """Takes the values as they stand for the first history."""
        self.recount()
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
    def is_put_back(self) -> bool:
        """Whether rows that are kept elsewhere become the values when an epoch starts."""
        return self.recall is not None or self._snapshot is not None

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
        arrays += [] if self.compensation is None else self.compensation.arrays
        return sum(array.numel() * array.element_size() for array in arrays)
