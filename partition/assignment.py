"""assign(): one entrance to every method, with the checks that all of them share."""

import difflib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partition import assignment_file
from partition.adjacency import require_valid, work_of
from partition.errors import PartitionError
from partition.methods import (
    PARTS_PER_CHUNK,
    Assignment,
    by_metis,
    by_order,
    order_of,
    work_and_graph,
)

METHODS = ("metis", "metis-grouped", "contiguous", "random", "bfs", "file")


def assign(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    *,
    num_chunks: int,
    num_ways: int = 1,
    method: str = "metis",
    parts_per_chunk: int | None = None,
    seed: int = 0,
    file: str | None = None,
) -> Assignment:
    """Gives every node a chunk and a way; the same arguments give the same answer.

    Methods: ``metis`` few cut edges at equal work; ``metis-grouped`` the published variant, METIS
    parts grouped at random, four to a chunk; ``contiguous`` ranges of the given numbering;
    ``random``; ``bfs`` ranges of a breadth-first order; ``file`` what a file says.

    Args:
        indptr: row starts of the CSR by target, ``[N+1]``.
        indices: sources, ``[E]``; any direction, self loops and duplicates allowed.
        num_chunks: chunks C, each with at least one node in every way.
        num_ways: ways W, nested: ``way_id // (W / W')`` is a partition into W' ways.
        method: one of :data:`METHODS`.
        parts_per_chunk: METIS parts that ``metis-grouped`` groups to a chunk, 4 if None. The more,
            the more a chunk's classes are those of the graph (Chiang et al., "Cluster-GCN"), and
            the more edges cross chunks.
        seed: seed of METIS, of the grouping and of ``random``.
        file: assignment file of method ``file``.

    Returns:
        ``chunk_id`` and ``way_id``, ``[N]`` each, int32.

    Raises:
        PartitionError: arguments that cannot be met, METIS's failure, empty parts.
    """
    indptr, indices = np.asarray(indptr), np.asarray(indices)
    _require_options(method, parts_per_chunk=parts_per_chunk, seed=seed, file=file)
    per_chunk = 1 if method != "metis-grouped" else parts_per_chunk or PARTS_PER_CHUNK
    require_valid(indptr, indices)
    _require_nodes(
        len(indptr) - 1,
        method,
        num_chunks=num_chunks,
        num_ways=num_ways,
        parts_per_chunk=per_chunk,
    )
    if file is not None:
        return assignment_file.read(
            file, num_nodes=len(indptr) - 1, num_chunks=num_chunks, num_ways=num_ways
        )
    if not method.startswith("metis"):
        order = order_of(method, indptr, indices, seed=seed)
        return by_order(order, work_of(indptr), num_chunks=num_chunks, num_ways=num_ways)
    adjacency, work = work_and_graph(indptr, indices)
    return by_metis(
        adjacency,
        work,
        num_chunks=num_chunks,
        num_ways=num_ways,
        parts_per_chunk=per_chunk,
        seed=seed,
    )


def _require_options(
    method: str, *, parts_per_chunk: int | None, seed: int, file: str | None
) -> None:
    """Refuses unknown methods, seeds that METIS cannot take, options without their method."""
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.0)[0]
        raise PartitionError(
            f"`method` (={method}) must be one of {', '.join(METHODS)}; did you mean {near}"
        )
    if parts_per_chunk is not None and method != "metis-grouped":
        raise PartitionError(
            f"`parts_per_chunk` (={parts_per_chunk}) goes with `method` (=metis-grouped) only, "
            f"not with {method}; leave it out or take that"
        )
    if parts_per_chunk is not None and parts_per_chunk < 1:
        raise PartitionError(
            f"`parts_per_chunk` (={parts_per_chunk}) must be at least 1; 4 and 16 are usual"
        )
    if not 0 <= seed < 2**31:
        raise PartitionError(f"`seed` (={seed}) must lie in [0, 2**31); choose another")
    if method == "file" and file is None:
        raise PartitionError("`method` (=file) needs `file`; name the assignment file")
    if method != "file" and file is not None:
        raise PartitionError(f"`file` (={file}) needs `method` (=file); drop one of them")


def _require_nodes(
    num_nodes: int, method: str, *, num_chunks: int, num_ways: int, parts_per_chunk: int
) -> None:
    """Refuses more chunks, or more parts in all, than there are nodes."""
    for name, count in (("num_chunks", num_chunks), ("num_ways", num_ways)):
        if count < 1:
            raise PartitionError(f"`{name}` (={count}) must be at least 1; choose 1 or more")
        if count > num_nodes:
            raise PartitionError(
                f"`{name}` (={count}) must be at most the number of nodes (={num_nodes}); "
                f"cut into fewer {name.removeprefix('num_')}"
            )
    parts = num_chunks * num_ways * (parts_per_chunk if num_chunks > 1 else 1)
    if method != "file" and parts > num_nodes:  # a file may leave single cells empty
        raise PartitionError(
            f"`num_chunks` (={num_chunks}) with `num_ways` (={num_ways}) and `method` (={method}) "
            f"makes {parts} parts, which must be at most the number of nodes (={num_nodes}); "
            "cut into fewer chunks or parts"
        )
