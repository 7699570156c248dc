"""The adjacency that the methods work on: checked, and made symmetric where METIS needs it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from partition.errors import PartitionError

BASE_WORK = 50
"""Work of a node without edges, in units of one edge.

The published system gives METIS the vertex weight 50 + degree: a node costs its row-wise layers
(about fifty edges' worth) and its aggregation (one edge each).
"""


def work_of(indptr: NDArray[Any]) -> NDArray[np.int64]:
    """Work of each node: ``BASE_WORK`` + number of in-edges.

    Args:
        indptr: row starts of the CSR by target, ``[N+1]``.

    Returns:
        ``[N]``, int64, in units of one edge.
    """
    return BASE_WORK + np.diff(indptr).astype(np.int64)


def require_valid(indptr: NDArray[Any], indices: NDArray[Any]) -> None:
    """Refuses arrays that are not a CSR adjacency of N >= 1 nodes.

    Raises:
        PartitionError: wrong shapes or types, row starts that fall, ids outside ``[0, N)``.
    """
    for name, array in (("indptr", indptr), ("indices", indices)):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise PartitionError(
                f"`{name}` (={array.dtype}, {array.ndim}-d) must be one row of integers; "
                "pass a CSR adjacency"
            )
    if len(indptr) < 2:
        raise PartitionError("`indptr` (=0 nodes) must describe at least one node; pass a graph")
    if indptr[0] != 0 or indptr[-1] != len(indices) or bool(np.any(indptr[1:] < indptr[:-1])):
        raise PartitionError(
            f"`indptr` must rise from 0 to the number of edges (={len(indices)}); "
            "sort the edges by target"
        )
    num_nodes = len(indptr) - 1
    if len(indices) and not (indices.min() >= 0 and indices.max() < num_nodes):
        raise PartitionError(
            f"`indices` (={indices.min()}..{indices.max()}) must lie in [0, {num_nodes}); "
            "drop or renumber these edges"
        )


def symmetrised(indptr: NDArray[Any], indices: NDArray[Any]) -> csr_array:
    """Joins every edge with its reverse; drops self loops and duplicates.

    METIS crashes or answers nonsense on anything else.

    Args:
        indptr: row starts, ``[N+1]``.
        indices: column ids, ``[E]``.

    Returns:
        ``[N, N]`` bool, symmetric, empty diagonal, sorted rows.
    """
    num_nodes = len(indptr) - 1
    targets = np.repeat(np.arange(num_nodes, dtype=indices.dtype), np.diff(indptr))  # [E]
    is_kept = targets != indices
    ends = targets[is_kept], indices[is_kept]
    rows, columns = np.concatenate(ends), np.concatenate(ends[::-1])  # [2E]
    # bool, because sums of duplicates in a small integer type could wrap around to zero
    entries = np.ones(len(rows), dtype=np.bool_)
    adjacency = csr_array((entries, (rows, columns)), shape=(num_nodes, num_nodes))
    adjacency.sum_duplicates()
    return adjacency
