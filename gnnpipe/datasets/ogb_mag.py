"""ogbn-mag, OGB's graph of papers, authors, institutions and fields, as one typed graph.

Types of nodes follow each other in one numbering. Every relation has an edge type, and its
inverse another one, so that all nodes are reached; the paper that cites and is cited too.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gnnpipe.datasets.tables import csv_array
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

LABELLED = "paper"
FEATURE_ROUNDS = 3


def read_mag(folder: Path, scheme: str, num_classes: int) -> Graph:
    """Reads the raw layout of a heterogeneous data set.

    Nodes of types without features get the mean of their in-neighbours' features, round by
    round; ``features_note`` says so.

    Args:
        folder: holds ``raw`` and ``split``.
        scheme: of the split.
        num_classes: classes of the papers.

    Raises:
        UserError: files are missing or damaged.
    """
    raw = folder / "raw"
    counts = _header_counts(raw / "num-node-dict.csv.gz")
    starts = dict(zip(counts, np.cumsum([0, *counts.values()])[:-1].tolist(), strict=True))
    num_nodes = sum(counts.values())
    edges, kinds = _edges(raw, starts)
    own = slice(starts[LABELLED], starts[LABELLED] + counts[LABELLED])
    labels = np.full(num_nodes, -1, np.int64)
    labels[own] = csv_array(raw / f"node-label/{LABELLED}/node-label.csv.gz", dtype="int64")[:, 0]
    features, is_own = _features(raw, starts, counts)
    masks: dict[str, Any] = {}
    for ours, theirs in (("train", "train"), ("val", "valid"), ("test", "test")):
        path = folder / f"split/{scheme}/{LABELLED}/{theirs}.csv.gz"
        masks[f"{ours}_mask"] = np.zeros(num_nodes, np.bool_)
        masks[f"{ours}_mask"][csv_array(path, dtype="int64")[:, 0] + own.start] = True
    return Graph.from_edge_index(
        edges,
        edge_type=kinds,
        is_directed=True,
        name="ogbn-mag",
        labels=labels,
        num_classes=num_classes,
        features=spread_features(features, is_own, edges),
        node_type=np.repeat(np.arange(len(counts)), list(counts.values())),
        features_note="nodes without features have the mean of their in-neighbours'",
        **masks,
    )


def spread_features(
    features: NDArray[np.float32], has_features: NDArray[np.bool_], edges: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Gives nodes without features the mean of those in-neighbours that have some by then.

    Args:
        features: ``[N, F]``, overwritten.
        has_features: ``[N]``.
        edges: ``[2, E]``.
    """
    from scipy import sparse

    num_nodes = len(features)
    for _ in range(FEATURE_ROUNDS):
        is_used = has_features[edges[0]] & ~has_features[edges[1]]
        source, target = edges[:, is_used]
        ones = np.ones(source.size, np.float32)
        matrix = sparse.csr_array((ones, (target, source)), shape=(num_nodes, num_nodes))
        count = np.bincount(target, minlength=num_nodes)
        reached = count > 0
        features[reached] = (matrix @ features)[reached] / count[reached, None]
        has_features = has_features | reached
    return features


def _edges(raw: Path, starts: dict[str, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every relation and its inverse, ``[2, E]``, and the type of each edge."""
    lists, kinds = [], []
    for number, (source, relation, target) in enumerate(_triplets(raw / "triplet-list.csv.gz")):
        folder = raw / "relations" / f"{source}___{relation}___{target}"
        pairs = csv_array(folder / "edge.csv.gz", dtype="int64").T
        pairs = pairs + np.array([[starts[source]], [starts[target]]])
        for kind, edges in ((2 * number, pairs), (2 * number + 1, pairs[::-1])):
            lists.append(edges)
            kinds.append(np.full(edges.shape[1], kind, np.int64))
    return np.concatenate(lists, axis=1), np.concatenate(kinds)


def _features(
    raw: Path, starts: dict[str, int], counts: dict[str, int]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    num_nodes, found = sum(counts.values()), {}
    for kind in counts:
        path = raw / f"node-feat/{kind}/node-feat.csv.gz"
        if path.exists():
            found[kind] = csv_array(path, dtype="float32")
    if not found:
        return np.zeros((num_nodes, 0), np.float32), np.zeros(num_nodes, np.bool_)
    width = next(iter(found.values())).shape[1]
    features = np.zeros((num_nodes, width), np.float32)
    is_own = np.zeros(num_nodes, np.bool_)
    for kind, values in found.items():
        rows = slice(starts[kind], starts[kind] + counts[kind])
        features[rows], is_own[rows] = values, True
    return features, is_own


def _header_counts(path: Path) -> dict[str, int]:
    """A line of names and a line of counts."""
    names, numbers = _lines(path)[:2]
    return {name: int(number) for name, number in zip(names, numbers, strict=True)}


def _triplets(path: Path) -> list[list[str]]:
    return sorted(_lines(path))


def _lines(path: Path) -> list[list[str]]:
    import gzip

    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [line.strip().split(",") for line in file if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is missing or damaged; download it anew") from error
