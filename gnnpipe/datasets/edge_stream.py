"""CSR rows from a stream of edges, in memory of the order of the result.

Two passes: count the edges into each node, then put every edge in its place. Nothing is sorted
but rows, so a file with more edges than memory has room for as pairs still fits as rows.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gnnpipe.errors import UserError

SORT_BLOCK = 2**22  # entries that are sorted at a time

Edges = Callable[[], Iterator[NDArray[Any]]]
"""Starts a pass over the edges: blocks ``[2, n]`` of sources and targets."""


def rows_of_stream(edges: Edges, *, num_nodes: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Builds in-edges by target.

    Args:
        edges: called twice.
        num_nodes: ids must be below.

    Returns:
        ``indptr [N + 1]`` and ``indices [E]``, sources ascending in a row, duplicates kept.

    Raises:
        UserError: an id out of range.
    """
    counts = np.zeros(num_nodes + 1, np.int64)
    for block in edges():
        low, high = int(block.min(initial=0)), int(block.max(initial=0))
        if low < 0 or high >= num_nodes:
            bad = low if low < 0 else high
            raise UserError(
                f"`edge_index` (={bad}) must lie between 0 and {num_nodes - 1}; "
                "correct the edges or the number of nodes"
            )
        counts[1:] += np.bincount(block[1], minlength=num_nodes)
    indptr = np.cumsum(counts)
    free = indptr[:-1].copy()
    indices = np.empty(int(indptr[-1]), np.int32)
    for source, target in edges():
        order = np.argsort(target, kind="stable")
        target = target[order]
        first = np.flatnonzero(np.r_[True, target[1:] != target[:-1]]) if target.size else target
        length = np.diff(np.r_[first, target.size])
        rank = np.arange(target.size) - np.repeat(first, length)
        indices[free[target] + rank] = source[order]
        free[target[first]] += length
    _sort_rows(indptr, indices)
    return indptr, indices


def distinct_rows(
    indptr: NDArray[np.int64], indices: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The same rows with every edge once; rows must be sorted."""
    is_first = np.ones(indices.size, bool)
    np.not_equal(indices[1:], indices[:-1], out=is_first[1:])
    starts = indptr[:-1][np.diff(indptr) > 0]
    is_first[starts] = True
    before = np.concatenate(([0], np.cumsum(is_first)))
    return before[indptr], indices[is_first]


def _sort_rows(indptr: NDArray[np.int64], indices: NDArray[np.int32]) -> None:
    """Sorts every row in place, many rows at a time."""
    num_nodes, start = indptr.size - 1, 0
    while start < num_nodes:
        end = int(np.searchsorted(indptr, indptr[start] + SORT_BLOCK, side="right")) - 1
        end = min(max(end, start + 1), num_nodes)
        low, high = int(indptr[start]), int(indptr[end])
        row = np.repeat(np.arange(end - start), np.diff(indptr[start : end + 1]))
        part = indices[low:high]
        indices[low:high] = part[np.lexsort((part, row))]
        start = end
