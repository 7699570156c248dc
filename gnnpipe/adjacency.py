"""Adjacency as CSR: row i lists the sources j of the edges j -> i, ascending.

Plain arrays of N nodes and E edges; nothing here knows features or labels::

    edges 0->1 2->1 1->2     indptr  0 0 2 3      row 0: none, row 1: 0 2, row 2: 1
                             indices 0 2 1
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from gnnpipe.arrays import exact, require
from gnnpipe.errors import UserError

MAX_NODES = 2**31 - 1  # node ids are int32


def checked_edges(edge_index: ArrayLike, num_nodes: int) -> NDArray[np.int64]:
    """``edge_index`` as int64 ``[2, E]`` of nodes below ``num_nodes``.

    Raises:
        UserError: it is something else.
    """
    edges = exact(edge_index, "edge_index", np.int64)
    if edges.ndim != 2 or len(edges) != 2:
        raise UserError(f"`edge_index` (={list(edges.shape)}) must have the shape [2, E]")
    if num_nodes > MAX_NODES:
        raise UserError(f"`num_nodes` (={num_nodes}) must be at most {MAX_NODES}; cut the graph")
    low, high = edges.min(initial=0), edges.max(initial=0)
    if edges.size and not (low >= 0 and high < num_nodes):
        raise UserError(
            f"`edge_index` (={low if low < 0 else high}) must name nodes 0 to {num_nodes - 1}; "
            "drop that edge or add the node"
        )
    return edges


def rows_by_target(
    edges: NDArray[np.int64], num_nodes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorts edges by target, then source, parallel edges as they came.

    Args:
        edges: sources and targets, ``[2, E]``, each below ``num_nodes`` < 2^31.
        num_nodes: N.

    Returns:
        ``indptr`` ``[N + 1]`` and the order ``[E]`` the edges are to be taken in.
    """
    order = np.argsort(edges[1] * num_nodes + edges[0], kind="stable")
    return row_starts(edges[1], num_nodes), order


def row_starts(targets: NDArray[np.int64], num_nodes: int) -> NDArray[np.int64]:
    """Where each row starts, ``[N + 1]``, from the targets of the edges in any order ``[E]``."""
    indptr = np.zeros(num_nodes + 1, np.int64)
    np.cumsum(np.bincount(targets, minlength=num_nodes), out=indptr[1:])
    return indptr


def is_symmetric(
    indptr: NDArray[np.int64], indices: NDArray[np.int32], values: NDArray[np.float32] | None
) -> bool:
    """Whether each edge j -> i has its i -> j, of equal value where values are given.

    Parallel edges must carry their values in the same order in both directions.
    """
    n = len(indptr) - 1
    values_or_ones = np.ones(len(indices), np.int8) if values is None else values
    by_target = sparse.csr_array((values_or_ones, indices, indptr), shape=(n, n))
    by_source = by_target.tocsc()  # linear time; keeps parallel edges, rows ascending
    return (
        np.array_equal(by_source.indptr, indptr)
        and np.array_equal(by_source.indices, indices)
        and np.array_equal(by_source.data, values_or_ones)
    )


def union_with_reverse(
    indptr: NDArray[np.int64], indices: NDArray[np.int32], *values: NDArray[Any]
) -> tuple[NDArray[Any], ...]:
    """Joins every edge, its reverse and parallel edges into one edge for each direction.

    Args:
        indptr: ``[N + 1]``.
        indices: ``[E]``.
        *values: ``[E]`` or ``[E, D]``; of edges that join, the largest value wins, by column.

    Returns:
        The new ``indptr``, ``indices`` and ``values``.
    """
    n = len(indptr) - 1
    targets = np.repeat(np.arange(n, dtype=np.int64), np.diff(indptr))
    keys = np.concatenate([targets * n + indices, indices * np.int64(n) + targets])  # [2E]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))  # where each distinct edge starts
    new_targets, new_indices = np.divmod(keys[first], n)
    joined = [
        np.maximum.reduceat(np.concatenate([value, value])[order], first, axis=0)
        if len(first)
        else value
        for value in values
    ]
    return row_starts(new_targets, n), new_indices.astype(np.int32), *joined


def check_rows(indptr: NDArray[np.int64], indices: NDArray[np.int32], num_nodes: int) -> None:
    """Checks that the arrays are the CSR adjacency of ``num_nodes`` nodes.

    Raises:
        UserError: they are not.
    """
    require(indptr, "indptr", np.int64, (num_nodes + 1,))
    require(indices, "indices", np.int32, (None,))
    num_edges = len(indices)
    if indptr[0] != 0 or indptr[-1] != num_edges or np.any(indptr[1:] < indptr[:-1]):
        raise UserError(
            f"`indptr` must rise from 0 to the number of edges (={num_edges}); "
            "build the graph with Graph.from_edge_index"
        )
    if num_edges and not (indices.min() >= 0 and indices.max() < num_nodes):
        raise UserError(f"`indices` must name nodes 0 to {num_nodes - 1}; drop the other edges")
    falls = indices[1:] < indices[:-1]
    starts = indptr[1:-1]
    falls[starts[(starts > 0) & (starts < num_edges)] - 1] = False  # a new row may start lower
    if falls.any():
        raise UserError(
            "`indices` must rise within each row; build the graph with Graph.from_edge_index"
        )
