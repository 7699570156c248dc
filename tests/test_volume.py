"""Closed formulas of the bytes that an epoch sends, against what the counters of real runs say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from combinations import both_ways, save_partition, train_all, write_npz
from process_pool import ProcessPool

from gnnpipe import chunk
from gnnpipe.assembly import stage_bounds
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.config import load_config
from gnnpipe.configured import model_layers
from gnnpipe.strata import strata_among
from gnnpipe.volume import MirrorCounts, predict_comm_bytes
from gnnpipe.way import way_graph
from partition import Assignment, quality

pytestmark = pytest.mark.timeout(250)

NUM_NODES = 24
NUM_CHUNKS = 3


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ring with chords, and the same with every edge in one direction only."""
    folder = tmp_path_factory.mktemp("graphs")
    ring = [(i, (i + step) % NUM_NODES) for i in range(NUM_NODES) for step in (1, 5)]
    for name, edges in {"ring": both_ways(ring), "directed": [*ring, (3, 9), (3, 15)]}.items():
        graph = write_npz(folder / f"{name}.npz", edges, num_nodes=NUM_NODES)
        save_partition(graph, folder / name, num_chunks=NUM_CHUNKS, num_ways=4)
    return folder


def mirrors_of(chunked: ChunkedGraph, num_ways: int) -> MirrorCounts:
    ways = [way_graph(chunked, way=way, num_ways=num_ways) for way in range(num_ways)]
    return MirrorCounts(
        sum(way.in_mirrors.row_id.size for way in ways),
        sum(way.out_mirrors.row_id.size for way in ways),
    )


def predicted(overrides: list[str]) -> dict[str, int]:
    config = load_config(None, overrides)
    assert config.partition.path is not None
    chunked = chunk.load(config.partition.path)
    layers = model_layers(config, chunked)
    stages, ways = config.parallel.total_stages, config.parallel.num_ways
    return predict_comm_bytes(
        layers,
        bounds=stage_bounds(layers, chunked, num_stages=stages, sizes=None),
        num_stages=config.parallel.num_stages,
        num_nodes=chunked.num_nodes,
        num_ways=ways,
        mirrors=mirrors_of(chunked, ways),
        element_bytes=8 if config.model.dtype == "float64" else 4,
        num_chunks=chunked.num_chunks,
        num_strata=min(config.num_strata, strata_among(np.diff(chunked.out_indptr))),
    )


def test_counters_equal_the_formulas_to_the_byte(
    pool: ProcessPool, graphs: Path, tmp_path: Path
) -> None:
    shapes = [(1, 1, 1), (1, 2, 1), (1, 1, 4), (4, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 2)]
    table = {
        f"{graph}-{model}-{s}{v}{w}": [
            f"data.name={graphs / graph}.npz",
            f"partition.path={graphs / graph}",
            f"partition.num_chunks={NUM_CHUNKS}",
            f"model.name={model}",
            "model.num_layers=6",
            "model.hidden_channels=8",
            f"model.dtype={dtype}",
            f"parallel.num_stages={s}",
            f"parallel.virtual_stages={v}",
            f"parallel.num_ways={w}",
            "training.epochs=2",
        ]
        for graph, model, dtype in (("directed", "gcnii", "float32"), ("ring", "gat", "float64"))
        for s, v, w in shapes
    }
    # Gathering from a directed graph and a model without carried rows, in a corner.
    table |= {
        f"directed-{model}-212": [
            part.replace("gcnii", model) for part in table["directed-gcnii-212"]
        ]
        for model in ("gat", "sage")
    }
    table["ring-norm"] = [*table["ring-gat-212"], "model.norm=batch"]
    results = train_all(pool, tmp_path, table)
    for name, result in results.items():
        expected = predicted(table[name])
        for epoch in result.comm_bytes:
            counted = {kind: epoch[kind] for kind in expected}
            assert counted == expected, name
    kinds = {kind for result in results.values() for kind, n in result.comm_bytes[0].items() if n}
    assert kinds >= {"boundary", "carried", "halo", "gradient"}


def test_partition_report_counts_the_same_mirrors(graphs: Path) -> None:
    for name in ("ring", "directed"):
        chunked = chunk.load(graphs / name)
        finest = quality_of(chunked)
        counts = mirrors_of(chunked, 4)
        assert sum(sum(row) for row in finest["way_halo"]) == counts.incoming
        assert sum(sum(row) for row in finest["way_halo_backward"]) == counts.outgoing
        assert finest["way_replication_factor"] == pytest.approx(
            1 + counts.incoming / chunked.num_nodes
        )


def quality_of(chunked: ChunkedGraph) -> dict[str, Any]:
    """The report of the partition in the numbering that it made."""
    cell = np.repeat(np.arange(len(chunked.cell_ptr) - 1), np.diff(chunked.cell_ptr))
    chunk_id, way_id = np.divmod(cell.astype(np.int32), np.int32(chunked.num_ways))
    return quality(
        chunked.indptr,
        chunked.indices,
        Assignment(chunk_id, way_id),
        num_chunks=chunked.num_chunks,
        num_ways=chunked.num_ways,
    ).to_dict()
