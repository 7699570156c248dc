"""One chunk of one way, ready for the kernels: its rows, neighbours and messages.

The whole graph of a way is a cell as well; evaluation runs on it.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gnnpipe.kernels import EdgeOrder, RowBlock
from gnnpipe.shapes import gathers
from gnnpipe.way import Adjacency, WayGraph, with_self_loops, without_self_loops

Array = np.ndarray[Any, Any]

WHOLE = -1
"""Stands for all chunks of a way at once where an index of a chunk is asked for."""


class Exchange(NamedTuple):
    """Rows that travel between the ways of a stage for one chunk."""

    peer: int
    """Way at the other end."""
    send: Tensor
    """Own table rows that the peer holds as mirrors, int64."""
    receive: slice
    """Table rows of the mirrors that the peer owns."""


class Edges(NamedTuple):
    """The bipartite block of a cell, for layers that gather."""

    halo: Tensor
    """Table rows read from outside the cell, ascending, int64."""
    is_fresh_halo: Tensor
    """Which halo rows belong to the same chunk on another way, ``[num_halo, 1]``, bool."""
    edge_index: Tensor
    """``[2, E]``, int64, sorted by target; sources count own rows first, then the halo."""
    source_id: Tensor
    """Original id of each edge's source, ``[E]``, int64."""
    target_id: Tensor
    """Original id of each edge's target, ``[E]``, int64."""
    values: dict[str, Tensor]
    """What the edges have of ``weight [E]``, ``attr [E, D]`` and ``type [E]``."""
    order: EdgeOrder
    """The same edges for attention."""


class Cell(NamedTuple):
    """The rows ``rows`` of a way's table, seen through one operator."""

    place: tuple[int, int]
    """Its (first) chunk and its way."""
    rows: slice
    """Own table rows."""
    in_mirrors: slice
    """Table rows of the same chunk's in-mirrors."""
    out_mirrors: slice
    """The same for out-mirrors."""
    node_id: Tensor
    """Original ids of the rows, int64."""
    forward: RowBlock | None
    """The operator's rows; columns are own rows and in-mirrors."""
    backward: RowBlock | None
    """The transposed operator's rows; columns are own rows and out-mirrors."""
    edges: Edges | None
    in_exchanges: list[Exchange]
    """Messages that bring the in-mirrors, in the order of chunks and peers."""
    out_exchanges: list[Exchange]
    """Messages that bring the out-mirrors."""
    forward_halves: "Halves"
    backward_halves: "Halves"
    is_closed: bool
    """Whether no row is read from another cell."""


class Halves(NamedTuple):
    """The rows of a block, split by what they wait for; None stands for all rows."""

    interior: Tensor | None
    """Rows that read no mirror of their own chunk, int64: ready before any message is."""
    boundary: Tensor
    """The other rows, int64."""


class Cells(NamedTuple):
    """All cells of a way for one operator."""

    chunks: list[Cell]
    whole: Cell
    mirror_id: Tensor
    """Original ids of all in-mirrors, int64."""
    out_mirror_id: Tensor
    """The same of out-mirrors."""

    def at(self, chunk_index: int) -> Cell:
        """The cell of a chunk, or of :data:`WHOLE`."""
        return self.whole if chunk_index == WHOLE else self.chunks[chunk_index]

    @property
    def are_closed(self) -> bool:
        """Whether no chunk reads a row of another one: a table's rows are its own business."""
        return all(cell.is_closed for cell in self.chunks)


def build_cells(
    graph: WayGraph,
    *,
    operator: str,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
) -> Cells:
    """Prepares the chunks of a way, and the way as a whole, for one operator.

    Args:
        graph: the way.
        operator: one of a layer's operators (see ``gnnpipe.models.layer``).
        dtype: of scales and weights.
        device: where the arrays live.
        backend: of the kernels, ``numba`` or ``torch``; None chooses by the device.
    """
    builder = _Builder(graph, operator, dtype, device, backend)
    chunks = [builder.cell(c, c + 1) for c in range(graph.num_chunks)]
    ids = graph.node_id[graph.num_rows :], graph.out_mirror_id
    return Cells(chunks, builder.whole(), *(torch.from_numpy(each) for each in ids))


