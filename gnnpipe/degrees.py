"""Scales of normalised operators for some nodes, from the whole graph's degrees.

A way needs them for its own rows and its mirrors. They are summed up from those nodes' rows of
the memory-mapped arrays, a block of rows at a time: nothing as large as the graph is built, and
a rank reads no adjacency but its own and its halo's.
"""

from typing import Any, NamedTuple

import numpy as np

from gnnpipe.chunk import ChunkedGraph

Array = np.ndarray[Any, Any]

BLOCK_ROWS = 1 << 14
"""Rows whose entries are looked at together."""


class Scales(NamedTuple):
    """One factor for each node, ``[num_nodes]``, float64."""

    gcn: Array
    """``degree^-1/2``; the degree sums in-edge weights and one self-loop."""
    mean: Array
    """``1 / max(in-degree, 1)``."""
    sym: Array
    """``degree^-1/2``; the degree sums in-edge weights."""
    laplacian: Array
    """``degree^-1/2``; the degree sums out-edge weights but the self-loops'."""


def scales(chunked: ChunkedGraph, node_id: Array) -> Scales:
    """The scales of some nodes.

    Args:
        chunked: the whole graph, possibly memory-mapped.
        node_id: new ids, ``[num_nodes]``, int64.
    """
    into = _sums(chunked.indptr, chunked.indices, chunked.edge_weight, node_id)
    out = _sums(chunked.out_indptr, chunked.out_indices, chunked.out_edge_weight, node_id)
    count = np.asarray(chunked.indptr[node_id + 1]) - np.asarray(chunked.indptr[node_id])
    return Scales(
        gcn=_inverse_root(into.without_loops + into.loop),
        mean=1.0 / np.maximum(count, 1),
        sym=_inverse_root(into.total),
        laplacian=_inverse_root(out.without_loops),
    )


def row_entries(indptr: Array, row_id: Array) -> tuple[Array, Array]:
    """The row pointers of some rows, and the positions of their entries."""
    starts, ends = np.asarray(indptr[row_id]), np.asarray(indptr[row_id + 1])
    return np.concatenate(([0], np.cumsum(ends - starts))), ranges(starts, ends)


def ranges(starts: Array, ends: Array) -> Array:
    """Concatenates the integer ranges ``starts[i]:ends[i]``."""
    size = ends - starts
    offset = np.repeat(starts - np.concatenate(([0], np.cumsum(size)[:-1])), size)
    result: Array = offset + np.arange(int(size.sum()))
    return result


class _Sums(NamedTuple):
    """Sums of the weights of each row, ``[num_rows]``, float64."""

    total: Array
    without_loops: Array
    loop: Array
    """Weight of the self-loop, 1 where there is none."""


def _sums(indptr: Array, indices: Array, weight: Array | None, row_id: Array) -> _Sums:
    """Sums up some rows block by block."""
    result = _Sums(*(np.empty(row_id.size) for _ in _Sums._fields))
    for start in range(0, row_id.size, BLOCK_ROWS):
        block = row_id[start : start + BLOCK_ROWS]
        sizes, entries = row_entries(indptr, block)
        row = np.repeat(np.arange(block.size), np.diff(sizes))
        value = np.ones(row.size) if weight is None else np.asarray(weight[entries], np.float64)
        is_loop = np.asarray(indices[entries]) == block[row]
        loop = np.ones(block.size)
        loop[row[is_loop]] = value[is_loop]
        others = ~is_loop
        found = (
            np.bincount(row, weights=value, minlength=block.size),
            np.bincount(row[others], weights=value[others], minlength=block.size),
            loop,
        )
        for whole, part in zip(result, found, strict=True):
            whole[start : start + BLOCK_ROWS] = part
    return result


def _inverse_root(degree: Array) -> Array:
    # As torch_geometric has it: 0 for no edges, NaN where negative weights outweigh the others.
    with np.errstate(divide="ignore", invalid="ignore"):
        scale: Array = np.where(degree == 0, 0.0, degree**-0.5)
    return scale
