"""The pipeline in real processes: the same numbers for any number of stages, ways and launcher."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from by_hand import strata_of
from combinations import (
    COMMON,
    Result,
    both_ways,
    differing,
    largest_difference,
    read_run,
    reference_run,
    save_partition,
    train_all,
    write_npz,
)
from process_pool import ProcessPool

from gnnpipe import chunk
from gnnpipe.datasets import load_graph

pytestmark = pytest.mark.timeout(250)

ROOT = Path(__file__).resolve().parents[1]
NUM_NODES = 40
OTHER_MODELS = ("gcn", "sage", "gin", "resgcn+")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ring of 40 nodes with chords to the seventh neighbour, in 1, 4 and 8 chunks of 4 ways.

    The same with every edge in one direction only, a self-loop and two nodes without edges.
    Cells are random, so that there are edges of every kind between chunks and ways.
    """
    folder = tmp_path_factory.mktemp("graphs")
    ring = [(i, (i + step) % NUM_NODES) for i in range(NUM_NODES) for step in (1, 7)]
    lonely = [edge for edge in ring if not {20, 33} & set(edge)]
    graph = write_npz(folder / "ring.npz", both_ways(ring), num_nodes=NUM_NODES)
    directed = write_npz(folder / "directed.npz", [*lonely, (5, 5)], num_nodes=NUM_NODES)
    assert directed.is_directed
    assert not graph.is_directed
    for num_chunks in (1, 4, 8):
        counts = {"num_chunks": num_chunks, "num_ways": 4}
        save_partition(graph, folder / f"ring-{num_chunks}", **counts, method="random")
    save_partition(directed, folder / "directed-4", **counts | {"num_chunks": 4}, method="random")
    return folder


def run_of(graphs: Path, model: str, *, num_chunks: int, graph: str = "ring") -> list[str]:
    """Overrides of a run of six convolutions, eight layers in all."""
    return [
        f"data.name={graphs / graph}.npz",
        f"partition.path={graphs / graph}-{num_chunks}",
        f"partition.num_chunks={num_chunks}",
        f"model.name={model}",
        "model.num_layers=6",
        "model.hidden_channels=8",
        "history.cross_chunk_gradient=2.0",
        "training.epochs=4",
        "training.eval_every=3",
    ]


def meshes(*shapes: tuple[int, int, int]) -> dict[str, list[str]]:
    """Overrides of (stages, virtual stages, ways)."""
    return {
        f"S{s}v{v}W{w}": [
            f"parallel.num_stages={s}",
            f"parallel.virtual_stages={v}",
            f"parallel.num_ways={w}",
        ]
        for s, v, w in shapes
    }


def on_each_mesh(run: list[str], *shapes: tuple[int, int, int]) -> dict[str, list[str]]:
    return {name: [*run, *mesh] for name, mesh in meshes(*shapes).items()}


def assert_bit_equal(results: Mapping[str, Result]) -> None:
    """Every result equals the first, and the first is no empty one."""
    first = next(iter(results.values()))
    assert len(first.losses) == 4
    assert len(set(first.losses)) == 4
    found = {name: differing(first, result) for name, result in results.items()}
    assert found == {name: [] for name in results}


STAGES = [(s, v, 1) for s in (1, 2, 4) for v in (1, 2)]


@pytest.mark.parametrize("num_chunks", [1, 4, 8])
@pytest.mark.parametrize("model", ["gcnii", "gat"])
def test_numbers_are_bit_equal_for_every_number_of_stages(
    model: str, num_chunks: int, pool: ProcessPool, graphs: Path, tmp_path: Path
) -> None:
    run = run_of(graphs, model, num_chunks=num_chunks)
    assert_bit_equal(train_all(pool, tmp_path, on_each_mesh(run, *STAGES)))


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_other_models_are_bit_equal_for_some_numbers_of_stages(
    model: str, pool: ProcessPool, graphs: Path, tmp_path: Path
) -> None:
    run = run_of(graphs, model, num_chunks=4, graph="directed")
    table = on_each_mesh(run, (1, 1, 1), (2, 2, 1), (4, 1, 1))
    assert_bit_equal(train_all(pool, tmp_path, table))


def test_published_method_and_uneven_stages_are_bit_equal_too(
    pool: ProcessPool, graphs: Path, tmp_path: Path
) -> None:
    run = run_of(graphs, "gcnii", num_chunks=8)
    run += ["history.period=2", "history.warm_start=zeros", "training.weight_decay=0"]
    table = on_each_mesh(run, (1, 1, 1), (4, 1, 1))
    table["split"] = [*table["S4v1W1"], "parallel.schedule=split_backward"]
    table["uneven"] = [*table["S4v1W1"], "parallel.layers_per_stage=[1, 5, 1, 1]"]
    assert_bit_equal(train_all(pool, tmp_path, table))


