"""Historical rows move along with fresh ones: the mean drift of their stratum is added to them.

A neighbour whose chunk is not computed yet is read as it was an epoch ago, at other weights. What
all rows have in common of the way they went since then is known: from the rows that the step has
computed already. Nodes of about equal degree make up a stratum g. With ``D_g`` its rows done so
far in the step, this chunk's own among them, over all ways, a historical row j of it is read as ::

    h_j + c_g      c_g = (S_g + PRIOR m) / (n_g + PRIOR)      S_g = sum over D_g of (fresh - h)
                   m   = sum_g S_g / sum_g n_g                n_g = rows in D_g

so an aggregation adds ``w c`` to its sums, ``w [rows, G]`` being the weight of each row's
historical sources by stratum. Of drift that all rows of a stratum share nothing is left.

Gradients flow through c, which is made of fresh rows. What a reader has to send back along an edge
from a historical row, and cannot, reaches the rows of its stratum that are done, in equal parts::

    exact      source j  <--- w_ij dz_i         its own readers, all of them
    here       source j  <--- its fresh readers, and (1 / n_g) of what the others send to g

So nothing of the gradient's sum is lost, however often a path leaves a chunk against the order or
comes back to it; what is averaged is who gets it. Degrees make good strata because they keep this
stable: with symmetric normalisation the exact operator preserves ``sqrt(degree)``, and so does a
mean over rows of equal degree, while one over all rows lets hubs grow from layer to layer.

Where late gradients stand in for those of historical rows (:mod:`gnnpipe.recall`), a reader owes
what its gradient is more than the late one: ``dz_i - late_i`` for ``dz_i``.

The forward is a control variate as in VR-GCN (Chen, Zhu and Song, ICML 2018, arXiv 1710.10568),
post-stratified (Holt and Smith, "Post stratification", 1979).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gnnpipe.cell import Cells
from gnnpipe.kernels import (
    indicator,
    prepare_collect,
    prepare_move,
    prepare_pay,
    prepare_sum,
    stale_shares,
)
from gnnpipe.strata import Strata

PRIOR = 5.0
"""Rows of the mean drift over all strata that each stratum's own mean counts besides."""

StartSum = Callable[[Tensor], Callable[[], None]]
"""Starts to sum a few numbers over the ways of a stage, in place; the result waits for it."""


class Stale:
    """Which rows are historical to the chunk that one stage is computing.

    Args:
        strata: of the way.
        cells: of one operator.
    """

    def __init__(self, strata: Strata, cells: Cells) -> None:
        self.strata = strata
        self.cells = cells
        self.shares: dict[int, Tensor] = {}
        """Of each chunk done in this step: what its rows read of each stratum's historical rows,
        ``[rows, G]``; where rows are gathered, the same of its halo's."""
        self.means: dict[int, Tensor] = {}
        """Of each of these chunks: what makes c of S, ``[G, G]``."""
        self._rows = strata.stratum.clone()
        self._done = strata.counts.new_zeros(strata.counts.shape[1])

    def start_step(self) -> None:
        """All rows are historical again."""
        self._rows.copy_(self.strata.stratum)
        self._done.zero_()

    def enter(self, chunk: int) -> None:
        """Makes the rows of a chunk fresh, and looks what it reads of others."""
        cell, num_strata = self.cells.chunks[chunk], self._done.numel()
        for rows in (cell.rows, cell.in_mirrors):
            self._rows[rows] = -1
        self._done += self.strata.counts[chunk]
        if chunk not in self.shares:
            num_rows = cell.node_id if cell.edges is None else cell.edges.halo
            self.shares[chunk] = self._done.new_empty((num_rows.numel(), num_strata))
            self.means[chunk] = self._done.new_empty((num_strata, num_strata))
        if cell.edges is not None:
            shares = self.shares[chunk]
            shares.copy_(indicator(self._rows[cell.edges.halo], like=shares))
        else:
            assert cell.forward is not None
            stale_shares(cell.forward, self._rows, out=self.shares[chunk])
        means = self.means[chunk]
        means.fill_(PRIOR).div_(self._done.sum())
        means.diagonal().add_(1.0)
        means.div_(self._done[:, None] + PRIOR)


