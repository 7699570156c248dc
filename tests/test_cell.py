"""Cells: the operator's rows, the edges and the messages of one chunk of one way."""

from typing import get_args

import numpy as np
import pytest
import torch
from drawn import cut, graph_of, symmetric_square, woven
from torch import Tensor

from gnnpipe.cell import Cell, Cells, build_cells
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.full_graph import FullGraph
from gnnpipe.graph import Graph
from gnnpipe.kernels import RowBlock
from gnnpipe.models.layer import Operator
from gnnpipe.way import WayGraph, way_graph

OPERATORS = get_args(Operator)
AGGREGATED = [name for name in OPERATORS if name != "none" and not name.startswith("edges")]
GATHERED = [name for name in OPERATORS if name.startswith("edges")]
CPU = torch.device("cpu")


def woven_ways(is_directed: bool) -> tuple[Graph, ChunkedGraph]:
    """24 nodes in three chunks and four ways; way 2 has no node in chunk 1."""
    graph = woven(is_directed=is_directed, is_weighted=True)
    way_id = [(node * node // 3) % 4 for node in range(24)]
    way_id = [3 if node % 3 == 1 and way == 2 else way for node, way in enumerate(way_id)]
    return graph, cut(graph, [node % 3 for node in range(24)], way_id)


def parts_of(chunked: ChunkedGraph, num_ways: int, operator: str) -> list[tuple[WayGraph, Cells]]:
    ways = [way_graph(chunked, way=way, num_ways=num_ways) for way in range(num_ways)]
    return [
        (way, build_cells(way, operator=operator, dtype=torch.float64, device=CPU)) for way in ways
    ]


def dense(block: RowBlock | None, num_columns: int) -> Tensor:
    assert block is not None
    return block.matrix(num_columns, torch.float64).to_dense()


@pytest.mark.parametrize("is_directed", [False, True])
@pytest.mark.parametrize("num_ways", [1, 2, 4])
@pytest.mark.parametrize("operator", AGGREGATED)
def test_rows_of_all_ways_are_the_operator_and_its_transpose(
    operator: Operator, num_ways: int, is_directed: bool
) -> None:
    graph, chunked = woven_ways(is_directed)
    whole = FullGraph(graph, dtype=torch.float64).matrix(operator).to_dense()
    forward, backward = torch.zeros(24, 24).double(), torch.zeros(24, 24).double()
    for way, cells in parts_of(chunked, num_ways, operator):
        reads = way.node_id
        out_table = np.concatenate((way.row_id, way.out_mirrors.row_id))
        is_read_by = np.asarray(chunked.node_id)[out_table]
        for cell in cells.chunks:
            rows = cell.node_id.numpy()
            forward[np.ix_(rows, reads)] += dense(cell.forward, reads.size)
            backward[np.ix_(rows, is_read_by)] += dense(cell.backward, is_read_by.size)
        pieces = torch.cat([dense(cell.forward, reads.size) for cell in cells.chunks])
        assert torch.equal(dense(cells.whole.forward, reads.size), pieces)
    torch.testing.assert_close(forward, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(backward, whole.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_directed", [False, True])
@pytest.mark.parametrize("num_ways", [1, 2, 4])
@pytest.mark.parametrize("operator", GATHERED)
def test_edges_of_all_cells_are_the_graphs(
    operator: Operator, num_ways: int, is_directed: bool
) -> None:
    graph, chunked = woven_ways(is_directed)
    expected = FullGraph(graph, dtype=torch.float64).edge_index(operator)
    found: list[tuple[int, int]] = []
    for way, cells in parts_of(chunked, num_ways, operator):
        for chunk, cell in enumerate(cells.chunks):
            found += check_edges(way, cell, chunk, chunked)
        whole = check_edges(way, cells.whole, None, chunked)
        assert sorted(whole) == sorted(found[-len(whole) :] if whole else [])
    assert sorted(found) == sorted(map(tuple, expected.T.tolist()))


def check_edges(
    way: WayGraph, cell: Cell, chunk: int | None, chunked: ChunkedGraph
) -> list[tuple[int, int]]:
    """Checks a cell's edges against their own ids; returns (source, target) in original ids."""
    edges = cell.edges
    assert edges is not None
    halo = edges.halo.tolist()
    assert halo == sorted(set(halo))
    assert not any(cell.rows.start <= row < cell.rows.stop for row in halo)
    source, target = edges.edge_index
    assert torch.equal(target, target.sort().values)
    table_row = torch.cat((torch.arange(cell.rows.start, cell.rows.stop), edges.halo))
    node_id = torch.from_numpy(way.node_id)[table_row]
    assert torch.equal(node_id[source], edges.source_id)
    assert torch.equal(cell.node_id[target], edges.target_id)
    assert set(source[source >= cell.node_id.numel()].tolist()) == set(
        range(cell.node_id.numel(), table_row.numel())
    )  # nothing is read in vain
    chunk_of = {
        int(node): int(chunk)
        for chunk in range(chunked.num_chunks)
        for node in chunked.node_id[slice(*chunk_rows(chunked, chunk))]
    }
    halo_id = node_id[cell.node_id.numel() :].tolist()
    same = [chunk is None or chunk_of[node] == chunk for node in halo_id]
    assert edges.is_fresh_halo.tolist() == [[is_same] for is_same in same]
    return list(zip(edges.source_id.tolist(), edges.target_id.tolist(), strict=True))


def chunk_rows(chunked: ChunkedGraph, chunk: int) -> tuple[int, int]:
    ptr, ways = chunked.cell_ptr, chunked.num_ways
    return int(ptr[chunk * ways]), int(ptr[(chunk + 1) * ways])


def test_edges_of_a_drawn_cell() -> None:
    # 0 -> 1 -> 2 -> 0 and 1 -> 1; node 2 is a chunk of its own
    chunked = cut(graph_of(3, [(0, 1), (1, 2), (2, 0), (1, 1)]), [0, 0, 1])
    ((_, cells),) = parts_of(chunked, 1, "edges")
    first, second = (cell.edges for cell in cells.chunks)
    assert first is not None
    assert second is not None
    assert first.halo.tolist() == [2]
    assert first.edge_index.tolist() == [[2, 0, 1], [0, 1, 1]]  # 2 -> 0, 0 -> 1, 1 -> 1
    assert second.halo.tolist() == [1]
    assert second.edge_index.tolist() == [[1], [0]]
    assert (second.source_id.tolist(), second.target_id.tolist()) == ([1], [2])
    assert not first.is_fresh_halo.any()


def test_rows_and_mirrors_of_a_drawn_cell() -> None:
    # ring 0 - 1 - 2 - 3: chunk 0 is node 1 (way 0) and 2 (way 1); chunk 1 is 3 (way 0), 0 (way 1)
    (_, left), (_, right) = parts_of(symmetric_square(), 2, "edges")
    assert [cell.rows for cell in left.chunks] == [slice(0, 1), slice(1, 2)]
    assert [cell.in_mirrors for cell in left.chunks] == [slice(2, 3), slice(3, 4)]
    assert [cell.node_id.tolist() for cell in right.chunks] == [[2], [0]]
    assert left.whole.in_mirrors == slice(2, 4)
    edges = left.chunks[0].edges
    assert edges is not None
    assert edges.halo.tolist() == [2, 3]  # node 2 of this chunk, node 0 of the other
    assert edges.is_fresh_halo.tolist() == [[True], [False]]


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("operator", ["gcn", "edges"])
@pytest.mark.parametrize("num_ways", [1, 2, 4])
def test_what_a_cell_sends_is_what_its_peer_receives(
    num_ways: int, operator: str, side: str
) -> None:
    _, chunked = woven_ways(is_directed=True)
    parts = parts_of(chunked, num_ways, operator)
    for chunk in range(3):
        trades = {}  # (way, peer): new ids sent and received
        for way, cells in parts:
            cell = cells.chunks[chunk]
            table = np.concatenate((way.row_id, getattr(way, f"{side}_mirrors").row_id))
            exchanges = getattr(cell, f"{side}_exchanges")
            for exchange in exchanges:
                ids = table[exchange.send.numpy()].tolist(), table[exchange.receive].tolist()
                trades[way.way, exchange.peer] = ids
            covered = [row for e in exchanges for row in range(e.receive.start, e.receive.stop)]
            mirrors = getattr(cell, f"{side}_mirrors")
            assert covered == list(range(mirrors.start, mirrors.stop))
        for (way_index, peer), (sent, received) in trades.items():
            assert way_index != peer
            assert trades[peer, way_index] == (received, sent)
            assert sent or received  # empty trades are left out


@pytest.mark.parametrize("num_ways", [1, 2, 4])
def test_the_whole_trades_what_its_chunks_trade(num_ways: int) -> None:
    _, chunked = woven_ways(is_directed=True)
    for _, cells in parts_of(chunked, num_ways, "sum"):
        for side in ("in_exchanges", "out_exchanges"):
            whole = getattr(cells.whole, side)
            parts = [exchange for cell in cells.chunks for exchange in getattr(cell, side)]
            assert [(e.peer, e.send.tolist(), e.receive) for e in whole] == [
                (e.peer, e.send.tolist(), e.receive) for e in parts
            ]


@pytest.mark.parametrize("num_ways", [1, 2, 4])
@pytest.mark.parametrize("operator", ["sum", "gcn"])
def test_interior_rows_read_no_mirror_of_their_chunk(operator: str, num_ways: int) -> None:
    _, chunked = woven_ways(is_directed=True)
    for way, cells in parts_of(chunked, num_ways, operator):
        for cell in [*cells.chunks, cells.whole]:
            sides = (
                (cell.forward, cell.forward_halves, cell.in_mirrors, way.in_mirrors),
                (cell.backward, cell.backward_halves, cell.out_mirrors, way.out_mirrors),
            )
            for block, halves, mirrors, held in sides:
                table = dense(block, way.num_rows + held.row_id.size)
                reads = table[:, mirrors].ne(0).any(1)  # [num_rows]
                if halves.interior is None:
                    assert not reads.any()
                else:
                    assert halves.interior.tolist() == (~reads).nonzero().flatten().tolist()
                assert halves.boundary.tolist() == reads.nonzero().flatten().tolist()


def test_an_empty_cell_is_a_cell() -> None:
    _, chunked = woven_ways(is_directed=True)
    for operator in ("gcn", "edges_self"):
        cell = parts_of(chunked, 4, operator)[2][1].chunks[1]
        assert cell.rows.start == cell.rows.stop
        assert cell.node_id.numel() == 0
        if cell.edges is not None:
            assert cell.edges.edge_index.shape == (2, 0)


def test_row_wise_layers_need_no_adjacency() -> None:
    for _, cells in parts_of(symmetric_square(), 2, "none"):
        for cell in [*cells.chunks, cells.whole]:
            assert cell.forward is None
            assert cell.backward is None
            assert cell.edges is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_and_weights_have_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    way = way_graph(woven_ways(is_directed=True)[1], way=0, num_ways=1)
    block = build_cells(way, operator="gcn", dtype=dtype, device=CPU).whole.forward
    assert block is not None
    for part in (block.weight, block.row_scale, block.col_scale):
        assert part is not None
        assert part.dtype == dtype
