"""From a configuration and a graph to a plan: counts, profile, predictions."""

import dataclasses
from collections.abc import Sequence
from math import exp, sqrt
from typing import Any, NamedTuple

import numpy as np

from gnnpipe import chunk
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.config import Config
from gnnpipe.configured import layers_between, model_layers
from gnnpipe.costs import Line, Links, Profile
from gnnpipe.graph import Graph
from gnnpipe.memory import FeatureCounts, storage_of
from gnnpipe.models.layer import Layer
from gnnpipe.planner import Planner
from gnnpipe.profiling import measure
from gnnpipe.setting import GraphShape, Prediction, Setting, WayShape, choose, settings
from gnnpipe.strata import strata_in
from gnnpipe.volume import MirrorCounts
from partition import assign

CHUNKS = (4, 8, 16, 32, 64)
PROFILE_CHUNKS = (4, 24)
PROFILE_LAYERS = 4
MIRROR_CONSTANT = 0.26


class Counts(NamedTuple):
    """A graph that is not here, by its counts."""

    num_nodes: int
    num_edges: int
    num_features: int
    num_classes: int


SHAPES = {
    "ogbn-arxiv": Counts(169_343, 2_315_598, 128, 40),
    "ogbn-products": Counts(2_449_029, 123_718_280, 100, 47),
    "ogbn-papers100M": Counts(111_059_956, 3_231_371_744, 128, 172),
}
"""Published counts, both directions of every edge."""

GPU = Profile(
    {
        f"{role} {kind}": Line(3e-4, per_row, per_edge)
        for role, edge in (("input", 0.0), ("convolution", 5e-10), ("output", 0.0))
        for kind, per_row, per_edge in (("F", 4e-9, edge), ("B", 8e-9, edge))
    },
    2e-11,
    "assumed: a GPU that gathers 0.8 TB/s at width 100 and needs 0.3 ms to start a layer",
    0.0,
    0.0,
)
"""For what-if plans without a measured profile."""


def profile_of(
    graph: Graph, config: Config, *, cuts: Sequence[ChunkedGraph] | None = None
) -> Profile:
    """Measures a few layers of the configured model on this graph, on this machine.

    Args:
        graph: the graph.
        config: the run.
        cuts: the graph in different numbers of chunks; None cuts it.
    """
    short = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=PROFILE_LAYERS),
        parallel=dataclasses.replace(
            config.parallel, num_stages=1, virtual_stages=1, layers_per_stage=None
        ),
    )
    if cuts is None:
        cuts = [_cut(graph, config, min(count, graph.num_nodes)) for count in PROFILE_CHUNKS]
    return measure(
        cuts,
        lambda: model_layers(short, graph),
        strata=config.num_strata,
        late_gradient=config.late_gradient,
    )


def shape_of(graph: Graph) -> GraphShape:
    """The counts of a graph; what ways do to it is found by cutting it."""
    features = graph.features
    entries = None if isinstance(features, np.ndarray) else int(features.nnz)
    return GraphShape(
        graph.num_nodes,
        graph.num_edges,
        FeatureCounts(graph.num_features, entries),
        not graph.is_directed,
        lambda num_ways: _ways(graph, num_ways),
        lambda num_chunks: _chunk_loads(graph, num_chunks),
        strata_in(graph),
    )


def assumed_shape(counts: Counts) -> GraphShape:
    """A graph known by its counts only.

    Mirrors per node are ``(W - 1) (1 - exp(-0.26 sqrt(degree) / W))``: 0.8 and 3.4 at 8 ways and
    mean degrees of 14 and 490, where METIS cuts of ogbn-arxiv and Reddit have 0.7 and 2.6.
    """

    def ways(num_ways: int) -> WayShape:
        degree = counts.num_edges / counts.num_nodes
        share = 1 - exp(-MIRROR_CONSTANT * sqrt(degree) / num_ways)
        mirrors = round(counts.num_nodes * (num_ways - 1) * share)
        return WayShape(MirrorCounts(mirrors, mirrors), 0.5 if num_ways > 1 else 1.0)

    features = FeatureCounts(counts.num_features, None)
    return GraphShape(counts.num_nodes, counts.num_edges, features, True, ways)


def assumed_layers(config: Config, counts: Counts) -> list[Layer]:
    """The configured model for such a graph, without storage."""
    return layers_between(config, counts.num_features, counts.num_classes)


