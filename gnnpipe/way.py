"""The part of a chunked graph that one way of a stage holds, in rank-local indices.

A way's own rows come first, chunk by chunk, then the mirrors: outside nodes that its edges
read. Incoming edges read in-mirrors (forward), outgoing edges read out-mirrors (the gradient
of an aggregation); the two lists are equal on undirected graphs. Mirrors keep the chunk-major,
way-minor numbering, so the mirrors that one peer owns of one chunk are one contiguous range and
a message needs no index list on the receiving side.
"""

from typing import Any, Literal, NamedTuple

import numpy as np

from gnnpipe.chunk import ChunkedGraph
from gnnpipe.degrees import ranges, row_entries, scales

Array = np.ndarray[Any, Any]
Norm = Literal["sum", "mean", "gcn"]


class Adjacency(NamedTuple):
    """CSR rows of a way's own nodes; columns are rows of its table."""

    indptr: Array
    """``[num_rows + 1]``, int64."""
    indices: Array
    """Table row of each entry, int32."""
    weight: Array | None
    """Edge weight of each entry, or None."""
    attr: Array | None = None
    """Attributes of each entry ``[E, D]``, or None; incoming edges only."""
    type: Array | None = None
    """Type of each entry ``[E]``, or None; incoming edges only."""


class Mirrors(NamedTuple):
    """Outside nodes that a way reads."""

    row_id: Array
    """New id of each mirror, ascending, int64."""
    cell_ptr: Array
    """``[C * W + 1]``: mirrors of cell (c, w) are ``cell_ptr[c * W + w] : ...[... + 1]``."""


class WayGraph(NamedTuple):
    """What one way needs of the graph's structure."""

    way: int
    num_ways: int
    num_chunks: int
    chunk_ptr: Array
    """``[C + 1]``: own rows of chunk c are ``chunk_ptr[c] : chunk_ptr[c + 1]``."""
    row_id: Array
    """New id of each own row, ``[num_rows]``, int64."""
    node_id: Array
    """Original id of each own row, then of each in-mirror, int64."""
    out_mirror_id: Array
    """Original id of each out-mirror, int64."""
    incoming: Adjacency
    """Rows are targets, columns their sources."""
    outgoing: Adjacency
    """Rows are sources, columns their targets."""
    in_mirrors: Mirrors
    out_mirrors: Mirrors
    in_sends: list[list[Array]]
    """``[chunk][peer]``: own rows of the chunk that the peer reads as in-mirrors, int64."""
    out_sends: list[list[Array]]
    """The same for out-mirrors."""
    gcn_scale: tuple[Array, Array]
    """``degree^-1/2`` with self-loops, of own rows and in-mirrors, and of own and out-mirrors."""
    mean_scale: tuple[Array, Array]
    """``1 / max(in-degree, 1)``, of own rows and in-mirrors, and of own and out-mirrors."""
    sym_scale: tuple[Array, Array]
    """``degree^-1/2`` without added self-loops, likewise."""
    laplacian_scale: tuple[Array, Array]
    """``out-degree^-1/2`` without self-loops, likewise."""

    @property
    def num_rows(self) -> int:
        """Number of own rows."""
        return int(self.row_id.size)


def way_graph(chunked: ChunkedGraph, *, way: int, num_ways: int) -> WayGraph:
    """Cuts one way out of a chunked graph.

    Args:
        chunked: the whole graph, possibly memory-mapped; only this way's rows are copied.
        way: index of the way.
        num_ways: ways per stage. If it divides the partition's, whose ways are nested, cells
            are united; otherwise chunks are split by rows, which makes a larger halo.
    """
    cell_ptr = cell_bounds(chunked, num_ways)
    starts, ends = cell_ptr[:-1][way::num_ways], cell_ptr[1:][way::num_ways]
    row_id = ranges(starts, ends)
    chunk_ptr = np.concatenate(([0], np.cumsum(ends - starts)))
    values = (chunked.edge_attr, chunked.edge_type)
    pulls = _Side(chunked.indptr, chunked.indices, chunked.edge_weight, *values)
    pushes = _Side(chunked.out_indptr, chunked.out_indices, chunked.out_edge_weight)
    numbering = _Numbering(way, num_ways, cell_ptr, row_id, chunk_ptr)
    incoming, in_mirrors = numbering.localise(pulls)
    is_symmetric = chunked.out_indices is chunked.indices
    outgoing, out_mirrors = (incoming, in_mirrors) if is_symmetric else numbering.localise(pushes)
    in_table = np.concatenate((row_id, in_mirrors.row_id))
    out_table = np.concatenate((row_id, out_mirrors.row_id))
    into = scales(chunked, in_table)
    out_of = into if is_symmetric else scales(chunked, out_table)
    node_id = np.asarray(chunked.node_id)
    return WayGraph(
        way=way,
        num_ways=num_ways,
        num_chunks=chunked.num_chunks,
        chunk_ptr=chunk_ptr,
        row_id=row_id,
        node_id=node_id[in_table],
        out_mirror_id=node_id[out_mirrors.row_id],
        incoming=incoming,
        outgoing=outgoing,
        in_mirrors=in_mirrors,
        out_mirrors=out_mirrors,
        in_sends=numbering.sends(outgoing, out_mirrors),
        out_sends=numbering.sends(incoming, in_mirrors),
        gcn_scale=(into.gcn, out_of.gcn),
        mean_scale=(into.mean, out_of.mean),
        sym_scale=(into.sym, out_of.sym),
        laplacian_scale=(into.laplacian, out_of.laplacian),
    )


