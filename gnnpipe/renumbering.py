"""Edges under another numbering of the nodes, and edges the other way round, in linear time."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


class Rows(NamedTuple):
    """One direction of N nodes' E edges, a row for each node."""

    indptr: NDArray[np.int64]  # [N + 1]
    indices: NDArray[np.int32]  # [E], ascending in a row

    def equals(self, other: "Rows") -> bool:
        """Whether both hold the same edges."""
        is_same_indptr = np.array_equal(self.indptr, other.indptr)
        return is_same_indptr and np.array_equal(self.indices, other.indices)


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
