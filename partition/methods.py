"""The methods that cut a graph into ways and chunks: METIS, or an order cut into equal ranges.

Ways are cut first and nested; each finest way is cut into C cells, and chunk k is the union of
cell k of every way. For W = 2 ways and C = 2 chunks::

              way 0    way 1
    chunk 0   cell 0   cell 2
    chunk 1   cell 1   cell 3
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

from partition import metis
from partition.adjacency import symmetrised, work_of

PARTS_PER_CHUNK = 4
"""METIS parts in a chunk of method metis-grouped, as published: better balance, larger cut."""

MEMORY_WORK = 50
"""Added to a node's work where ways are cut, in units of one edge.

Ways share memory too, which goes with rows, not with edges. On coauthor_physics the larger of two
ways then holds 0.64 of the table rows instead of 0.67, and 3% more than its share of the work.
"""


class Assignment(NamedTuple):
    """Where each node belongs."""

    chunk_id: NDArray[np.int32]  # [N], in [0, C): defines the numbers of a run
    way_id: NDArray[np.int32]  # [N], in [0, W): placement only


def by_metis(
    adjacency: csr_array,
    work: NDArray[np.int64],
    *,
    num_chunks: int,
    num_ways: int,
    parts_per_chunk: int,
    seed: int,
) -> Assignment:
    """Cuts nested ways, then each way into cells, with METIS.

    Args:
        adjacency: ``[N, N]``, symmetric, without self loops.
        work: vertex weights, ``[N]``.
        num_chunks: cells of each way.
        num_ways: ways.
        parts_per_chunk: METIS parts that make up a cell; more than one are grouped at random.
        seed: seeds METIS and the grouping.
    """
    way_id = nested_ways(adjacency, work + MEMORY_WORK, num_ways=num_ways, seed=seed)
    chunk_id = np.zeros_like(way_id)
    is_grouped = num_chunks > 1 and parts_per_chunk > 1  # One chunk needs no METIS.
    num_parts = num_chunks * (parts_per_chunk if is_grouped else 1)
    for way in range(num_ways):
        nodes = np.flatnonzero(way_id == way)
        part_id = metis.cut(
            _subgraph(adjacency, nodes),
            work[nodes],
            num_parts=num_parts,
            seed=seed,
            least=num_chunks,
        )
        if is_grouped:
            part_id = random_groups(int(part_id.max()) + 1, num_chunks, seed=seed)[part_id]
        chunk_id[nodes] = part_id
    return Assignment(chunk_id, way_id)


def nested_ways(
    adjacency: csr_array, work: NDArray[np.int64], *, num_ways: int, seed: int
) -> NDArray[np.int32]:
    """Splits a graph into ways, again and again by the smallest prime factor.

    ``way_id // (W / W')`` is therefore the partition into W' ways: cut first, refined later.

    Returns:
        Way of each node, ``[N]``.
    """
    if num_ways == 1:
        return np.zeros(len(work), dtype=np.int32)
    factor = next(p for p in range(2, num_ways + 1) if num_ways % p == 0)
    num_inner = num_ways // factor
    outer = metis.cut(adjacency, work, num_parts=factor, seed=seed)
    way_id = outer * np.int32(num_inner)
    for part in range(factor):
        nodes = np.flatnonzero(outer == part)
        inner_graph = _subgraph(adjacency, nodes)
        way_id[nodes] += nested_ways(inner_graph, work[nodes], num_ways=num_inner, seed=seed)
    return way_id


def random_groups(num_parts: int, num_chunks: int, *, seed: int) -> NDArray[np.int32]:
    """Chunk of each METIS part, ``[num_parts]``: equally many per chunk, or one more."""
    grouped = np.sort(np.arange(num_parts, dtype=np.int32) % num_chunks)
    return np.random.default_rng(seed).permutation(grouped)


def by_order(
    order: NDArray[np.int64], work: NDArray[np.int64], *, num_chunks: int, num_ways: int
) -> Assignment:
    """Cuts an order of the nodes into W * C ranges of equal work, way after way.

    Ranges of ranges are nested by themselves, for every number of ways that divides W.

    Args:
        order: all nodes, ``[N]``.
        work: work of each node, ``[N]``.
        num_chunks: chunks.
        num_ways: ways.
    """
    sizes = np.diff(equal_ranges(work[order], num_chunks * num_ways))
    cell = np.empty(len(order), dtype=np.int32)
    cell[order] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return Assignment(chunk_id=cell % num_chunks, way_id=cell // num_chunks)


def equal_ranges(work: NDArray[np.int64], num_ranges: int) -> NDArray[np.int64]:
    """Boundaries of consecutive ranges of nearly equal work, none of them empty.

    Args:
        work: ``[N]``, N >= num_ranges.
        num_ranges: number of ranges.

    Returns:
        ``[num_ranges + 1]``, from 0 to N, strictly rising.
    """
    middle = np.cumsum(work) - work / 2  # an item belongs where its middle falls
    target = np.arange(num_ranges + 1) * (work.sum() / num_ranges)
    bound = np.searchsorted(middle, target)
    bound[0], bound[-1] = 0, len(work)
    # Push the bounds apart, so that each range keeps one item: first upwards, then back from N.
    step = np.arange(num_ranges + 1)
    bound = np.maximum.accumulate(bound - step) + step
    result: NDArray[np.int64] = np.minimum(bound, len(work) - num_ranges + step)
    return result


def order_of(
    method: str, indptr: NDArray[Any], indices: NDArray[Any], *, seed: int
) -> NDArray[np.int64]:
    """The order that method contiguous, random or bfs cuts into ranges, ``[N]``."""
    num_nodes = len(indptr) - 1
    if method == "random":
        return np.random.default_rng(seed).permutation(num_nodes)
    if method == "bfs":
        return breadth_first(symmetrised(indptr, indices))
    return np.arange(num_nodes)


def breadth_first(adjacency: csr_array) -> NDArray[np.int64]:
    """All nodes breadth first, component after component, each from its smallest node.

    One search from an extra node that touches every component's first node; sorting its order
    by component then puts the components one after the other. A search for each component
    would take quadratic time on graphs with many isolated nodes.

    Args:
        adjacency: ``[N, N]``, symmetric.

    Returns:
        Nodes in order, ``[N]``.
    """
    num_nodes = adjacency.shape[0]
    _, component = connected_components(adjacency, directed=False)  # numbered by smallest node
    _, firsts = np.unique(component, return_index=True)
    indptr = np.append(adjacency.indptr, adjacency.nnz + len(firsts))
    indices = np.append(adjacency.indices, firsts)
    entries = np.ones(len(indices), dtype=np.bool_)
    rooted = csr_array((entries, indices, indptr), shape=(num_nodes + 1, num_nodes + 1))
    order = breadth_first_order(rooted, num_nodes, return_predecessors=False)[1:]
    result: NDArray[np.int64] = order[np.argsort(component[order], kind="stable")].astype(np.int64)
    return result


def _subgraph(adjacency: csr_array, nodes: NDArray[np.int64]) -> csr_array:
    """The graph among some nodes, renumbered in their order; itself when it is all of them."""
    if len(nodes) == adjacency.shape[0]:
        return adjacency
    return adjacency[nodes][:, nodes]


def work_and_graph(
    indptr: NDArray[Any], indices: NDArray[Any]
) -> tuple[csr_array, NDArray[np.int64]]:
    """What METIS is given: the symmetric graph, and work as vertex weights."""
    metis.require_memory(len(indices))  # before the copy that symmetrising makes
    return symmetrised(indptr, indices), work_of(indptr)
