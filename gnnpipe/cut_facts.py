"""What a cut graph looks like: sizes of its chunks, who reads whom, and the partition report."""

from typing import NamedTuple

import numpy as np

from gnnpipe.chunk import ChunkedGraph
from gnnpipe.recorder import Array
from partition import Assignment, quality, table

MOST_REPORTED_EDGES = 30_000_000
"""Beyond, the report takes more than half a minute; who wants it asks ``python -m partition``."""
BLOCK_EDGES = 8_000_000


class CutFacts(NamedTuple):
    """Figures of the chunks of one graph."""

    nodes: Array
    """``[C]``."""
    reads: Array
    """``[C, C]``: edges from sources in the column's chunk to targets in the row's chunk."""


def cut_facts(chunked: ChunkedGraph) -> CutFacts:
    """Counts nodes and edges by chunk, a block of edges at a time.

    Args:
        chunked: the graph, possibly memory-mapped.
    """
    chunk_ptr = np.asarray(chunked.cell_ptr)[:: chunked.num_ways]
    edge_ptr = np.asarray(chunked.indptr)[chunk_ptr]
    C = chunked.num_chunks
    reads = np.zeros((C, C), np.int64)
    for target in range(C):
        for low in range(int(edge_ptr[target]), int(edge_ptr[target + 1]), BLOCK_EDGES):
            high = min(low + BLOCK_EDGES, int(edge_ptr[target + 1]))
            source = np.searchsorted(chunk_ptr, chunked.indices[low:high], side="right") - 1
            reads[target] += np.bincount(source, minlength=C)
    return CutFacts(np.diff(chunk_ptr), reads)


def cut_report(chunked: ChunkedGraph) -> str:
    """The partition report of a cut graph, its verdict last.

    Args:
        chunked: the graph.
    """
    num_edges = len(chunked.indices)
    if num_edges > MOST_REPORTED_EDGES:
        return f"{num_edges:,} edges are too many to measure here; python -m partition does"
    C, W = chunked.num_chunks, chunked.num_ways
    sizes = np.diff(chunked.cell_ptr)
    cell = np.repeat(np.arange(C * W, dtype=np.int32), sizes)
    figures = quality(
        chunked.indptr,
        chunked.indices,
        Assignment(cell // W, cell % W),
        num_chunks=C,
        num_ways=W,
    )
    return table(figures)
