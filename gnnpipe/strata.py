"""Nodes by the order of magnitude of their degree: who is taken to drift alike.

Stratum g holds the nodes with 2^g to 2^(g+1) - 1 readers (out-edges; 0 counts as 1), the last one
all with more. It belongs to a node of the whole graph, whatever chunk or way it lies in.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gnnpipe.chunk import ChunkedGraph
from gnnpipe.graph import Graph
from gnnpipe.way import WayGraph

Array = np.ndarray[Any, Any]

BLOCK_ROWS = 1 << 20
"""Nodes whose degrees are looked at together."""


class Strata(NamedTuple):
    """The strata of a way's table rows."""

    stratum: Tensor
    """Of each own row and in-mirror, ``[num_values]``, int32."""
    counts: Tensor
    """``[C, G]``: nodes of each chunk, on all ways."""


def strata_of(chunked: ChunkedGraph, graph: WayGraph, *, limit: int, like: Tensor) -> Strata:
    """The strata of a way.

    Args:
        chunked: the whole graph, possibly memory-mapped; only its row pointers are read.
        graph: the way.
        limit: most strata, at least 1.
        like: a tensor that gives dtype and device.
    """
    counts = strata_counts(chunked, limit=limit)
    row_id = np.concatenate((graph.row_id, graph.in_mirrors.row_id))
    pointers = chunked.out_indptr
    stratum = stratum_of(pointers[row_id + 1] - pointers[row_id], limit).astype(np.int32)
    return Strata(torch.from_numpy(stratum).to(like.device), torch.from_numpy(counts).to(like))


def strata_in(graph: Graph) -> int:
    """Strata of a graph that is not cut, if there is no limit.

    Edges are read in directed graphs only: in others a node has as many readers as sources.
    """
    if graph.is_directed:
        return strata_among(np.bincount(graph.indices))
    return strata_among(np.diff(graph.indptr))


def strata_among(readers: Array) -> int:
    """Strata of nodes with so many readers each, if there is no limit."""
    return int(stratum_of(readers.max(initial=1), np.iinfo(np.int64).max)) + 1


def strata_counts(chunked: ChunkedGraph, *, limit: int) -> Array:
    """Nodes of each chunk by stratum, ``[C, G]``; G is at most ``limit``, and no stratum empty
    behind the last."""
    counts: Array = np.zeros((chunked.num_chunks, limit), np.int64)
    for chunk, (start, end) in enumerate(pairwise(chunked.cell_ptr[:: chunked.num_ways])):
        for low in range(int(start), int(end), BLOCK_ROWS):
            high = min(low + BLOCK_ROWS, int(end))
            degrees = np.diff(chunked.out_indptr[low : high + 1])
            counts[chunk] += np.bincount(stratum_of(degrees, limit), minlength=limit)
    used = int(np.flatnonzero(counts.sum(axis=0)).max()) + 1
    return counts[:, :used]


def stratum_of(degrees: Array, limit: int) -> Array:
    """Stratum of each degree, int64."""
    _, exponent = np.frexp(np.maximum(degrees, 1))  # degree = m 2^exponent with 1/2 <= m < 1
    return np.minimum(exponent.astype(np.int64) - 1, limit - 1)