class _Builder:
    def __init__(
        self,
        graph: WayGraph,
        operator: str,
        dtype: torch.dtype,
        device: torch.device,
        backend: str | None,
    ) -> None:
        self.backend = backend
        self.graph = graph
        self.device = device
        self.operator = operator
        self.dtype = dtype
        self.node_id = torch.from_numpy(graph.node_id[: graph.num_rows]).to(device)
        self.adjacency = graph.incoming
        self.forward: RowBlock | None = None
        self.backward: RowBlock | None = None
        self.edge_scale: Array | None = None
        if operator in ("sum", "mean", "gcn", "sym", "laplacian"):
            self.forward, self.backward = self._blocks()
        elif operator == "edges_self":
            self.adjacency = with_self_loops(graph.incoming, keep_weight=False)
        elif operator == "edges_gcn":
            self.adjacency = with_self_loops(graph.incoming, keep_weight=True)
            self.edge_scale = graph.gcn_scale[0]
        elif operator == "edges_sym":
            self.edge_scale = graph.sym_scale[0]

    def whole(self) -> Cell:
        return self.cell(0, self.graph.num_chunks)

    def cell(self, first: int, last: int) -> Cell:
        """The cell of the chunks ``first:last``."""
        graph = self.graph
        start, end = int(graph.chunk_ptr[first]), int(graph.chunk_ptr[last])
        in_mirrors = self._mirror_rows(graph.in_mirrors.cell_ptr, first, last)
        out_mirrors = self._mirror_rows(graph.out_mirrors.cell_ptr, first, last)
        forward = None if self.forward is None else self.forward.rows(start, end)
        backward = None if self.backward is None else self.backward.rows(start, end)
        edges = self._edges(first, last) if gathers(self.operator) else None
        chunks = range(first, last)
        return Cell(
            place=(first, graph.way),
            rows=slice(start, end),
            in_mirrors=in_mirrors,
            out_mirrors=out_mirrors,
            node_id=self.node_id[start:end],
            forward=forward,
            backward=backward,
            edges=edges,
            in_exchanges=[e for c in chunks for e in self._exchanges(c, is_incoming=True)],
            out_exchanges=[e for c in chunks for e in self._exchanges(c, is_incoming=False)],
            forward_halves=_halves(forward, in_mirrors),
            backward_halves=_halves(backward, out_mirrors),
            is_closed=_is_closed(edges if backward is None else backward, start, end),
        )

    def _mirror_rows(self, cell_ptr: Array, first: int, last: int) -> slice:
        ways, base = self.graph.num_ways, self.graph.num_rows
        return slice(base + int(cell_ptr[first * ways]), base + int(cell_ptr[last * ways]))

    def _exchanges(self, chunk: int, *, is_incoming: bool) -> list[Exchange]:
        graph = self.graph
        mirrors = graph.in_mirrors if is_incoming else graph.out_mirrors
        sends = (graph.in_sends if is_incoming else graph.out_sends)[chunk]
        result = []
        for peer in range(graph.num_ways):
            cell = chunk * graph.num_ways + peer
            low, high = mirrors.cell_ptr[cell] + graph.num_rows, mirrors.cell_ptr[cell + 1]
            receive = slice(int(low), int(high) + graph.num_rows)
            send = torch.from_numpy(sends[peer].astype(np.int64)).to(self.device)
            if send.numel() or receive.stop > receive.start:
                result.append(Exchange(peer, send, receive))
        return result

    def _blocks(self) -> tuple[RowBlock, RowBlock]:
        """The operator and its transpose, over all rows of the way."""
        graph, rows = self.graph, self.graph.num_rows
        incoming, outgoing = graph.incoming, graph.outgoing
        if self.operator in ("gcn", "sym", "laplacian"):
            is_same = graph.outgoing is graph.incoming
            incoming = self._relooped(incoming)
            outgoing = incoming if is_same else self._relooped(outgoing)
            scales = getattr(graph, f"{self.operator}_scale")
            into, out_of = (self._scale(scale) for scale in scales)
            return (
                self._block(incoming, incoming.weight, into[:rows], into),
                self._block(outgoing, outgoing.weight, out_of[:rows], out_of),
            )
        scale = self._scale(graph.mean_scale[1]) if self.operator == "mean" else None
        row_scale = None if scale is None else scale[:rows]
        forward = self._block(incoming, None, row_scale, None)
        return forward, self._block(outgoing, None, None, scale)

    def _relooped(self, adjacency: Adjacency) -> Adjacency:
        """The edges with the self-loops that a normalised operator wants."""
        if self.operator == "gcn":
            return with_self_loops(adjacency, keep_weight=True)
        return adjacency if self.operator == "sym" else without_self_loops(adjacency)

    def _scale(self, scale: Array) -> Tensor:
        return torch.from_numpy(scale).to(self.device, self.dtype)

    def _block(
        self,
        adjacency: Adjacency,
        weight: Array | None,
        row_scale: Tensor | None,
        col_scale: Tensor | None,
    ) -> RowBlock:
        return RowBlock(
            torch.from_numpy(adjacency.indptr).to(self.device),
            torch.from_numpy(adjacency.indices).to(self.device),
            weight=None if weight is None else self._scale(weight),
            row_scale=row_scale,
            col_scale=col_scale,
            backend=self.backend,
        )

    def _edges(self, first: int, last: int) -> Edges:
        graph, adjacency = self.graph, self.adjacency
        start, end = int(graph.chunk_ptr[first]), int(graph.chunk_ptr[last])
        indptr = adjacency.indptr[start : end + 1]
        column = adjacency.indices[indptr[0] : indptr[-1]].astype(np.int64)
        is_own = (column >= start) & (column < end)
        halo = np.unique(column[~is_own])
        source = np.where(is_own, column - start, 0)
        source[~is_own] = end - start + np.searchsorted(halo, column[~is_own])
        target = np.repeat(np.arange(end - start), np.diff(indptr))
        same = self._mirror_rows(graph.in_mirrors.cell_ptr, first, last)
        is_fresh = (halo >= same.start) & (halo < same.stop)
        arrays = (
            halo,
            is_fresh[:, None],
            np.stack((source, target)),
            graph.node_id[column],
            graph.node_id[start + target],
        )
        entries = slice(int(indptr[0]), int(indptr[-1]))
        values = self._edge_values(entries, column, start + target)
        halo_rows, fresh, edges, source_id, target_id = (
            torch.from_numpy(array).to(self.device) for array in arrays
        )
        num_rows = end - start
        sizes = {"num_sources": num_rows + int(halo.size), "num_targets": num_rows}
        order = EdgeOrder(edges, **sizes, backend=self.backend)
        return Edges(halo_rows, fresh, edges, source_id, target_id, values, order)

    def _edge_values(self, entries: slice, column: Array, row: Array) -> dict[str, Tensor]:
        """What the edges carry, in the order of the block; normalised weights where asked."""
        adjacency, found = self.adjacency, {}
        weight = None if adjacency.weight is None else adjacency.weight[entries]
        if self.edge_scale is not None:
            scale = self.edge_scale
            weight = scale[row] * (1.0 if weight is None else weight) * scale[column]
        real = {
            "weight": weight,
            "attr": None if adjacency.attr is None else adjacency.attr[entries],
        }
        for name, array in real.items():
            if array is not None:
                found[name] = torch.from_numpy(array).to(self.device, self.dtype)
        if adjacency.type is not None:
            found["type"] = torch.from_numpy(adjacency.type[entries]).to(self.device)
        return found


def _is_closed(block: RowBlock | Edges | None, start: int, end: int) -> bool:
    """Whether all columns of a block lie in ``start:end``."""
    if not isinstance(block, RowBlock):
        return block is None or block.halo.numel() == 0
    entries = block.indices[int(block.indptr[0]) : int(block.indptr[-1])]
    return bool(((entries >= start) & (entries < end)).all())


def _halves(block: RowBlock | None, mirrors: slice) -> Halves:
    """Splits the rows of a block by whether they read one of the mirrors."""
    none = torch.empty(0, dtype=torch.int64)
    if block is None or mirrors.stop == mirrors.start:
        return Halves(None, none)
    entries = block.indices[int(block.indptr[0]) : int(block.indptr[-1])]
    reads_mirror = ((entries >= mirrors.start) & (entries < mirrors.stop)).long()
    before = torch.cat((reads_mirror.new_zeros(1), reads_mirror.cumsum(0)))
    counts = before[block.indptr - block.indptr[0]].diff()
    return Halves((counts == 0).nonzero().squeeze(1), counts.nonzero().squeeze(1))
