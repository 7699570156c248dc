"""A seeded graph of any size for benchmarks: skewed degrees, communities, features by class.

Nodes lie in communities of consecutive numbers, each with one class. An edge takes its source
with probability proportional to ``rank^-1/2`` (a heavy tail of degrees) and its target, mostly,
from the source's community.
"""

import re
from typing import Any

import numpy as np

from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

Array = np.ndarray[Any, Any]

PATTERN = re.compile(r"synthetic:(\d+):(\d+)(?::(\d+))?")
CLASSES = 16
CHANNELS = 64
COMMUNITY_NODES = 1000
INSIDE_FRACTION = 0.8
SIGNAL = 0.5
"""Length of a class's mean feature beside noise of deviation 1."""


def synthetic(name: str, *, seed: int) -> Graph:
    """Makes the graph ``synthetic:NODES:EDGES[:CLASSES]``, undirected.

    Args:
        name: EDGES counts both directions; a few fewer are left once loops and doubles are out.
        seed: of everything.

    Raises:
        UserError: another form, or numbers that no graph has.
    """
    match = PATTERN.fullmatch(name)
    if match is None:
        raise UserError(
            f"`data.name` (={name}) must be synthetic:NODES:EDGES or with :CLASSES after it;"
            " try synthetic:10000:100000"
        )
    num_nodes, num_edges, num_classes = (int(part or CLASSES) for part in match.groups())
    if not 2 <= num_classes <= num_nodes < 2**31:
        raise UserError(
            f"`data.name` (={name}) must have at least 2 classes and as many nodes; use more nodes"
        )
    draw = np.random.default_rng(seed)
    labels = np.arange(num_nodes) // COMMUNITY_NODES % num_classes
    if num_nodes < COMMUNITY_NODES * num_classes:
        labels = np.arange(num_nodes) * num_classes // num_nodes
    means = draw.standard_normal((num_classes, CHANNELS), dtype=np.float32)
    features = draw.standard_normal((num_nodes, CHANNELS), dtype=np.float32)
    features += SIGNAL * means[labels]
    split = draw.random(num_nodes)
    return Graph.from_edge_index(
        _edges(num_nodes, num_edges, draw),
        name=name,
        num_nodes=num_nodes,
        features=features,
        labels=labels,
        num_classes=num_classes,
        train_mask=split < 0.5,
        val_mask=(split >= 0.5) & (split < 0.75),
        test_mask=split >= 0.75,
    )


def _edges(num_nodes: int, num_edges: int, draw: np.random.Generator) -> Array:
    """Both directions of distinct edges without loops, ``[2, E]``, int64."""
    count = num_edges // 2
    source = draw.permutation(num_nodes)[(draw.random(count) ** 2 * num_nodes).astype(np.int64)]
    first = source // COMMUNITY_NODES * COMMUNITY_NODES
    size = np.minimum(num_nodes - first, COMMUNITY_NODES)
    inside = first + (draw.random(count) * size).astype(np.int64)
    target = np.where(
        draw.random(count) < INSIDE_FRACTION, inside, draw.integers(num_nodes, size=count)
    )
    is_edge = source != target
    low, high = np.minimum(source, target)[is_edge], np.maximum(source, target)[is_edge]
    code = np.unique(low * num_nodes + high)
    low, high = np.divmod(code, num_nodes)
    return np.stack((np.concatenate((low, high)), np.concatenate((high, low))))
