"""What one way holds, against loops over the edges that any reader can check."""

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from drawn import cut, graph_of, symmetric_square
from hypothesis import given, settings
from hypothesis import strategies as st

from gnnpipe.chunk import ChunkedGraph
from gnnpipe.graph import Graph
from gnnpipe.way import Adjacency, Array, WayGraph, way_graph, with_self_loops

FINEST = 4
"""Ways of the drawn partitions; 1, 2 and 4 divide it, 3 does not."""

EXAMPLES = 30
"""Drawings for each number of ways."""

some = settings(max_examples=EXAMPLES, deadline=None)


class Drawn(NamedTuple):
    """A graph and where its nodes are; an edge is (source, target, weight)."""

    graph: Graph
    chunk_id: list[int]
    way_id: list[int]
    edges: list[tuple[int, int, float]]

    def chunked(self) -> ChunkedGraph:
        return cut(self.graph, self.chunk_id, [*self.way_id])

    def order(self, nodes: set[int]) -> list[int]:
        """Chunk-major, then by finest way, then as they were."""
        return sorted(nodes, key=lambda node: (self.chunk_id[node], self.way_id[node], node))


@st.composite
def drawings(draw: st.DrawFn) -> Drawn:
    num_nodes = draw(st.integers(2, 9))
    node = st.integers(0, num_nodes - 1)
    pairs = draw(st.lists(st.tuples(node, node), max_size=20))
    weight = None
    if draw(st.booleans()):  # several weights on one self-loop would be ambiguous
        pairs = sorted(set(pairs))
        size = len(pairs)
        value = st.integers(1, 8).map(lambda eighth: eighth / 8)
        weight = draw(st.lists(value, min_size=size, max_size=size))
    if draw(st.booleans()):
        pairs = [*pairs, *((target, source) for source, target in pairs if source != target)]
        back = [w for (s, t), w in zip(pairs, weight, strict=False) if s != t] if weight else []
        weight = [*weight, *back] if weight else None
        if weight and len(set(pairs)) < len(pairs):
            pairs, weight = distinct(pairs, weight)
    num_chunks = draw(st.integers(1, min(3, num_nodes)))
    rest = st.lists(
        st.integers(0, num_chunks - 1),
        min_size=num_nodes - num_chunks,
        max_size=num_nodes - num_chunks,
    )
    chunk_id = draw(st.permutations([*range(num_chunks), *draw(rest)]))
    ways = st.lists(st.integers(0, FINEST - 1), min_size=num_nodes - 1, max_size=num_nodes - 1)
    way_id = [*draw(ways), FINEST - 1]  # the last one names the number of ways
    graph = graph_of(
        num_nodes, pairs, edge_weight=None if weight is None else np.array(weight, np.float32)
    )
    weights = weight or [1.0] * len(pairs)
    edges = [(s, t, w) for (s, t), w in zip(pairs, weights, strict=True)]
    return Drawn(graph, list(chunk_id), way_id, edges)


def distinct(
    pairs: list[tuple[int, int]], weight: list[float]
) -> tuple[list[tuple[int, int]], list[float]]:
    """One weight for each pair."""
    weight_of = dict(zip(pairs, weight, strict=True))
    return list(weight_of), list(weight_of.values())


def ways_of(chunked: ChunkedGraph, num_ways: int) -> list[WayGraph]:
    return [way_graph(chunked, way=way, num_ways=num_ways) for way in range(num_ways)]


