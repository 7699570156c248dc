"""Splits that a partitioner seldom makes: empty cells, ways without a halo, other ways by rows."""

import logging
from pathlib import Path

import numpy as np
import pytest
from combinations import (
    both_ways,
    largest_difference,
    save_partition,
    train_all,
    write_npz,
)
from process_pool import ProcessPool

from gnnpipe import chunk
from gnnpipe.config import load_config
from gnnpipe.trainer import check_partition
from gnnpipe.way import way_graph

pytestmark = pytest.mark.timeout(250)

NUM_NODES = 24
DIRECTED = [(i, (i + 1) % 12) for i in range(12)] + [(i, i + 3) for i in range(12, 21)] + [(5, 5)]
"""A ring of nodes 0 to 11 with a self-loop, and three strings of 12 to 23: no edge between."""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two halves without an edge between them, in three chunks and two or three ways::

    odd       way 0                    way 1
    chunk 0   the ring's 0 to 5        every second of the strings': no halo
    chunk 1   the ring's 6 to 11       the others of the strings
    chunk 2   23                       no node at all
    """
    folder = tmp_path_factory.mktemp("graphs")
    for name, edges in {"directed": DIRECTED, "undirected": both_ways(DIRECTED)}.items():
        graph = write_npz(folder / f"{name}.npz", edges, num_nodes=NUM_NODES)
        node = np.arange(NUM_NODES)
        chunk_id = np.where(node < 12, node // 6, node % 2)
        way_id = (node >= 12).astype(np.int64)
        chunk_id[23], way_id[23] = 2, 0
        odd = chunk.cut(graph, chunk_id, way_id, num_ways=2, method="file", seed=0)
        chunk.save(odd, folder / f"{name}-odd")
        save_partition(graph, folder / f"{name}-three", num_chunks=3, num_ways=3)
    return folder


def run_of(
    graphs: Path, name: str, partition: str, model: str, *, stages: int, ways: int
) -> list[str]:
    return [
        f"data.name={graphs / name}.npz",
        f"partition.path={graphs / name}-{partition}",
        "partition.num_chunks=3",
        f"model.name={model}",
        "model.num_layers=4",
        "model.hidden_channels=8",
        "model.dtype=float64",
        f"parallel.num_stages={stages}",
        f"parallel.num_ways={ways}",
        "training.epochs=6",
    ]


def test_the_odd_partition_is_as_drawn(graphs: Path) -> None:
    chunked = chunk.load(graphs / "directed-odd")
    assert np.diff(chunked.cell_ptr).tolist() == [6, 6, 6, 5, 1, 0]
    one = way_graph(chunked, way=1, num_ways=2)
    # Only node 20 -> 23 crosses, and only the way that holds 23 reads.
    assert one.in_mirrors.row_id.size == 0
    assert one.out_mirrors.row_id.size == 1
    assert [sends[0].size for sends in one.out_sends] == [0, 0, 0]


@pytest.mark.parametrize("model", ["gcnii", "gat"])
def test_empty_cells_missing_halos_and_ways_by_rows_change_nothing(
    model: str, pool: ProcessPool, graphs: Path, tmp_path: Path
) -> None:
    table = {}
    for name in ("directed", "undirected"):
        for partition in ("odd", "three"):
            for stages, ways in ((1, 1), (1, 2), (2, 2)):
                key = f"{name}-{partition}-{stages}{ways}"
                shape = {"stages": stages, "ways": ways}
                table[key] = run_of(graphs, name, partition, model, **shape)
    results = train_all(pool, tmp_path, table)
    for name, result in results.items():
        one = results[f"{name.rsplit('-', 1)[0]}-11"]
        assert len(set(one.losses)) == 6
        assert largest_difference(one, result) < 1e-9, name


def test_another_number_of_ways_warns_of_its_halo(
    graphs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chunked = chunk.load(graphs / "directed-three")
    for ways, warns in ((1, False), (3, False), (2, True)):
        caplog.clear()
        overrides = ["partition.num_chunks=3", f"parallel.num_ways={ways}"]
        with caplog.at_level(logging.WARNING, logger="gnnpipe"):
            check_partition(chunked, load_config(None, overrides))
        assert ("a larger halo; cut again with --num-ways 2" in caplog.text) == warns