def cell_bounds(chunked: ChunkedGraph, num_ways: int) -> Array:
    """First new id of each cell (chunk, way) of this run, and N, ``[C * W + 1]``."""
    cell_ptr = np.asarray(chunked.cell_ptr)
    if chunked.num_ways % num_ways == 0:
        nested: Array = cell_ptr[:: chunked.num_ways // num_ways]
        return nested
    chunk_ptr = cell_ptr[:: chunked.num_ways]
    shares = np.arange(num_ways) / num_ways
    starts = chunk_ptr[:-1, None] + np.diff(chunk_ptr)[:, None] * shares
    return np.append(starts.astype(np.int64).ravel(), chunk_ptr[-1])


class _Side(NamedTuple):
    indptr: Array
    indices: Array
    weight: Array | None
    attr: Array | None = None
    type: Array | None = None


class _Numbering(NamedTuple):
    """Maps new ids to a way's table rows."""

    way: int
    num_ways: int
    cell_ptr: Array
    row_id: Array
    chunk_ptr: Array

    def localise(self, side: _Side) -> tuple[Adjacency, Mirrors]:
        """Takes the own rows of one side and renumbers their columns."""
        indptr, entries = row_entries(side.indptr, self.row_id)
        column_id = np.asarray(side.indices[entries]).astype(np.int64)
        is_own = self.way_of(column_id) == self.way
        mirror_id = np.unique(column_id[~is_own])
        local = np.empty(column_id.size, np.int32)
        local[is_own] = np.searchsorted(self.row_id, column_id[is_own])
        local[~is_own] = self.row_id.size + np.searchsorted(mirror_id, column_id[~is_own])
        weight, attr, type_id = (
            None if values is None else np.asarray(values[entries])
            for values in (side.weight, side.attr, side.type)
        )
        mirrors = Mirrors(mirror_id, np.searchsorted(mirror_id, self.cell_ptr))
        return Adjacency(indptr, local, weight, attr, type_id), mirrors

    def way_of(self, new_id: Array) -> Array:
        """Way that owns each new id."""
        cell = np.searchsorted(self.cell_ptr, new_id, side="right") - 1
        way: Array = cell % self.num_ways
        return way

    def sends(self, reverse: Adjacency, mirrors: Mirrors) -> list[list[Array]]:
        """Own rows that each peer reads: those with a reverse edge into the peer's nodes."""
        num_rows = self.row_id.size
        row = np.repeat(np.arange(num_rows), np.diff(reverse.indptr))
        is_mirror = reverse.indices >= num_rows
        peer = self.way_of(mirrors.row_id[reverse.indices[is_mirror] - num_rows])
        readers = [np.unique(row[is_mirror][peer == other]) for other in range(self.num_ways)]
        cuts = [np.searchsorted(rows, self.chunk_ptr) for rows in readers]
        return [
            [rows[cut[chunk] : cut[chunk + 1]] for rows, cut in zip(readers, cuts, strict=True)]
            for chunk in range(self.chunk_ptr.size - 1)
        ]


def with_self_loops(adjacency: Adjacency, *, keep_weight: bool) -> Adjacency:
    """Gives every row exactly one self-loop, last in its row.

    Args:
        adjacency: rows of own nodes; the column of a row's own node is the row itself.
        keep_weight: an existing self-loop keeps its weight (``gcn``); otherwise all are 1.
    """
    num_rows = adjacency.indptr.size - 1
    row = np.repeat(np.arange(num_rows, dtype=np.int64), np.diff(adjacency.indptr))
    is_loop = adjacency.indices == row
    count = np.bincount(row[~is_loop], minlength=num_rows) + 1
    indptr = np.concatenate(([0], np.cumsum(count)))
    is_last = np.zeros(int(indptr[-1]), bool)
    is_last[indptr[1:] - 1] = True
    indices = np.empty(is_last.size, np.int32)
    indices[~is_last], indices[is_last] = adjacency.indices[~is_loop], np.arange(num_rows)
    if adjacency.weight is None:
        return Adjacency(indptr, indices, None)
    loop_weight = np.ones(num_rows, adjacency.weight.dtype)
    if keep_weight:
        loop_weight[row[is_loop]] = adjacency.weight[is_loop]
    weight = np.empty(is_last.size, adjacency.weight.dtype)
    weight[~is_last], weight[is_last] = adjacency.weight[~is_loop], loop_weight
    return Adjacency(indptr, indices, weight)


def without_self_loops(adjacency: Adjacency) -> Adjacency:
    """The rows of own nodes without the entries that point at the row itself."""
    num_rows = adjacency.indptr.size - 1
    row = np.repeat(np.arange(num_rows, dtype=np.int64), np.diff(adjacency.indptr))
    is_kept = adjacency.indices != row
    count = np.bincount(row[is_kept], minlength=num_rows)
    weight = None if adjacency.weight is None else adjacency.weight[is_kept]
    indptr = np.concatenate(([0], np.cumsum(count)))
    return Adjacency(indptr, adjacency.indices[is_kept], weight)
