"""Renumbering by hand and against brute force; which graph a partition belongs to."""

import numpy as np
import pytest
from drawn import cut, directed_weighted, graph_of, symmetric_square
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gnnpipe import chunk
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph


def test_nodes_are_numbered_chunk_by_chunk_way_by_way() -> None:
    chunked = symmetric_square()
    assert chunked.node_id.tolist() == [1, 2, 3, 0]
    assert chunked.cell_ptr.tolist() == [0, 1, 2, 3, 4]
    # new ids on the ring: 3 - 0 - 1 - 2 - 3
    assert chunked.indptr.tolist() == [0, 2, 4, 6, 8]
    assert chunked.indices.tolist() == [1, 3, 0, 2, 1, 3, 0, 2]
    assert np.asarray(chunked.features)[:, 0].tolist() == [1, 2, 3, 0]
    assert chunked.labels.tolist() == [1, 0, 1, 0]
    assert chunked.train_mask.tolist() == [False, False, True, True]


def test_original_order_stays_inside_a_cell() -> None:
    chunked = cut(graph_of(6, [(0, 1)]), [1, 0, 1, 0, 0, 1])
    assert chunked.node_id.tolist() == [1, 3, 4, 0, 2, 5]
    assert chunked.cell_ptr.tolist() == [0, 3, 6]


def test_empty_cells_are_empty_ranges() -> None:
    chunked = cut(graph_of(3, [(0, 1)]), [0, 1, 1], [1, 0, 0])
    assert chunked.cell_ptr.tolist() == [0, 0, 1, 3, 3]


def test_symmetric_graph_shares_both_directions() -> None:
    chunked = symmetric_square()
    assert chunked.out_indptr is chunked.indptr
    assert chunked.out_indices is chunked.indices


def test_symmetric_edges_of_unequal_weight_are_not_shared() -> None:
    graph = graph_of(2, [(0, 1), (1, 0)], edge_weight=np.array([1, 2], dtype=np.float32))
    chunked = cut(graph, [0, 1])
    assert chunked.edge_weight is not None
    assert chunked.out_edge_weight is not None
    assert chunked.edge_weight.tolist() == [2, 1]  # row 0 reads node 1
    assert chunked.out_edge_weight.tolist() == [1, 2]  # row 0 writes node 1
    assert chunked.out_indices is not chunked.indices


Edges = dict[tuple[int, int], list[float]]


def edges_of(
    indptr: NDArray[np.int64], other: NDArray[np.int32], weight: NDArray[np.float32] | None
) -> Edges:
    """(row, column) to the weights of its parallel edges, in order."""
    found: Edges = {}
    assert weight is not None
    for row in range(len(indptr) - 1):
        for position in range(indptr[row], indptr[row + 1]):
            key = (row, int(other[position]))
            found.setdefault(key, []).append(float(weight[position]))
    return found


@st.composite
def cut_graphs(draw: st.DrawFn) -> tuple[Graph, list[int], list[int]]:
    n = draw(st.integers(1, 9))
    node = st.integers(0, n - 1)
    edges = draw(st.lists(st.tuples(node, node), max_size=30))
    chunk_id = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    way_id = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    weight = np.arange(len(edges), dtype=np.float32)
    compact = np.unique(chunk_id, return_inverse=True)[1]
    return graph_of(n, edges, edge_weight=weight), compact.tolist(), way_id


