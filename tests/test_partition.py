"""The methods on graphs a person can draw, assignment files, and what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import cliques, csr, path, undirected
from hypothesis import given
from hypothesis import strategies as st

import partition
from partition import PartitionError, assign, metis
from partition.adjacency import symmetrised, work_of
from partition.methods import breadth_first, equal_ranges, random_groups

CUTTING_METHODS = [method for method in partition.METHODS if method != "file"]


def test_metis_finds_the_cliques() -> None:
    chunk_id, way_id = assign(*cliques(4, 6), num_chunks=4)
    groups = chunk_id.reshape(4, 6)
    assert (groups == groups[:, :1]).all()
    assert sorted(groups[:, 0]) == [0, 1, 2, 3]
    assert chunk_id.dtype == way_id.dtype == np.int32
    assert not way_id.any()


def test_metis_cuts_nested_ways_first() -> None:
    graph = cliques(8, 5)
    fine = assign(*graph, num_chunks=1, num_ways=4)
    coarse = assign(*graph, num_chunks=1, num_ways=2)
    np.testing.assert_array_equal(fine.way_id // 2, coarse.way_id)
    cliques_per_way = [len(np.unique(np.flatnonzero(fine.way_id == way) // 5)) for way in range(4)]
    assert cliques_per_way == [2, 2, 2, 2]


@pytest.mark.parametrize("method", CUTTING_METHODS)
@pytest.mark.parametrize(("num_ways", "inner"), [(4, 2), (6, 3)])
def test_ways_are_nested_and_balanced(method: str, num_ways: int, inner: int) -> None:
    graph = path(240)
    chunk_id, way_id = assign(*graph, num_chunks=3, num_ways=num_ways, method=method)
    coarse = assign(*graph, num_chunks=3, num_ways=num_ways // inner, method=method)
    np.testing.assert_array_equal(way_id // inner, coarse.way_id)
    cells = np.bincount(chunk_id * num_ways + way_id, minlength=3 * num_ways)
    assert cells.min() > 0
    assert np.bincount(way_id).max() <= 1.1 * 240 / num_ways


@pytest.mark.parametrize("method", CUTTING_METHODS)
def test_same_seed_gives_the_same_parts(method: str) -> None:
    graph = cliques(6, 8)
    first, again, other = (
        assign(*graph, num_chunks=4, method=method, seed=seed) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first.chunk_id, again.chunk_id)
    is_same = bool((first.chunk_id == other.chunk_id).all())
    assert is_same == (method in ("contiguous", "bfs"))


@pytest.mark.parametrize("method", CUTTING_METHODS)
def test_isolated_nodes_directed_edges_loops_and_duplicates_are_fine(method: str) -> None:
    edges = [(0, 1), (0, 1), (1, 2), (2, 2), (5, 6), (6, 7)]
    chunk_id, _ = assign(*csr(20, edges), num_chunks=3, method=method)
    assert sorted(np.unique(chunk_id)) == [0, 1, 2]


@pytest.mark.parametrize("method", CUTTING_METHODS)
def test_graph_without_edges_is_cut(method: str) -> None:
    chunk_id, _ = assign(*csr(12, []), num_chunks=3, method=method)
    assert np.bincount(chunk_id).tolist() == [4, 4, 4]


def test_grouped_variant_groups_four_parts_per_chunk() -> None:
    groups = random_groups(32, 8, seed=3)
    assert np.bincount(groups).tolist() == [4] * 8
    assert (groups != np.repeat(np.arange(8), 4)).any()
    # Eight parts in two chunks: the cliques stay whole, and at random some lie apart.
    chunk_id, _ = assign(*cliques(8, 5), num_chunks=2, method="metis-grouped", seed=1)
    by_clique = chunk_id.reshape(8, 5)
    assert (by_clique == by_clique[:, :1]).all()
    assert np.bincount(by_clique[:, 0]).tolist() == [4, 4]


def test_more_parts_in_a_chunk_mix_more_of_the_graph() -> None:
    graph = cliques(24, 5)
    mixed = {
        count: assign(
            *graph, num_chunks=2, method="metis-grouped", parts_per_chunk=count, seed=1
        ).chunk_id.reshape(24, 5)
        for count in (1, 4, 12)
    }
    assert (mixed[12] == mixed[12][:, :1]).all()  # A part is a clique.
    assert np.bincount(mixed[12][:, 0]).tolist() == [12, 12]
    whole = assign(*graph, num_chunks=2, seed=1)  # One part is what metis gives.
    np.testing.assert_array_equal(mixed[1].ravel(), whole.chunk_id)
    usual = assign(*graph, num_chunks=2, method="metis-grouped", seed=1)
    np.testing.assert_array_equal(mixed[4].ravel(), usual.chunk_id)


@pytest.mark.parametrize("method", ["metis", "metis-grouped"])
def test_one_chunk_needs_no_metis(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metis, "child_command", lambda *_: pytest.fail("METIS was called"))
    chunk_id, _ = assign(*path(2), num_chunks=1, method=method)
    assert chunk_id.tolist() == [0, 0]


def test_contiguous_cuts_ranges_of_equal_work() -> None:
    # Node 0 has 100 in-edges: 150 units of work, as much as three nodes without edges.
    graph = csr(7, [(1 + i % 6, 0) for i in range(100)])
    assert work_of(graph[0]).tolist() == [150, 50, 50, 50, 50, 50, 50]
    chunk_id, _ = assign(*graph, num_chunks=3, method="contiguous")
    assert chunk_id.tolist() == [0, 1, 1, 1, 2, 2, 2]


def test_breadth_first_order_takes_component_after_component() -> None:
    #   0 - 3 - 1     2 - 5     4
    graph = undirected(6, [(0, 3), (3, 1), (2, 5)])
    assert breadth_first(symmetrised(*graph)).tolist() == [0, 3, 1, 2, 5, 4]
    chunk_id, _ = assign(*graph, num_chunks=3, method="bfs")
    assert chunk_id.tolist() == [0, 1, 1, 0, 2, 2]


@given(st.lists(st.integers(50, 5000), min_size=1, max_size=40), st.data())
def test_equal_ranges_are_never_empty(work: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(work)))
    bounds = equal_ranges(np.array(work, dtype=np.int64), count)
    assert bounds[0] == 0
    assert bounds[-1] == len(work)
    assert (np.diff(bounds) > 0).all()


def test_symmetrised_drops_loops_and_duplicates() -> None:
    adjacency = symmetrised(*csr(3, [(0, 1), (0, 1), (1, 0), (2, 2), (2, 1)] * 200))
    assert adjacency.toarray().astype(int).tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]


# --- assignment files


@pytest.mark.parametrize("name", ["ids.txt", "ids.npy"])
def test_file_gives_chunks_and_ways(name: str, tmp_path: Path) -> None:
    rows = np.array([[1, 0], [0, 0], [0, 1], [1, 1]])
    one, two = tmp_path / f"one-{name}", tmp_path / f"two-{name}"
    for target, table in ((one, rows[:, 0]), (two, rows)):
        if name.endswith(".npy"):
            np.save(target, table)
        else:
            np.savetxt(target, table, fmt="%d")
    chunk_id, way_id = assign(*path(4), num_chunks=2, method="file", file=str(one))
    assert (chunk_id.tolist(), way_id.tolist()) == ([1, 0, 0, 1], [0, 0, 0, 0])
    chunk_id, way_id = assign(*path(4), num_chunks=2, num_ways=2, method="file", file=str(two))
    assert (chunk_id.tolist(), way_id.tolist()) == ([1, 0, 0, 1], [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("0\n1\n0\n", {}, r"`file` \(=.*\) holds \[3\] where \[4\] chunk ids"),
        ("0 0 0\n1 0 0\n0 0 0\n1 0 0\n", {}, r"holds \[4, 3\] where"),
        ("", {}, r"holds \[0\] where"),
        ("0\n1\n0.5\n1\n", {}, "must hold integers"),
        ("a\nb\nc\nd\n", {}, "must hold integers"),
        ("0\n1\n2\n1\n", {}, r"holds ids 0..2 but `num_chunks` \(=2\) allows 0..1"),
        ("0\n-1\n0\n1\n", {}, r"holds ids -1..1 but"),
        ("0\n0\n0\n0\n", {}, r"leaves 1 of `num_chunks` \(=2\) empty"),
        ("0\n1\n0\n1\n", {"num_ways": 2}, r"leaves 1 of `num_ways` \(=2\) empty"),
        (None, {}, "cannot be read: No such file"),
    ],
)
def test_bad_file_is_refused(
    text: str | None, options: dict[str, int], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "ids.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PartitionError, match=message):
        assign(*path(4), **{"num_chunks": 2, **options}, method="file", file=str(file))  # type: ignore[arg-type]


def test_file_of_one_node_is_read(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    for text in ("0\n", "0 0\n"):
        file.write_text(text)
        assert assign(*path(1), num_chunks=1, method="file", file=str(file)).chunk_id.tolist() == [
            0
        ]


def test_object_array_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ids.npy"
    np.save(file, np.array([0, "x", 1, None], dtype=object), allow_pickle=True)
    with pytest.raises(PartitionError, match="must hold integers"):
        assign(*path(4), num_chunks=2, method="file", file=str(file))


# --- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chunks": 0}, r"`num_chunks` \(=0\) must be at least 1"),
        ({"num_ways": 0}, r"`num_ways` \(=0\) must be at least 1"),
        ({"num_chunks": 9}, r"`num_chunks` \(=9\) must be at most the number of nodes \(=8\)"),
        ({"num_chunks": 5, "num_ways": 2}, r"makes 10 parts, which must be at most .* \(=8\)"),
        ({"num_chunks": 3, "method": "metis-grouped"}, r"makes 12 parts"),
        (
            {"num_chunks": 2, "method": "metis-grouped", "parts_per_chunk": 9},
            r"makes 18 parts, which must be .*cut into fewer chunks or parts",
        ),
        ({"num_chunks": 2, "parts_per_chunk": 4}, r"`parts_per_chunk` \(=4\).*not with metis;"),
        (
            {"num_chunks": 2, "method": "metis-grouped", "parts_per_chunk": 0},
            r"`parts_per_chunk` \(=0\) must be at least 1",
        ),
        ({"method": "metris"}, r"`method` \(=metris\) must be one of .*; did you mean metis"),
        ({"seed": -1}, r"`seed` \(=-1\) must lie in"),
        ({"method": "file"}, r"`method` \(=file\) needs `file`"),
        ({"file": "ids.txt"}, r"`file` \(=ids.txt\) needs `method` \(=file\)"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        assign(*path(8), **{"num_chunks": 2, **options})


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0, 1, 2], [1.0, 0.0], r"`indices` \(=float64, 1-d\) must be one row of integers"),
        ([[0, 1, 2]], [1, 0], r"`indptr` \(=int64, 2-d\)"),
        ([0], [0], r"`indptr` \(=0 nodes\) must describe at least one node"),
        ([0, 2, 1], [1, 0], "`indptr` must rise from 0 to the number of edges"),
        ([0, 1, 2], [1, 2], r"`indices` \(=1..2\) must lie in \[0, 2\)"),
        ([0, 1, 2], [1, -1], r"`indices` \(=-1..1\) must lie in \[0, 2\)"),
    ],
)
def test_arrays_that_are_no_graph_are_refused(
    indptr: list[int], indices: list[int], message: str
) -> None:
    with pytest.raises(PartitionError, match=message):
        assign(np.array(indptr), np.array(indices), num_chunks=1)


def test_library_loads_neither_gnnpipe_nor_torch() -> None:
    program = (
        "import partition, sys; sys.exit(bool({'gnnpipe', 'torch', 'rich'} & {*sys.modules}))"
    )
    root = Path(partition.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