class Compensation:
    """What the rows of one table have drifted, and what their readers owe to them.

    Args:
        stale: of the table's stage and operator.
        values: the table's, ``[num_values, channels]``.
        factor: multiplies gradients that cross chunks.
        start_sum: sums over the ways.
    """

    def __init__(
        self,
        stale: Stale,
        values: Tensor,
        *,
        factor: float,
        start_sum: StartSum,
    ) -> None:
        self.stale = stale
        counts = stale.strata.counts
        self._values = values
        self._sums = counts.new_zeros((*counts.shape, values.shape[1]))
        """Of each chunk's rows by stratum, as they were last written, ``[C, G, channels]``."""
        self._drift = self._sums.new_zeros(self._sums.shape[1:])
        """S."""
        self._owed = torch.zeros_like(self._drift)
        """To each row of a stratum, by later chunks."""
        self._part = torch.empty_like(self._drift)
        """What one chunk adds to either."""
        self._factor = factor
        self._start_sum = start_sum
        self._on_chunks: dict[int, _OnChunk] = {}

    @property
    def arrays(self) -> list[Tensor]:
        """Everything that takes memory."""
        return [self._sums, self._drift, self._owed, self._part]

    def start_step(self) -> None:
        """Nothing is fresh yet."""
        self._drift.zero_()
        self._owed.zero_()

    def count(self) -> None:
        """Takes the table's rows as they are for historical ones."""
        for chunk in range(len(self.stale.cells.chunks)):
            self._sum(chunk, out=self._sums[chunk])()
        self._start_sum(self._sums)()

    def arrive(self, chunk: int) -> Callable[[], None]:
        """Counts the rows of a chunk, which the table holds now.

        Returns:
            Waits for the other ways' part of them.
        """
        self._on(chunk).sum()
        return self._start_sum(self._part)

    def add(self, chunk: int, out: Tensor) -> None:
        """Adds to sums, or to the rows of a halo, what their historical rows have drifted.

        Args:
            chunk: the one that has arrived.
            out: of all its rows, or its halo's.
        """
        self._on(chunk).move(out)

    def owe(self, chunk: int, gradient: Tensor) -> Callable[[Tensor], None]:
        """Collects the gradient of what :meth:`add` has added to some rows.

        Args:
            chunk: whose.
            gradient: of its sums, or of the rows of its halo.

        Returns:
            Adds to the gradient of the chunk's own rows what they are owed.
        """
        calls = self._on(chunk)
        calls.collect(gradient)
        wait = self._start_sum(self._part)

        def pay(dx: Tensor) -> None:
            wait()
            calls.pay(dx)

        return pay

    def _on(self, chunk: int) -> "_OnChunk":
        if chunk not in self._on_chunks:
            stale, part = self.stale, self._part
            means, shares = stale.means[chunk], stale.shares[chunk]
            stratum = stale.strata.stratum[stale.cells.chunks[chunk].rows]
            self._on_chunks[chunk] = _OnChunk(
                self._sum(chunk, out=part),
                prepare_move(part, self._sums[chunk], self._drift, means=means, shares=shares),
                prepare_collect(shares, out=part),
                prepare_pay(part, self._owed, means=means, stratum=stratum, factor=self._factor),
            )
        return self._on_chunks[chunk]

    def _sum(self, chunk: int, *, out: Tensor) -> Callable[[], object]:
        rows = self.stale.cells.chunks[chunk].rows
        return prepare_sum(self._values[rows], self.stale.strata.stratum[rows], out=out)


class _OnChunk(NamedTuple):
    """What is done for one chunk, see :mod:`gnnpipe.kernels.strata`."""

    sum: Callable[[], object]
    move: Callable[[Tensor], object]
    collect: Callable[[Tensor], object]
    pay: Callable[[Tensor], object]