@given(cut_graphs())
def test_renumbering_keeps_every_edge_with_its_weight(
    case: tuple[Graph, list[int], list[int]],
) -> None:
    graph, chunk_id, way_id = case
    chunked = cut(graph, chunk_id, way_id)
    old = chunked.node_id
    expected = sorted(range(graph.num_nodes), key=lambda i: (chunk_id[i], way_id[i], i))
    assert old.tolist() == expected
    original = edges_of(graph.indptr, graph.indices, graph.edge_weight)
    into = edges_of(chunked.indptr, chunked.indices, chunked.edge_weight)
    out = edges_of(chunked.out_indptr, chunked.out_indices, chunked.out_edge_weight)
    assert {(int(old[i]), int(old[j])): w for (i, j), w in into.items()} == original
    assert {(i, j): w for (j, i), w in out.items()} == into
    for indptr, indices in (
        (chunked.indptr, chunked.indices),
        (chunked.out_indptr, chunked.out_indices),
    ):
        assert indptr.dtype == np.int64
        assert indices.dtype == np.int32
        for row in range(graph.num_nodes):
            assert (np.diff(indices[indptr[row] : indptr[row + 1]]) >= 0).all()


def test_edge_values_and_types_follow() -> None:
    chunked = directed_weighted()  # new ids: 1 3 | 0 2 4
    assert chunked.node_type is not None
    assert chunked.node_type.tolist() == [1, 3, 0, 2, 4]
    assert chunked.edge_weight is not None
    assert chunked.edge_attr is not None
    assert chunked.edge_type is not None
    # rows: 1 reads 0, 2; 3 reads 3, 0; 0 reads 4; 2 reads 1
    assert chunked.indices.tolist() == [2, 3, 1, 2, 4, 0]
    assert chunked.edge_weight.tolist() == [1, 2, 5, 4, 6, 3]
    assert chunked.edge_type.tolist() == [1, 2, 5, 4, 6, 3]
    assert chunked.edge_attr[:, 1].tolist() == [100, 200, 500, 400, 600, 300]
    assert (chunked.num_edges, chunked.num_features) == (6, 5)


@pytest.mark.parametrize(
    ("chunk_id", "way_id", "message"),
    [
        ([0, 1], [0, 0, 0], r"`chunk_id` \(=int64, \[2\]\) must be one integer for each of 3"),
        ([0, 1, 1], [0.0, 0.0, 0.0], r"`way_id` \(=float64, \[3\]\) must be one integer"),
        ([0, 1, 1], [0, 0, 1], r"`way_id` \(=0..1\) must lie in \[0, 1\)"),
        ([0, 2, 2], [0, 0, 0], r"`chunk_id` \(=0..2, 2 different\) must count from 0"),
        ([-1, 0, 1], [0, 0, 0], r"`chunk_id` \(=-1..1, 3 different\) must count from 0"),
    ],
)
def test_ids_that_do_not_fit_are_refused(
    chunk_id: list[int], way_id: list[float], message: str
) -> None:
    graph = graph_of(3, [(0, 1)])
    with pytest.raises(UserError, match=message):
        chunk.cut(graph, np.array(chunk_id), np.array(way_id), num_ways=1, method="file", seed=0)


def test_chunk_hash_depends_on_chunks_alone() -> None:
    graph = graph_of(4, [(0, 1)])
    hashes = [
        cut(graph, chunks, ways).manifest["chunk_id_sha256"]
        for chunks, ways in (
            ([0, 1, 1, 0], [0, 0, 0, 0]),
            ([0, 1, 1, 0], [0, 1, 0, 1]),
            ([0, 1, 0, 1], [0, 0, 0, 0]),
        )
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    # sha256 of the int32 little-endian bytes of 0 1 1 0, in the original order
    assert hashes[0] == "8bd2fa7c6873c97e24da3767da43702d8c85aadb7136ed816c324b1ebc6b26d2"


def test_partition_must_belong_to_the_graph() -> None:
    graph = graph_of(4, [(0, 1)])
    chunked = cut(graph, [0, 0, 1, 1])
    chunk.check_belongs(chunked, graph)
    with pytest.raises(UserError, match=r"must be made from the graph in hand \(=drawn, finger"):
        chunk.check_belongs(chunked, graph_of(4, [(0, 2)]))


def test_missing_library_is_recorded_as_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "RECORDED_LIBRARIES", ("no-such-library",))
    versions = cut(graph_of(2, []), [0, 1]).manifest["library_versions"]
    assert versions["no-such-library"] is None