def predict_all(
    planner: Planner, num_ranks: int, *, chunks: Sequence[int], num_layers: int, num_nodes: int
) -> list[Prediction]:
    """Every setting's prediction, the quickest first."""
    found = [
        planner.predict(setting)
        for setting in settings(
            num_ranks,
            num_layers=num_layers,
            chunks=chunks,
            num_nodes=num_nodes,
            schedules=planner.schedules,
        )
    ]
    return sorted(found, key=lambda p: p.epoch_s)


def auto_plan(
    config: Config, graph: Graph, num_ranks: int, links: Links, *, cores: int | None = None
) -> Prediction:
    """What ``parallel.plan: auto`` takes: exactly ``num_ranks`` ranks, chunks as configured."""
    layers = model_layers(config, graph)
    planner = Planner(
        layers,
        shape_of(graph),
        profile=profile_of(graph, config),
        links=links,
        storage=storage_of(config),
        steps=config.training.steps_per_epoch,
        cores=cores,
    )
    count = config.partition.num_chunks
    possible = settings(
        num_ranks,
        num_layers=len(layers),
        chunks=[count],
        num_nodes=graph.num_nodes,
        schedules=planner.schedules,
    )
    candidates = {s._replace(num_chunks=count) for s in possible if s.num_ranks == num_ranks}
    return choose([planner.predict(setting) for setting in sorted(candidates)])


def applied(config: Config, setting: Setting, sizes: Sequence[int]) -> Config:
    """The configuration with a setting in place of a plan, cut into stages as it was predicted."""
    parallel = dataclasses.replace(
        config.parallel,
        plan="manual",
        num_stages=setting.num_stages,
        num_ways=setting.num_ways,
        schedule=setting.schedule,
        virtual_stages=setting.virtual_stages,
        layers_per_stage=tuple(sizes) if setting.num_stages > 1 else None,
    )
    partition = dataclasses.replace(config.partition, num_chunks=setting.num_chunks)
    return dataclasses.replace(config, parallel=parallel, partition=partition)


def _cut(graph: Graph, config: Config, num_chunks: int) -> ChunkedGraph:
    wanted = config.partition
    method = "metis" if wanted.method == "file" else wanted.method
    ids = assign(
        graph.indptr,
        graph.indices,
        num_chunks=num_chunks,
        method=method,
        parts_per_chunk=wanted.parts_per_chunk,
    )
    return chunk.cut(graph, *ids, num_ways=1, method=method, seed=0)


def _ways(graph: Graph, num_ways: int) -> WayShape:
    """Cuts a graph into ways and counts what they mirror."""
    if num_ways == 1:
        return WayShape(MirrorCounts(0, 0), 1.0)
    ids = assign(graph.indptr, graph.indices, num_chunks=1, num_ways=num_ways)
    way: Any = np.asarray(ids.way_id, dtype=np.int64)
    target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    source = graph.indices.astype(np.int64)
    crosses = way[source] != way[target]
    incoming = np.unique(way[target[crosses]] * graph.num_nodes + source[crosses])
    outgoing = np.unique(way[source[crosses]] * graph.num_nodes + target[crosses])
    traffic = [
        np.bincount(ends, minlength=num_ways)
        for rows in (incoming, outgoing)
        for ends in (rows // graph.num_nodes, way[rows % graph.num_nodes])  # receives, sends
    ]
    reads_mirror = np.bincount(target[crosses], minlength=graph.num_nodes) > 0
    interior = 1.0 - float(reads_mirror[target].mean()) if target.size else 1.0
    return WayShape(
        MirrorCounts(incoming.size, outgoing.size),
        interior,
        max(_peak(counts) for counts in traffic),
        tuple(loads_of(way, np.diff(graph.indptr), num_ways)),
    )


def _chunk_loads(graph: Graph, num_chunks: int) -> list[tuple[float, float]]:
    """Cuts a graph into chunks; their rows and edges over the mean chunk's."""
    ids = assign(graph.indptr, graph.indices, num_chunks=num_chunks)
    return loads_of(np.asarray(ids.chunk_id), np.diff(graph.indptr), num_chunks)


def loads_of(parts: Any, degrees: Any, num_parts: int) -> list[tuple[float, float]]:
    """Rows and edges of each part of a graph, over the mean part's.

    Args:
        parts: of each node, ``[N]``.
        degrees: edges into each node, ``[N]``.
        num_parts: parts.
    """
    counts = (np.bincount(parts, weights, num_parts) for weights in (None, degrees))
    rows, edges = (own / max(own.mean(), 1e-9) for own in counts)
    return list(zip(rows.tolist(), edges.tolist(), strict=True))


def _peak(counts: Any) -> float:
    """The largest of some counts over their mean."""
    return float(counts.max() / counts.mean()) if counts.sum() else 1.0