def start(module: str, *arguments: str, directory: Path) -> None:
    """Runs ``python -m module`` to its good end."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_every_launcher_gives_the_same_numbers(graphs: Path, tmp_path: Path) -> None:
    run = [*COMMON, *run_of(graphs, "gcnii", num_chunks=4)]
    two = [*run, "parallel.num_stages=2"]
    start("gnnpipe", "train", *run, "run.dir=single", directory=tmp_path)
    start("launch", "local", "--nproc", "2", *two, "run.dir=local", directory=tmp_path)
    torchrun = ["--standalone", "--nproc_per_node", "2", "-m", "gnnpipe", "train"]
    start("torch.distributed.run", *torchrun, *two, "run.dir=torchrun", directory=tmp_path)
    names = ("single", "local", "torchrun")
    assert_bit_equal({name: read_run(tmp_path / name) for name in names})


WAYS = [(s, 1, w) for s in (1, 2, 4) for w in (1, 2, 4) if s * w <= 8]
TWENTY = [
    "model.num_layers=3",
    "model.dtype=float64",
    "training.epochs=20",
    "training.eval_every=10",
]


def assert_close(results: Mapping[str, Result], expected: Result, *, num_epochs: int = 20) -> None:
    """Rounding grows over the epochs; 1e-9 is the limit after 20 of them in float64."""
    assert len(set(expected.losses)) == len(expected.losses) == num_epochs
    found = {name: largest_difference(result, expected) for name, result in results.items()}
    assert {name: value for name, value in found.items() if not value < 1e-9} == {}
    assert {name: result.accuracy for name, result in results.items()} == dict.fromkeys(
        results, expected.accuracy
    )


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("model", ["gcnii", "gat"])
def test_numbers_are_equal_for_every_number_of_ways(
    model: str, num_chunks: int, pool: ProcessPool, graphs: Path, tmp_path: Path
) -> None:
    run = [*run_of(graphs, model, num_chunks=num_chunks), *TWENTY]
    results = train_all(pool, tmp_path, on_each_mesh(run, *WAYS))
    expected = reference_run(run) if num_chunks == 1 else results["S1v1W1"]
    assert_close(results, expected)


@pytest.mark.parametrize("model", [*OTHER_MODELS, "gat"])
def test_other_models_are_equal_for_some_ways_on_a_directed_graph(
    model: str, pool: ProcessPool, graphs: Path, tmp_path: Path
) -> None:
    run = run_of(graphs, model, num_chunks=4, graph="directed")
    run += [*TWENTY, "model.num_layers=6", "training.epochs=5"]
    results = train_all(pool, tmp_path, on_each_mesh(run, (1, 1, 1), (2, 2, 2), (4, 1, 2)))
    assert_close(results, results["S1v1W1"], num_epochs=5)


@pytest.mark.parametrize("model", ["gcnii", "gat"])
def test_many_chunks_and_four_stages_meet_several_ways(
    model: str, pool: ProcessPool, graphs: Path, tmp_path: Path
) -> None:
    run = run_of(graphs, model, num_chunks=8)
    run += [*TWENTY, "model.num_layers=6", "training.epochs=5"]
    results = train_all(pool, tmp_path, on_each_mesh(run, (1, 1, 1), (4, 1, 2), (2, 2, 4)))
    assert_close(results, results["S1v1W1"], num_epochs=5)


def drawn(folder: Path) -> dict[str, int]:
    """Two rings of six, one in each way, in two chunks; the rings touch in chunk 1 alone::

        way 0   0 - 1 - 2 | 3 - 4 - 5 -        chunk 0: 0 1 2  6  7  8
                          |     |              chunk 1: 3 4 5  9 10 11
        way 1   6 - 7 - 8 | 9 - 10 - 11 -

    Returns:
        Name of each partition and its number of chunks.
    """
    rings = [(i, i + 1) for i in range(12) if i % 6 != 5] + [(5, 0), (11, 6)]
    graph = write_npz(folder / "drawn.npz", both_ways([*rings, (4, 10)]), num_nodes=12)
    node = np.arange(12)
    one_way_each = np.where(node < 4, 0, np.where(node < 8, 1, node % 2))
    assignments = {
        "no-halo": (node % 6 // 3, node // 6),
        "empty-cells": (node // 4, one_way_each),
        "empty-way": (node % 6 // 3, np.zeros(12, int)),
    }
    for name, ids in assignments.items():
        chunk.save(chunk.cut(graph, *ids, num_ways=2, method="file", seed=0), folder / name)
    return {name: int(chunk_id.max()) + 1 for name, (chunk_id, _) in assignments.items()}


@pytest.mark.parametrize("model", ["gcnii", "gat"])
def test_ways_may_lack_a_halo_a_cell_or_every_node(
    model: str, pool: ProcessPool, tmp_path: Path
) -> None:
    table: dict[str, list[str]] = {}
    for name, num_chunks in drawn(tmp_path).items():
        run = run_of(tmp_path, model, num_chunks=num_chunks)
        run += ["training.epochs=5", "model.dtype=float64", f"data.name={tmp_path}/drawn.npz"]
        run += [f"partition.path={tmp_path / name}"]
        on_meshes = on_each_mesh(run, (1, 1, 1), (1, 1, 2), (2, 1, 2))
        table |= {f"{name}-{mesh}": overrides for mesh, overrides in on_meshes.items()}
    results = train_all(pool, tmp_path / "runs", table)
    for name in ("no-halo", "empty-cells", "empty-way"):
        own = {mesh: result for mesh, result in results.items() if mesh.startswith(name)}
        assert_close(own, own[f"{name}-S1v1W1"], num_epochs=5)


def count_mirrors(directory: Path, num_ways: int) -> tuple[int, int]:
    """Pairs of a way and an outside node: sources that it reads, and targets of its nodes."""
    chunked = chunk.load(directory)
    cell = np.repeat(np.arange(chunked.cell_ptr.size - 1), np.diff(chunked.cell_ptr))
    way = cell % chunked.num_ways * num_ways // chunked.num_ways
    target = np.repeat(np.arange(chunked.num_nodes), np.diff(chunked.indptr))
    edges = zip(chunked.indices.tolist(), target.tolist(), strict=True)
    cut = [(j, i) for j, i in edges if way[j] != way[i]]
    return len({(way[i], j) for j, i in cut}), len({(way[j], i) for j, i in cut})


BYTES = [
    # model, graph, stages, virtual stages, ways, bytes of an element
    ("gcnii", "ring", 4, 1, 1, 4),
    ("gcnii", "ring", 2, 2, 2, 4),
    ("gcnii", "directed", 2, 1, 4, 8),
    ("gcn", "directed", 1, 1, 4, 4),
    ("gat", "directed", 2, 1, 2, 4),
    ("gat", "ring", 1, 2, 1, 4),
]


def expected_bytes(
    graphs: Path, case: tuple[str, str, int, int, int, int], num_parameters: int
) -> dict[str, int]:
    """The closed formulas, with N nodes, H channels, L convolutions, G strata and mirrors M."""
    model, graph, stages, virtual, ways, b = case
    N, H, L = NUM_NODES, 8, 6
    mirrors_in, mirrors_out = count_mirrors(graphs / f"{graph}-4", ways)
    num_cuts = virtual * stages - 1 if stages > 1 else 0
    boundary = 2 * num_cuts * N * H * b
    # Gradients cross every cut, h0 itself goes to every rank once.
    carried = (num_cuts + stages - 1) * N * H * b if stages > 1 else 0
    mirrors = 2 * mirrors_in if model == "gat" else mirrors_in + mirrors_out
    G = 1 + max(strata_of(load_graph(str(graphs / f"{graph}.npz"))))
    strata = 4 * (ways - 1) * 4 * G  # rows of drift and of debts, of each chunk
    return {
        "boundary": boundary,
        "carried": carried if model == "gcnii" else 0,
        "halo": L * (mirrors + strata) * H * b,
        "gradient": 2 * (ways - 1) * num_parameters * b,
    }


def test_bytes_follow_the_formulas(pool: ProcessPool, graphs: Path, tmp_path: Path) -> None:
    mirrors_in, mirrors_out = count_mirrors(graphs / "directed-4", 4)
    assert mirrors_in != mirrors_out
    table = {}
    for number, (model, graph, stages, virtual, ways, b) in enumerate(BYTES):
        run = run_of(graphs, model, num_chunks=4, graph=graph)
        (mesh,) = meshes((stages, virtual, ways)).values()
        table[str(number)] = [*run, *mesh, f"model.dtype=float{8 * b}"]
    results = train_all(pool, tmp_path, table)
    for case, result in zip(BYTES, results.values(), strict=True):
        expected = expected_bytes(graphs, case, result.summary["num_parameters"])
        sent = [dict(counts) for counts in result.comm_bytes]
        evaluation = [counts.pop("evaluation") for counts in sent]
        assert sent == [expected] * 4, case
        assert result.summary["comm_bytes_per_epoch"] == expected
        has_peers = case[2] * case[4] > 1
        assert [count > 0 for count in evaluation] == [False, False, has_peers, has_peers]
