"""Edges under another numbering of the nodes, and edges the other way round, in linear time."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

BLOCK_BYTES = 2**24


class Rows(NamedTuple):
    """One direction of N nodes' E edges, a row for each node."""

    indptr: NDArray[np.int64]  # [N + 1]
    indices: NDArray[np.int32]  # [E], ascending in a row

    def equals(self, other: "Rows") -> bool:
        """Whether both hold the same edges."""
        is_same_indptr = np.array_equal(self.indptr, other.indptr)
        return is_same_indptr and np.array_equal(self.indices, other.indices)


class TakenRows:
    """Rows of a memory-mapped table in another order, read when they are asked for.

    It never copies the whole: indexing gives some rows, :meth:`blocks` all of them one after the
    other.

    Args:
        table: ``[N, F]``, or only some rows of it are taken.
        order: row of the table that becomes row i, ``[M]``.
    """

    def __init__(self, table: NDArray[Any], order: NDArray[np.int64]) -> None:
        self._table, self._order = table, order
        self.shape = (len(order), *table.shape[1:])
        self.dtype = table.dtype

    def __getitem__(self, rows: Any) -> NDArray[Any]:  # Any: whatever numpy takes
        taken: NDArray[Any] = np.asarray(self._table[self._order[rows]])
        return taken

    def blocks(self) -> Iterator[NDArray[Any]]:
        """All rows, about 16 MiB at a time."""
        row_bytes = max(1, int(np.prod(self.shape[1:])) * self.dtype.itemsize)
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, len(self._order), step):
            yield self[start : start + step]


def renumbered(rows: Rows, node_id: NDArray[np.int64]) -> tuple[Rows, NDArray[np.int64]]:
    """Gives old node ``node_id[i]`` the new id i.

    Args:
        rows: the edges.
        node_id: every node once, ``[N]``.

    Returns:
        The edges in the new numbering, and the position that each had in ``rows``, ``[E]``;
        parallel edges keep their order.
    """
    new_id = np.empty(len(node_id), dtype=np.int32)
    new_id[node_id] = np.arange(len(node_id), dtype=np.int32)
    degree = np.diff(rows.indptr)[node_id]  # [N]
    indptr = np.concatenate(([0], np.cumsum(degree)))
    old = np.arange(indptr[-1]) + np.repeat(rows.indptr[node_id] - indptr[:-1], degree)  # [E]
    # Turned around twice, rows are sorted; sort_indices would shuffle parallel edges.
    back, back_order = transposed(Rows(indptr, new_id[rows.indices[old]]))
    result, order = transposed(back)
    return result, old[back_order][order]


def transposed(rows: Rows) -> tuple[Rows, NDArray[np.int64]]:
    """Turns every edge around.

    Returns:
        The edges by their other end, and the position that each had in ``rows``, ``[E]``.
    """
    num_nodes, num_edges = len(rows.indptr) - 1, len(rows.indices)
    position = np.arange(num_edges, dtype=np.int64)
    matrix = sparse.csr_array(
        (position, rows.indices, rows.indptr), shape=(num_nodes, num_nodes)
    ).tocsc()
    turned = Rows(matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32))
    return turned, matrix.data