def own_nodes(drawn: Drawn, way: int, num_ways: int) -> set[int]:
    """Coarse ways are runs of finest ones: with W = 2, ways 0 and 1 are way 0.

    Where W does not divide, each way gets its share of every chunk's rows.
    """
    if FINEST % num_ways == 0:
        nested = [fine // (FINEST // num_ways) for fine in drawn.way_id]
        return {node for node, its in enumerate(nested) if its == way}
    own: set[int] = set()
    for chunk in range(max(drawn.chunk_id) + 1):
        nodes = {node for node, its in enumerate(drawn.chunk_id) if its == chunk}
        ends = [len(nodes) * share // num_ways for share in (way, way + 1)]
        own |= set(drawn.order(nodes)[slice(*ends)])
    return own


@pytest.mark.parametrize("num_ways", [1, 2, 3, 4])
@some
@given(drawn=drawings())
def test_own_rows_come_chunk_by_chunk(num_ways: int, drawn: Drawn) -> None:
    chunked = drawn.chunked()
    for way, part in enumerate(ways_of(chunked, num_ways)):
        own = drawn.order(own_nodes(drawn, way, num_ways))
        assert part.num_rows == len(own)
        assert part.node_id[: part.num_rows].tolist() == own
        assert chunked.node_id[part.row_id].tolist() == own
        for chunk in range(part.num_chunks):
            rows = own[part.chunk_ptr[chunk] : part.chunk_ptr[chunk + 1]]
            assert rows == [node for node in own if drawn.chunk_id[node] == chunk]


@pytest.mark.parametrize("num_ways", [1, 2, 3, 4])
@some
@given(drawn=drawings())
def test_mirrors_are_the_outside_ends_of_edges(num_ways: int, drawn: Drawn) -> None:
    chunked = drawn.chunked()
    for way, part in enumerate(ways_of(chunked, num_ways)):
        own = own_nodes(drawn, way, num_ways)
        read = {source for source, target, _ in drawn.edges if target in own} - own
        reached = {target for source, target, _ in drawn.edges if source in own} - own
        assert part.node_id[part.num_rows :].tolist() == drawn.order(read)
        for mirrors, nodes in ((part.in_mirrors, read), (part.out_mirrors, reached)):
            ordered = chunked.node_id[mirrors.row_id].tolist()
            assert ordered == drawn.order(nodes)
            for cell in range(part.num_chunks * num_ways):
                chunk, owner = divmod(cell, num_ways)
                held = ordered[mirrors.cell_ptr[cell] : mirrors.cell_ptr[cell + 1]]
                theirs = own_nodes(drawn, owner, num_ways)
                assert held == [
                    node for node in ordered if drawn.chunk_id[node] == chunk and node in theirs
                ]


def entries(adjacency: Adjacency, table: Array) -> list[Counter[tuple[int, float]]]:
    """(original id of the column, weight) of each row's entries."""
    size = adjacency.indices.size
    weight = np.ones(size) if adjacency.weight is None else adjacency.weight
    pairs = list(zip(table[adjacency.indices].tolist(), weight.tolist(), strict=True))
    ptr = adjacency.indptr.tolist()
    assert ptr[0] == 0
    assert ptr[-1] == size
    return [Counter(pairs[a:b]) for a, b in pairwise(ptr)]


@pytest.mark.parametrize("num_ways", [1, 2, 3, 4])
@some
@given(drawn=drawings())
def test_rows_hold_the_edges_of_own_nodes_in_both_directions(num_ways: int, drawn: Drawn) -> None:
    chunked = drawn.chunked()
    for part in ways_of(chunked, num_ways):
        assert part.incoming.indices.dtype == part.outgoing.indices.dtype == np.int32
        own = part.node_id[: part.num_rows].tolist()
        into = [Counter((s, w) for s, t, w in drawn.edges if t == node) for node in own]
        out_of = [Counter((t, w) for s, t, w in drawn.edges if s == node) for node in own]
        assert entries(part.incoming, part.node_id) == into
        out_table = np.concatenate((part.row_id, part.out_mirrors.row_id))
        assert entries(part.outgoing, chunked.node_id[out_table]) == out_of


@pytest.mark.parametrize("num_ways", [1, 2, 3, 4])
@some
@given(drawn=drawings())
def test_what_a_way_sends_is_what_its_peer_mirrors(num_ways: int, drawn: Drawn) -> None:
    parts = ways_of(drawn.chunked(), num_ways)
    for part in parts:
        for peer in parts:
            sides = ((part.in_sends, peer.in_mirrors), (part.out_sends, peer.out_mirrors))
            for sends, mirrors in sides:
                for chunk in range(part.num_chunks):
                    rows = sends[chunk][peer.way]
                    low, high = part.chunk_ptr[chunk : chunk + 2]
                    assert all(low <= row < high for row in rows)
                    cell = chunk * num_ways + part.way
                    held = mirrors.row_id[mirrors.cell_ptr[cell] : mirrors.cell_ptr[cell + 1]]
                    assert part.row_id[rows].tolist() == held.tolist()


@pytest.mark.parametrize("num_ways", [1, 2, 3, 4])
@some
@given(drawn=drawings())
def test_scales_come_from_the_whole_graphs_in_degrees(num_ways: int, drawn: Drawn) -> None:
    chunked = drawn.chunked()
    gcn, mean = [], []
    for node in range(drawn.graph.num_nodes):
        into = [(s, w) for s, t, w in drawn.edges if t == node]
        loops = [w for s, w in into if s == node] or [1.0]
        gcn.append((sum(w for s, w in into if s != node) + loops[0]) ** -0.5)
        mean.append(1.0 / max(len(into), 1))
    for part in ways_of(chunked, num_ways):
        out_table = np.concatenate((part.row_id, part.out_mirrors.row_id))
        tables = (part.node_id, chunked.node_id[out_table])
        for table, gcn_scale, mean_scale in zip(
            tables, part.gcn_scale, part.mean_scale, strict=True
        ):
            assert gcn_scale == pytest.approx([gcn[node] for node in table], rel=1e-12)
            assert mean_scale == pytest.approx([mean[node] for node in table], rel=1e-12)


def test_ways_of_a_ring_mirror_each_other() -> None:
    # new ids: 0 is node 1, 1 is node 2 (chunk 0); 2 is node 3, 3 is node 0 (chunk 1)
    left, right = ways_of(symmetric_square(), 2)
    assert left.row_id.tolist() == [0, 2]  # nodes 1 and 3
    assert right.row_id.tolist() == [1, 3]  # nodes 2 and 0
    assert left.in_mirrors.row_id.tolist() == [1, 3]
    assert left.in_mirrors.cell_ptr.tolist() == [0, 0, 1, 1, 2]  # cells (0, 0), (0, 1), (1, 0) ..
    assert left.in_sends[1][1].tolist() == [1]  # node 3 is the own row 1
    assert [[rows.tolist() for rows in peers] for peers in right.in_sends] == [
        [[0], []],
        [[1], []],
    ]
    assert left.outgoing is left.incoming  # symmetric: nothing is held twice


def test_a_way_may_hold_no_node_of_a_chunk() -> None:
    chunked = cut(graph_of(4, [(0, 1), (1, 2), (2, 3)]), [0, 0, 1, 1], [0, 0, 0, 1])
    left, right = ways_of(chunked, 2)
    assert left.chunk_ptr.tolist() == [0, 2, 3]
    assert right.chunk_ptr.tolist() == [0, 0, 1]
    assert right.in_mirrors.cell_ptr.tolist() == [0, 0, 0, 1, 1]
    assert [rows.tolist() for rows in left.in_sends[1]] == [[], [2]]


def test_ways_that_do_not_divide_the_partitions_split_chunks_by_rows() -> None:
    chunked = cut(graph_of(5, [(0, 1), (3, 4)]), [0, 0, 0, 0, 1], [0, 1, 0, 1, 0])
    assert chunked.node_id.tolist() == [0, 2, 1, 3, 4]
    rows = [part.row_id.tolist() for part in ways_of(chunked, 3)]
    assert rows == [[0], [1], [2, 3, 4]]


# --- self-loops

#  row 0: columns 0 (a loop) and 2; row 1: columns 0 and 3; row 2: none; columns 3 .. are mirrors
ROWS = Adjacency(
    np.array([0, 2, 4, 4]), np.array([0, 2, 0, 3], np.int32), np.array([5.0, 6.0, 7.0, 8.0])
)


@pytest.mark.parametrize(("keep_weight", "loop"), [(True, 5.0), (False, 1.0)])
def test_every_row_gets_one_self_loop(keep_weight: bool, loop: float) -> None:
    rows = with_self_loops(ROWS, keep_weight=keep_weight)
    assert rows.indptr.tolist() == [0, 2, 5, 6]
    assert rows.indices.tolist() == [2, 0, 0, 3, 1, 2]
    assert rows.indices.dtype == np.int32
    assert rows.weight is not None
    assert rows.weight.tolist() == [6.0, loop, 7.0, 8.0, 1.0, 1.0]


def test_parallel_self_loops_become_one() -> None:
    rows = Adjacency(np.array([0, 3]), np.array([0, 0, 1], np.int32), None)
    looped = with_self_loops(rows, keep_weight=True)
    assert looped.indptr.tolist() == [0, 2]
    assert looped.indices.tolist() == [1, 0]
    assert looped.weight is None
