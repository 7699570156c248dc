"""Scales by degrees against loops over the edges; and what a rank copies of a large graph."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from drawn import cut, graph_of, woven

from gnnpipe import chunk, degrees
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.degrees import scales
from gnnpipe.way import way_graph


@pytest.mark.parametrize("block_rows", [1, 3, 1000])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_scales_equal_sums_over_the_edges(
    block_rows: int, is_weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(degrees, "BLOCK_ROWS", block_rows)
    graph = woven(30, is_directed=True, is_weighted=is_weighted)
    chunked = cut(graph, [node % 3 for node in range(30)])
    into, out, loop = np.zeros(30), np.zeros(30), np.zeros(30)
    for target in range(30):
        for e in range(chunked.indptr[target], chunked.indptr[target + 1]):
            source = chunked.indices[e]
            weight = 1.0 if chunked.edge_weight is None else float(chunked.edge_weight[e])
            if source == target:
                loop[target] = weight
            else:
                into[target] += weight
                out[source] += weight
    node_id = np.array([29, 0, 7, 7, 12, 3, *range(30)])
    found = scales(chunked, node_id)
    looped = into + np.where(loop == 0.0, 1.0, loop)
    count = np.maximum(np.diff(chunked.indptr), 1)
    with np.errstate(divide="ignore"):
        sym, laplacian = (into + loop) ** -0.5, out**-0.5
    np.testing.assert_allclose(found.gcn, (looped**-0.5)[node_id])
    np.testing.assert_allclose(found.mean, (1.0 / count)[node_id])
    np.testing.assert_allclose(found.sym, np.where(np.isinf(sym), 0.0, sym)[node_id])
    assert (loop > 0.0).any()
    expected = np.where(np.isinf(laplacian), 0.0, laplacian)[node_id]
    np.testing.assert_allclose(found.laplacian, expected)


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> ChunkedGraph:
    """A long ring with chords in four chunks of four ways, memory-mapped: 20000 nodes."""
    num_nodes = 20000
    node = np.arange(num_nodes)
    steps = [(node, (node + step) % num_nodes) for step in (1, 2, 3, 4)]
    edges = [*steps, *((b, a) for a, b in steps)]
    pairs = [(int(a), int(b)) for ends in edges for a, b in zip(*ends, strict=True)]
    way, position = np.divmod(node, num_nodes // 4)
    graph = graph_of(num_nodes, pairs)
    chunked = cut(graph, (position * 4 // (num_nodes // 4)).tolist(), way.tolist())
    folder = tmp_path_factory.mktemp("mapped") / "ring"
    chunk.save(chunked, folder)
    return chunk.load(folder)


def peak_bytes(action: Callable[[], object]) -> int:
    """Most memory that numpy had allocated at a time."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_way_of_four_copies_about_a_quarter(mapped: ChunkedGraph) -> None:
    whole = peak_bytes(lambda: way_graph(mapped, way=0, num_ways=1))
    quarter = peak_bytes(lambda: way_graph(mapped, way=1, num_ways=4))
    assert quarter < 0.3 * whole


def test_scales_of_few_nodes_build_nothing_of_the_graphs_size(mapped: ChunkedGraph) -> None:
    few = peak_bytes(lambda: scales(mapped, np.arange(10)))
    assert few < mapped.num_nodes
