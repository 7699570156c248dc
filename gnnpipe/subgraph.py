"""Parts of a graph that are graphs: induced by some nodes, or by what some nodes read.

Work and memory are of the order of what is taken, not of the graph, so that a few nodes of a
large memory-mapped graph are served quickly.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gnnpipe.arrays import exact
from gnnpipe.degrees import ranges
from gnnpipe.errors import UserError
from gnnpipe.graph import MASKS, Graph

EDGE_ARRAYS = ("edge_weight", "edge_attr", "edge_type")


def induced(graph: Graph, node_id: NDArray[np.int64]) -> Graph:
    """The graph of some nodes and of the edges among them.

    Args:
        graph: the whole.
        node_id: ascending, each once; they become 0, 1, 2, ...
    """
    starts, ends = graph.indptr[node_id], graph.indptr[node_id + 1]
    entries = ranges(starts, ends)
    row = np.repeat(np.arange(node_id.size), ends - starts)
    source = np.asarray(graph.indices[entries])
    column = np.minimum(np.searchsorted(node_id, source), max(node_id.size - 1, 0))
    is_kept = node_id[column] == source if node_id.size else np.zeros(0, np.bool_)
    entries, counts = entries[is_kept], np.bincount(row[is_kept], minlength=node_id.size)
    taken: dict[str, Any] = {
        name: getattr(graph, name)[node_id] for name in ("features", "labels", *MASKS)
    }
    for name, index in (("node_type", node_id), *((name, entries) for name in EDGE_ARRAYS)):
        values = getattr(graph, name)
        taken[name] = None if values is None else values[index]
    return replace(
        graph,
        num_nodes=node_id.size,
        indptr=np.concatenate(([0], np.cumsum(counts))),
        indices=column[is_kept].astype(np.int32),
        pairs=None,
        pair_split=None,
        **taken,
    )


def training_part(graph: Graph) -> Graph:
    """What inductive training sees: the training nodes and the edges among them."""
    return induced(graph, np.flatnonzero(graph.train_mask))


def neighbourhood(graph: Graph, nodes: NDArray[np.int64], num_hops: int) -> NDArray[np.int64]:
    """Nodes that reach one of ``nodes`` along at most ``num_hops`` edges, ascending."""
    found = front = np.unique(nodes)
    for _ in range(num_hops):
        entries = ranges(graph.indptr[front], graph.indptr[front + 1])
        front = np.setdiff1d(np.asarray(graph.indices[entries]), found)
        if not front.size:
            break
        found = np.union1d(found, front)
    return found


def checked_nodes(graph: Graph, nodes: ArrayLike) -> NDArray[np.int64]:
    """Ids of nodes that the graph has, ``[n]``.

    Raises:
        UserError: other numbers.
    """
    ids = exact(nodes, "nodes", np.int64).reshape(-1)
    if not ids.size or ids.min() < 0 or ids.max() >= graph.num_nodes:
        shown = f"{ids.min()}..{ids.max()}" if ids.size else "none"
        raise UserError(
            f"`nodes` (={shown}) must be ids from 0 to {graph.num_nodes - 1}; "
            "name at least one node of this graph"
        )
    return ids
