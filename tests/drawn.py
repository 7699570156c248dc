"""Graphs that a person can draw, for the tests of partition and chunk."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from gnnpipe import chunk
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.graph import Graph

Csr = tuple[NDArray[np.int64], NDArray[np.int32]]


def csr(num_nodes: int, edges: list[tuple[int, int]]) -> Csr:
    """In-edges by target of directed edges (source, target)."""
    ordered = sorted(edges, key=lambda edge: (edge[1], edge[0]))
    counts = np.bincount([target for _, target in ordered], minlength=num_nodes)
    indices = np.array([source for source, _ in ordered], dtype=np.int32)
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64), indices


def undirected(num_nodes: int, edges: list[tuple[int, int]]) -> Csr:
    return csr(num_nodes, [*edges, *((b, a) for a, b in edges)])


def path(num_nodes: int) -> Csr:
    return undirected(num_nodes, [(i, i + 1) for i in range(num_nodes - 1)])


def cliques(count: int, size: int) -> Csr:
    """Complete graphs on consecutive nodes, each joined to the next by one edge."""
    edges = []
    for first in range(0, count * size, size):
        edges += [(first + i, first + j) for i in range(size) for j in range(i)]
        edges += [(first + size - 1, first + size)] if first + size < count * size else []
    return undirected(count * size, edges)


def star(num_nodes: int) -> Csr:
    return undirected(num_nodes, [(0, leaf) for leaf in range(1, num_nodes)])


def graph_of(num_nodes: int, edges: list[tuple[int, int]], **fields: Any) -> Graph:
    """Node i has feature i and label i % 2; every third node trains."""
    node = np.arange(num_nodes)
    given = {
        "features": node[:, None].astype(np.float32),
        "labels": node % 2,
        "num_classes": 2,
        "train_mask": node % 3 == 0,
        "val_mask": node % 3 == 1,
        "test_mask": node % 3 == 2,
        **fields,
    }
    edge_index = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    return Graph.from_edge_index(edge_index, name="drawn", num_nodes=num_nodes, **given)


def cut(graph: Graph, chunk_id: list[int], way_id: list[int] | None = None) -> ChunkedGraph:
    way_id = way_id or [0] * graph.num_nodes
    return chunk.cut(
        graph,
        np.array(chunk_id),
        np.array(way_id),
        num_ways=max(way_id) + 1,
        method="file",
        seed=0,
    )


def symmetric_square() -> ChunkedGraph:
    """A ring 0 - 1 - 2 - 3 in two chunks of two ways.

    chunk 0: nodes 1 (way 0), 2 (way 1); chunk 1: nodes 3 (way 0), 0 (way 1)
    """
    edges = [(0, 1), (1, 2), (2, 3), (3, 0)]
    graph = graph_of(4, [*edges, *((b, a) for a, b in edges)])
    return cut(graph, [1, 0, 0, 1], [1, 0, 1, 0])


def directed_weighted() -> ChunkedGraph:
    edges = [(0, 1), (2, 1), (1, 2), (0, 3), (3, 3), (4, 0)]
    weight = np.arange(1, 7, dtype=np.float32)
    graph = graph_of(
        5,
        edges,
        edge_weight=weight,
        edge_attr=weight[:, None] * np.array([[10, 100]], dtype=np.float32),
        edge_type=weight.astype(np.int64),
        node_type=np.array([0, 1, 2, 3, 4]),
        features=sparse.csr_array(np.diag([1.0, 2.0, 3.0, 4.0, 5.0]).astype(np.float32)),
        features_note="made up",
    )
    return cut(graph, [1, 0, 1, 0, 1])


def woven(
    num_nodes: int = 24,
    *,
    is_directed: bool = False,
    is_weighted: bool = False,
    is_sparse: bool = False,
) -> Graph:
    """A random graph with self-loops, two isolated nodes, and training nodes without a label.

    No parallel edges; three classes that the five features tell apart a little.
    """
    draw = np.random.default_rng(num_nodes)
    ends = draw.integers(num_nodes - 2, size=(2, 3 * num_nodes))
    weight_of = draw.uniform(0.5, 2.0, size=(num_nodes, num_nodes))
    if not is_directed:
        ends = np.concatenate([ends, ends[::-1]], axis=1)
        weight_of = weight_of + weight_of.T
    source, target = np.unique(np.concatenate([ends, np.full((2, 1), 3)], axis=1), axis=1)
    labels = draw.integers(3, size=num_nodes)
    features = (draw.random((num_nodes, 5)) < 0.4).astype(np.float32)
    features[np.arange(num_nodes), labels] += 1.0
    return graph_of(
        num_nodes,
        list(zip(source.tolist(), target.tolist(), strict=True)),
        edge_weight=weight_of[source, target].astype(np.float32) if is_weighted else None,
        features=sparse.csr_array(features) if is_sparse else features,
        labels=np.where(np.arange(num_nodes) % 9 == 3, -1, labels),
        num_classes=3,
    )
