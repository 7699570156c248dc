"""Link prediction as data: some edges are taken out of the graph and asked for.

What is asked for are pairs of nodes. Training pairs stay edges, as in OGB's link data sets;
validation and test pairs are no edges any more, in neither direction.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

VAL_FRACTION = 0.05
TEST_FRACTION = 0.10


def link_graph(graph: Graph, *, channels: int, seed: int = 0) -> Graph:
    """The graph without its held-out edges, and the pairs of all three splits.

    Its labels are gone: a node's scores are its embedding, ``channels`` wide.

    Args:
        graph: directed or not; self-loops are no pairs.
        channels: width of the embeddings.
        seed: of the split.

    Raises:
        UserError: too few edges to hold some out.
    """
    target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    source = graph.indices.astype(np.int64)
    is_pair = source != target if graph.is_directed else source < target
    code = np.unique(source[is_pair] * graph.num_nodes + target[is_pair])
    draw = np.random.default_rng(seed)
    code = code[draw.permutation(code.size)]
    num_val, num_test = int(VAL_FRACTION * code.size), int(TEST_FRACTION * code.size)
    if not num_val:
        raise UserError(
            f"`task.kind` (=link) needs a graph of at least {round(1 / VAL_FRACTION)} edges, not "
            f"{code.size}; there are none to hold out"
        )
    split = np.zeros(code.size, np.int64)
    split[:num_val], split[num_val : num_val + num_test] = 1, 2
    pairs = np.stack(np.divmod(code, graph.num_nodes), axis=1)  # [P, 2]: source, target
    ends = (source, target) if graph.is_directed else _sorted_ends(source, target)
    is_kept = ~np.isin(ends[0] * graph.num_nodes + ends[1], code[split > 0])
    everyone = np.ones(graph.num_nodes, np.bool_)
    edges: dict[str, Any] = {
        name: None if (values := getattr(graph, name)) is None else values[is_kept]
        for name in ("edge_weight", "edge_attr", "edge_type")
    }
    counts = np.bincount(target[is_kept], minlength=graph.num_nodes)
    return replace(
        graph,
        indptr=np.concatenate(([0], np.cumsum(counts))),
        indices=graph.indices[is_kept],
        labels=np.zeros(graph.num_nodes, np.int64),
        num_classes=channels,
        pairs=pairs,
        pair_split=split,
        train_mask=everyone,
        val_mask=~everyone,
        test_mask=~everyone,
        **edges,
    )


def _sorted_ends(
    source: NDArray[np.int64], target: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.minimum(source, target), np.maximum(source, target)
