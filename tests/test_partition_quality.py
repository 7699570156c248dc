"""A partition's figures by hand and against brute force, and how they are told."""

import numpy as np
import pytest
from drawn import Csr, cliques, csr, path, star
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from partition import Assignment, PartitionError, assign, quality, report


def test_quality_of_a_small_graph_by_hand() -> None:
    #   chunk 0: 0 1 2    chunk 1: 3 4        way 0: 0 1 3    way 1: 2 4
    #   edges 0->1 1->2 2->0 inside; 2->3 2->4 1->3 cross; 3->4 inside
    graph = csr(5, [(0, 1), (1, 2), (2, 0), (2, 3), (2, 4), (1, 3), (3, 4)])
    parts = Assignment(
        np.array([0, 0, 0, 1, 1], dtype=np.int32), np.array([0, 0, 1, 0, 1], dtype=np.int32)
    )
    figures = quality(*graph, parts, num_chunks=2, num_ways=2)
    assert figures.chunk_nodes == (3, 2)
    assert figures.chunk_edges == (3, 4)
    assert figures.chunk_work == (153, 104)
    assert figures.chunk_halo == (0, 2)  # chunk 1 reads 1 and 2; 2 counts once
    assert figures.edge_cut_fraction == pytest.approx(3 / 7)
    assert figures.node_imbalance == pytest.approx(3 / 2.5)
    assert figures.edge_imbalance == pytest.approx(4 / 3.5)
    assert figures.work_imbalance == pytest.approx(153 / 128.5)
    assert figures.replication_factor == pytest.approx(7 / 5)
    assert figures.cell_nodes == ((2, 1), (1, 1))
    assert figures.cell_edges == ((2, 1), (2, 2))
    assert figures.cell_work_imbalance == pytest.approx((102 + 52) / (76.5 + 52))
    # across ways: 1->2 2->0 2->3 3->4; way 0 reads {2}, way 1 reads {1, 3}
    assert figures.way_cut_fraction == pytest.approx(4 / 7)
    assert figures.way_halo == ((0, 1), (2, 0))
    # backward: way 0 needs the gradients of {2, 4}, way 1 those of {0, 3}
    assert figures.way_halo_backward == ((0, 2), (2, 0))
    assert figures.way_replication_factor == pytest.approx(8 / 5)
    assert figures.way_work_imbalance == pytest.approx(154 / 128.5)


@st.composite
def partitioned_graphs(draw: st.DrawFn) -> tuple[Csr, Assignment, int, int]:
    n = draw(st.integers(1, 12))
    node = st.integers(0, n - 1)
    edges = draw(st.lists(st.tuples(node, node), max_size=40))
    num_chunks, num_ways = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    columns = [
        draw(st.lists(st.integers(0, count - 1), min_size=n, max_size=n))
        for count in (num_chunks, num_ways)
    ]
    ids = (np.array(column, dtype=np.int32) for column in columns)
    return csr(n, edges), Assignment(*ids), num_chunks, num_ways


@given(partitioned_graphs())
def test_quality_equals_brute_force(case: tuple[Csr, Assignment, int, int]) -> None:
    (indptr, indices), (chunk, way), num_chunks, num_ways = case
    n = len(indptr) - 1
    edges = [(int(j), i) for i in range(n) for j in indices[indptr[i] : indptr[i + 1]]]
    figures = quality(
        indptr, indices, Assignment(chunk, way), num_chunks=num_chunks, num_ways=num_ways
    )

    def halo(group: NDArray[np.int32], reader: int, owner: int, forward: bool) -> int:
        ends = edges if forward else [(i, j) for j, i in edges]
        return len({j for j, i in ends if group[i] == reader and group[j] == owner})

    chunks, ways = range(num_chunks), range(num_ways)
    assert figures.num_edges == len(edges)
    assert figures.chunk_halo == tuple(
        sum(halo(chunk, c, d, True) for d in chunks if d != c) for c in chunks
    )
    for forward, found in ((True, figures.way_halo), (False, figures.way_halo_backward)):
        assert found == tuple(
            tuple(halo(way, a, b, forward) if a != b else 0 for b in ways) for a in ways
        )
    cut = sum(chunk[j] != chunk[i] for j, i in edges)
    assert figures.edge_cut_fraction == pytest.approx(cut / max(len(edges), 1))
    for c in chunks:
        assert figures.chunk_nodes[c] == int((chunk == c).sum())
        assert figures.chunk_edges[c] == sum(chunk[i] == c for _, i in edges)
        for w in ways:
            assert figures.cell_nodes[c][w] == int(((chunk == c) & (way == w)).sum())
    assert figures.replication_factor == pytest.approx(1 + sum(figures.chunk_halo) / n)
    assert figures.work_imbalance >= 1
    assert report.table(figures).isascii()


def test_quality_refuses_ids_that_do_not_fit() -> None:
    zeros = np.zeros(4, dtype=np.int32)
    with pytest.raises(PartitionError, match=r"`assignment` \(=\[3\]\) must have one id for each"):
        quality(*path(4), Assignment(zeros[:3], zeros), num_chunks=1, num_ways=1)
    with pytest.raises(PartitionError, match=r"\(=1..1\) must lie below `num_ways` \(=1\)"):
        quality(*path(4), Assignment(zeros, zeros + 1), num_chunks=1, num_ways=1)


def test_to_dict_is_plain_json() -> None:
    parts = assign(*path(8), num_chunks=2, num_ways=2, method="contiguous")
    figures = quality(*path(8), parts, num_chunks=2, num_ways=2).to_dict()
    assert figures["chunk_nodes"] == [4, 4]
    assert figures["way_halo"] == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("graph", "method", "num_chunks", "num_ways", "words"),
    [
        (path(40), "contiguous", 2, 1, "cut 3% of edges: good for pipelining"),
        (cliques(2, 10), "contiguous", 4, 1, "fair for pipelining"),
        (path(40), "random", 8, 1, "halo is large, most reads cross chunks"),
        (star(40), "contiguous", 40, 1, "work is uneven: stages wait for a chunk of 1.7"),
        (star(40), "contiguous", 2, 20, "ways are uneven: 1.35x the time"),
        (cliques(1, 40), "contiguous", 2, 4, "halo of the ways is large: 4.00 rows per node"),
    ],
)
def test_verdict_names_what_matters(
    graph: Csr, method: str, num_chunks: int, num_ways: int, words: str
) -> None:
    parts = assign(*graph, num_chunks=num_chunks, num_ways=num_ways, method=method)
    figures = quality(*graph, parts, num_chunks=num_chunks, num_ways=num_ways)
    assert words in report.verdict(figures)


def test_table_shows_chunks_ways_and_the_verdict() -> None:
    parts = assign(*path(80), num_chunks=40, num_ways=2, method="contiguous")
    text = report.table(quality(*path(80), parts, num_chunks=40, num_ways=2))
    assert "chunks x ways         40 x 2" in text
    assert "... 8 more chunks: --json lists them all" in text
    assert "mirrors: row way reads nodes of column way" in text
    assert text.splitlines()[-1].startswith("verdict: cut")
