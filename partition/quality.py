"""What a partition costs: sizes, cut edges, imbalance, halos, replication."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partition.adjacency import require_valid, work_of
from partition.errors import PartitionError
from partition.methods import Assignment


@dataclass(frozen=True)
class Quality:
    """Figures of one partition of N nodes and E directed edges into C chunks and W ways.

    Edges belong to their target. Work is in units of one edge (50 + in-degree per node).
    Imbalance is the largest divided by the mean: 1 is perfect.
    """

    num_nodes: int
    num_edges: int
    num_chunks: int
    num_ways: int

    edge_cut_fraction: float
    """Edges between two chunks, of all edges."""
    node_imbalance: float
    edge_imbalance: float
    work_imbalance: float
    """Over the chunks."""
    replication_factor: float
    """(own + halo nodes) / own nodes, summed over the chunks."""
    chunk_nodes: tuple[int, ...]
    chunk_edges: tuple[int, ...]
    chunk_work: tuple[int, ...]
    chunk_halo: tuple[int, ...]
    """Outside nodes that a chunk reads, ``[C]``."""

    way_cut_fraction: float
    """Edges between two ways, of all edges."""
    way_work_imbalance: float
    """Over the ways, for a whole epoch."""
    cell_work_imbalance: float
    """Ways of a chunk wait for its largest cell: mean over the chunks, weighted by their work."""
    way_replication_factor: float
    """(own + mirror nodes) / own nodes, summed over the ways: forward mirrors."""
    cell_nodes: tuple[tuple[int, ...], ...]
    cell_edges: tuple[tuple[int, ...], ...]
    """By chunk and way, ``[C][W]``."""
    way_halo: tuple[tuple[int, ...], ...]
    """Nodes that a reading way mirrors of an owning way, ``[reader][owner]``: in-neighbours."""
    way_halo_backward: tuple[tuple[int, ...], ...]
    """The same for gradients: out-neighbours; equal to ``way_halo`` on undirected graphs."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers and lists, ready for JSON."""
        return {
            key: _lists(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }


def quality(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    assignment: Assignment,
    *,
    num_chunks: int,
    num_ways: int,
) -> Quality:
    """Measures a partition.

    Args:
        indptr: row starts of the CSR by target, ``[N+1]``.
        indices: sources, ``[E]``.
        assignment: chunk and way of each node.
        num_chunks: chunks C.
        num_ways: ways W.

    Raises:
        PartitionError: arrays that do not fit each other, ids out of range.
    """
    indptr, indices = np.asarray(indptr), np.asarray(indices)
    require_valid(indptr, indices)
    num_nodes = len(indptr) - 1
    chunk, way = (
        _checked(name, ids, num_nodes, count)
        for name, ids, count in (
            ("num_chunks", assignment.chunk_id, num_chunks),
            ("num_ways", assignment.way_id, num_ways),
        )
    )
    target = np.repeat(np.arange(num_nodes), np.diff(indptr))  # [E]
    source = indices.astype(np.int64)  # [E]
    chunk_halo = _halo(chunk, target, source, num_groups=num_chunks).sum(axis=1)  # [C]
    way_halo = _halo(way, target, source, num_groups=num_ways)  # [W, W]
    way_halo_backward = _halo(way, source, target, num_groups=num_ways)

    cell = chunk * num_ways + way  # [N]
    shape = (num_chunks, num_ways)
    cell_nodes = np.bincount(cell, minlength=num_chunks * num_ways).reshape(shape)
    cell_edges = _sums(cell, np.diff(indptr), num_chunks * num_ways).reshape(shape)
    cell_work = _sums(cell, work_of(indptr), num_chunks * num_ways).reshape(shape)
    return Quality(
        num_nodes=num_nodes,
        num_edges=len(indices),
        num_chunks=num_chunks,
        num_ways=num_ways,
        edge_cut_fraction=_fraction(chunk[target] != chunk[source]),
        node_imbalance=_imbalance(cell_nodes.sum(axis=1)),
        edge_imbalance=_imbalance(cell_edges.sum(axis=1)),
        work_imbalance=_imbalance(cell_work.sum(axis=1)),
        replication_factor=float(1 + chunk_halo.sum() / num_nodes),
        chunk_nodes=_ints(cell_nodes.sum(axis=1)),
        chunk_edges=_ints(cell_edges.sum(axis=1)),
        chunk_work=_ints(cell_work.sum(axis=1)),
        chunk_halo=_ints(chunk_halo),
        way_cut_fraction=_fraction(way[target] != way[source]),
        way_work_imbalance=_imbalance(cell_work.sum(axis=0)),
        cell_work_imbalance=float(cell_work.max(axis=1).sum() / cell_work.mean(axis=1).sum()),
        way_replication_factor=float(1 + way_halo.sum() / num_nodes),
        cell_nodes=tuple(_ints(row) for row in cell_nodes),
        cell_edges=tuple(_ints(row) for row in cell_edges),
        way_halo=tuple(_ints(row) for row in way_halo),
        way_halo_backward=tuple(_ints(row) for row in way_halo_backward),
    )


def _checked(name: str, ids: NDArray[Any], num_nodes: int, count: int) -> NDArray[np.int64]:
    """Ids as int64; refuses another length and ids outside ``[0, count)``."""
    if ids.shape != (num_nodes,):
        raise PartitionError(
            f"`assignment` (={list(ids.shape)}) must have one id for each of {num_nodes} nodes; "
            "assign this graph"
        )
    if ids.min() < 0 or ids.max() >= count:
        raise PartitionError(
            f"`assignment` (={ids.min()}..{ids.max()}) must lie below `{name}` (={count}); "
            "pass the numbers it was made with"
        )
    return ids.astype(np.int64)


def _halo(
    group: NDArray[np.int64],
    reader: NDArray[np.int64],
    read: NDArray[np.int64],
    *,
    num_groups: int,
) -> NDArray[np.int64]:
    """Distinct nodes that each group reads of each other group, ``[reader, owner]``.

    Args:
        group: group of each node, ``[N]``.
        reader: reading node of each edge, ``[E]``.
        read: node that it reads, ``[E]``.
        num_groups: number of groups.
    """
    is_outside = group[reader] != group[read]
    pairs = np.unique(group[reader[is_outside]] * len(group) + read[is_outside])
    readers, nodes = np.divmod(pairs, len(group))
    counts = np.bincount(readers * num_groups + group[nodes], minlength=num_groups**2)
    return counts.reshape(num_groups, num_groups)


def _sums(group: NDArray[Any], values: NDArray[Any], num_groups: int) -> NDArray[np.int64]:
    """Sum of integer values by group; float64 sums are exact below 2**53."""
    return np.bincount(group, weights=values, minlength=num_groups).astype(np.int64)


def _imbalance(sizes: NDArray[Any]) -> float:
    """Largest over mean; 1 when there is nothing to share."""
    return float(sizes.max() / sizes.mean()) if sizes.any() else 1.0


def _fraction(mask: NDArray[np.bool_]) -> float:
    """Share of true entries; 0 of nothing."""
    return float(mask.mean()) if len(mask) else 0.0


def _ints(values: NDArray[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _lists(value: Any) -> Any:  # Any: tuples nested one or two deep
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
