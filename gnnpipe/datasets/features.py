"""Node features that are made from the graph alone, for graphs that have none of their own.

They carry the structure and no label. A result obtained with them is not comparable with one on
the data set's own features, so each is labelled in ``Graph.features_note``.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from gnnpipe.errors import UserError
from gnnpipe.graph import Features, Graph

CHOICES = ("auto", "surrogate", "degree")
SURROGATE_CHANNELS = 128
SURROGATE_HOPS = 3
DEGREE_BINS = 32  # log2(1 + degree) stays below: a row has at most 2^31 - 1 edges


def choose_features(graph: Graph, choice: str, *, seed: int = 0) -> Graph:
    """The graph with the features that ``data.features`` asks for.

    Args:
        graph: its own features count as none when they have no column.
        choice: ``auto``, ``surrogate`` or ``degree``.
        seed: of the surrogate's noise.

    Raises:
        UserError: unknown choice, or ``auto`` on a graph without features.
    """
    if choice not in CHOICES:
        raise UserError(f"`data.features` (={choice}) must be one of {', '.join(CHOICES)}")
    if choice == "surrogate":
        note = f"surrogate: made from the graph (seed {seed}), not the data set's own"
        return replace(graph, features=surrogate_features(graph, seed=seed), features_note=note)
    if choice == "degree":
        note = "degree: made from the graph, not the data set's own"
        return replace(graph, features=degree_features(graph), features_note=note)
    if graph.num_features == 0:
        raise UserError(
            f"`data.features` (=auto) finds none in {graph.name}; "
            "set data.features=surrogate or data.features=degree"
        )
    return graph


def surrogate_features(graph: Graph, *, seed: int = 0) -> NDArray[np.float32]:
    """Gaussian noise, smoothed over the graph: neighbours, hence communities, look alike.

    With A the undirected structure (weights ignored), D its degrees and G standard normal
    ``[N, 128]``, ``H_0 = D^-1/2 G`` and ``H_k = D^-1 A H_{k-1}``; the features are the sum over
    k = 1..3 of H_k with every row scaled to length 1. After FastRP (Chen et al., "Fast and
    accurate network embeddings via very sparse random projection", CIKM 2019).

    Returns:
        ``[N, 128]``; rows of isolated nodes are zero.
    """
    n = graph.num_nodes
    ones = np.ones(graph.num_edges, np.float32)
    adjacency = sparse.csr_array((ones, graph.indices, graph.indptr), shape=(n, n))
    adjacency = sparse.csr_array(adjacency + adjacency.T)
    adjacency.data[:] = 1
    degree = np.maximum(np.diff(adjacency.indptr), 1)  # [N]
    adjacency.data /= np.repeat(degree, np.diff(adjacency.indptr))
    noise = np.random.default_rng(seed).standard_normal((n, SURROGATE_CHANNELS), dtype=np.float32)
    h = noise / np.sqrt(degree, dtype=np.float32)[:, None]
    features: NDArray[np.float32] = np.zeros_like(h)
    for _ in range(SURROGATE_HOPS):
        h = adjacency @ h
        features += h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-9)
    return features


def degree_features(graph: Graph) -> NDArray[np.float32]:
    """In- and out-degree, each as a soft one-hot row over 32 logarithmic bins.

    A degree d lies at p = log2(1 + d); bin floor(p) gets 1 - frac(p) and the next bin frac(p), so
    every degree has its own row and near degrees have near rows.

    Returns:
        ``[N, 64]``: in-degree bins, then out-degree bins.
    """
    in_degree = np.diff(graph.indptr)
    out_degree = np.bincount(graph.indices, minlength=graph.num_nodes)
    return np.hstack([_soft_one_hot(np.log2(1.0 + d)) for d in (in_degree, out_degree)])


def _soft_one_hot(position: NDArray[np.float64]) -> NDArray[np.float32]:
    rows = np.arange(len(position))
    low = position.astype(np.int64)  # [N]
    table = np.zeros((len(position), DEGREE_BINS + 1), np.float32)
    table[rows, low] = 1 - (position - low)
    table[rows, low + 1] = position - low
    return table[:, :DEGREE_BINS]


def normalise_rows(features: Features) -> Features:
    """Divides each row by the sum of its magnitudes; rows of zeros stay. Sparse stays sparse."""
    if sparse.issparse(features):
        table: Any = features  # scipy ships no types
        scaled = table.copy()
        scaled.data /= np.repeat(_row_sums(abs(table)), np.diff(table.indptr))
        return scaled
    return features / _row_sums(np.abs(features))[:, None]


def _row_sums(magnitudes: Any) -> NDArray[np.float32]:
    sums = np.asarray(magnitudes.sum(axis=1), np.float32)
    return np.where(sums > 0, sums, np.float32(1))
