"""Whether a run fits into memory, found before its tables are made: what each rank needs, by
purpose, against what the machine has.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from gnnpipe.assembly import stage_bounds
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.config import Config, from_dict, to_dict
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.memory import FeatureCounts, MemoryBytes, WayCounts, predict_memory_bytes, storage_of
from gnnpipe.mesh import Mesh
from gnnpipe.models.layer import Layer
from gnnpipe.strata import strata_among, strata_in
from gnnpipe.way import cell_bounds

PROCESS_BYTES = 600_000_000
"""Python, the libraries and compiled kernels of one rank: measured from 490 MB to 650 MB."""
MOST_PROPOSALS = 3
CGROUP = Path("/sys/fs/cgroup")

logger = logging.getLogger("gnnpipe")


class Room(NamedTuple):
    """Memory that ranks may take."""

    free_bytes: int
    num_sharing: int
    """Ranks that share it: all of a host, or one of a GPU."""
    name: str
    grows: bool
    """Whether more ranks bring more memory: those on other hosts and GPUs do."""


def host_room(world_size: int) -> Room:
    """What this host has left for its ranks, as the launcher placed them.

    Args:
        world_size: number of ranks on all hosts, which are taken to be alike.
    """
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    here = min(int(text), world_size) if text.isdecimal() and int(text) else world_size
    # The ranks have loaded their libraries already.
    free = free_bytes() + here * PROCESS_BYTES
    return Room(free, here, "this host", grows=here < world_size)


def gpu_room(free_bytes: int) -> Room:
    """What one GPU has left for its rank."""
    return Room(free_bytes + PROCESS_BYTES, 1, "a GPU", grows=True)


def free_bytes(proc: Path = Path("/proc"), cgroup: Path = CGROUP) -> int:
    """Memory that this process and its siblings can still get, a container's limit included."""
    free = 1 << 62
    with suppress(OSError, ValueError):
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        (kib,) = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        free = int(kib) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # `max` is no number: there is no limit
            bound = int((cgroup / limit).read_text(encoding="ascii"))
            free = min(free, bound - int((cgroup / used).read_text(encoding="ascii")))
    return max(free, 0)


def check_room(
    config: Config,
    chunked: ChunkedGraph,
    layers: Sequence[Layer],
    room: Room,
    *,
    rebuild: Callable[[Config], Sequence[Layer]] | None = None,
) -> None:
    """Checks that the fullest host or GPU has room for its ranks.

    Args:
        config: the run.
        chunked: the graph.
        layers: the model, without storage.
        room: what there is, on every host or GPU alike.
        rebuild: builds the model of another configuration; None where it is the user's own.

    Raises:
        UserError: with settings that fit.
    """
    ranks = rank_bytes(config, chunked, layers)
    logger.info("memory: %s; %s has %s", describe(ranks), room.name, size_text(room.free_bytes))
    model = _Model(layers, rebuild)
    _refuse(config, room, model, count=lambda other, built: rank_bytes(other, chunked, built))


def check_before_cut(
    config: Config, graph: Graph, room: Room, *, rebuild: Callable[[Config], Sequence[Layer]]
) -> None:
    """Checks, before a large graph is cut for nothing, that the best of cuts would have room.

    Args:
        config: the run.
        graph: the whole graph.
        room: what there is, on every host or GPU alike.
        rebuild: builds the model of a configuration.

    Raises:
        UserError: with settings that fit.
    """
    model = _Model(rebuild(config), rebuild)
    _refuse(config, room, model, count=lambda other, built: _least_bytes(other, graph, built))


class _Model(NamedTuple):
    layers: Sequence[Layer]
    rebuild: Callable[[Config], Sequence[Layer]] | None


def _refuse(
    config: Config,
    room: Room,
    model: _Model,
    *,
    count: Callable[[Config, Sequence[Layer]], list[MemoryBytes]],
) -> None:
    """Raises if ranks of these sizes do not fit."""
    ranks = count(config, model.layers)
    wanted, rebuild = _fullest(ranks, room), model.rebuild
    if wanted <= room.free_bytes or not config.run.check_memory:
        return

    def need(other: Config) -> int:
        return _fullest(count(other, model.layers if rebuild is None else rebuild(other)), room)

    fitting = list(_proposals(config, room, need, is_own_model=rebuild is None))
    way_out = f"settings that fit: {', '.join(fitting)}" if fitting else "use larger machines"
    raise UserError(
        f"`run.check_memory` (=true) finds that {describe(ranks)}, {size_text(wanted)} for"
        f" {room.num_sharing} rank(s) of {room.name}, which has {size_text(room.free_bytes)};"
        f" {way_out}, or set run.check_memory=false"
    )


def rank_bytes(
    config: Config, chunked: ChunkedGraph, layers: Sequence[Layer]
) -> list[MemoryBytes]:
    """What each rank will hold at its peak, ``[ranks]``.

    Args:
        config: the run.
        chunked: the graph.
        layers: the whole model.
    """
    num_ways = config.parallel.num_ways
    ways = [way_counts(chunked, way, num_ways) for way in range(num_ways)]
    return _rank_bytes(config, chunked, layers, ways, num_chunks=chunked.num_chunks)


def _least_bytes(config: Config, graph: Graph, layers: Sequence[Layer]) -> list[MemoryBytes]:
    """The same for a graph that is not cut: even parts without mirrors."""
    W, C = config.parallel.num_ways, config.partition.num_chunks
    rows, edges = graph.num_nodes // W, graph.num_edges // W
    largest = -(-rows // C)
    # Shared arrays: the least.
    way = WayCounts(rows, 0, 0, edges, True, largest, W == C == 1, strata_in(graph))
    return _rank_bytes(config, graph, layers, [way] * W, num_chunks=C)


def _rank_bytes(
    config: Config,
    graph: Graph | ChunkedGraph,
    layers: Sequence[Layer],
    ways: Sequence[WayCounts],
    *,
    num_chunks: int,
) -> list[MemoryBytes]:
    parallel, features = config.parallel, graph.features
    mesh = Mesh(parallel.num_stages, parallel.num_ways)
    bounds = stage_bounds(
        layers, graph, num_stages=parallel.total_stages, sizes=parallel.layers_per_stage
    )
    found = []
    for rank in range(mesh.world_size):
        stage_rank, way = mesh.stage_rank(rank), ways[mesh.way(rank)]
        share = way.num_rows / max(graph.num_nodes, 1)
        entries = round(features.nnz * share) if isinstance(features, csr_array) else None
        held = [
            layers[index]
            for stage in mesh.stages_of(stage_rank, virtual_stages=parallel.virtual_stages)
            for index in range(bounds[stage], bounds[stage + 1])
        ]
        found.append(
            predict_memory_bytes(
                held,
                is_first=stage_rank == 0,
                num_cuts=(stage_rank > 0) + (stage_rank < mesh.num_stages - 1),
                way=way,
                features=FeatureCounts(graph.num_features, entries),
                num_chunks=num_chunks,
                storage=storage_of(config),
            )
        )
    return found


def way_counts(chunked: ChunkedGraph, way: int, num_ways: int) -> WayCounts:
    """Counts what one way will hold, without making it."""
    cell_ptr = cell_bounds(chunked, num_ways)
    starts, ends = cell_ptr[:-1][way::num_ways], cell_ptr[1:][way::num_ways]
    sides = [(chunked.indptr, chunked.indices), (chunked.out_indptr, chunked.out_indices)]
    is_symmetric = chunked.out_indices is chunked.indices
    mirrors = []
    for indptr, indices in sides[: 1 if is_symmetric or num_ways == 1 else 2]:
        is_read = np.zeros(chunked.num_nodes if num_ways > 1 else 0, bool)
        for start, end in zip(starts, ends, strict=True) if num_ways > 1 else ():
            is_read[indices[int(indptr[start]) : int(indptr[end])]] = True
        for start, end in zip(starts, ends, strict=True):
            is_read[start:end] = False
        mirrors.append(int(is_read.sum()))
    indptr = chunked.indptr
    return WayCounts(
        num_rows=int((ends - starts).sum()),
        in_mirrors=mirrors[0],
        out_mirrors=mirrors[-1],
        num_edges=int((indptr[ends] - indptr[starts]).sum()),
        is_symmetric=is_symmetric,
        largest_chunk=int((ends - starts).max()),
        is_closed=num_ways == 1 and chunked.num_chunks == 1,
        num_strata=strata_among(np.diff(chunked.out_indptr)),
    )


def describe(ranks: Sequence[MemoryBytes]) -> str:
    """The need of the fullest rank, by purpose."""
    rank = max(range(len(ranks)), key=lambda r: ranks[r].total)
    return f"rank {rank} needs {by_purpose(ranks[rank])}"


def by_purpose(memory: MemoryBytes) -> str:
    """What one rank needs, and for what, the largest part first."""
    parts = [("libraries", PROCESS_BYTES), *memory._asdict().items()]
    parts.sort(key=lambda part: -part[1])
    shown = ", ".join(f"{name} {size_text(count)}" for name, count in parts if count >= 5e5)
    return f"{size_text(memory.total + PROCESS_BYTES)} ({shown})"


def _fullest(ranks: Sequence[MemoryBytes], room: Room) -> int:
    """Bytes that the ranks of one host or GPU take together, where that is most."""
    needs = [rank.total + PROCESS_BYTES for rank in ranks]
    groups = range(0, len(needs), room.num_sharing)
    return max(sum(needs[low : low + room.num_sharing]) for low in groups)


def _proposals(
    config: Config, room: Room, need: Callable[[Config], int], *, is_own_model: bool
) -> Iterator[str]:
    """Single changes with which the run fits, those that change its numbers least first."""
    left = MOST_PROPOSALS
    for key, value in _candidates(config, room, is_own_model=is_own_model):
        section, name = key.split(".")
        values = to_dict(config)
        values[section][name] = value
        if name == "num_stages":
            values["parallel"]["layers_per_stage"] = None
        with suppress(UserError):
            wanted = need(from_dict(values))
            if wanted <= room.free_bytes and left:
                left -= 1
                yield f"{key}={value} ({size_text(wanted)})"


def _candidates(
    config: Config, room: Room, *, is_own_model: bool
) -> Iterator[tuple[str, int | str]]:
    if config.memory.mode == "keep":
        yield "memory.mode", "recompute"
    if config.history.period > 1:
        yield "history.period", 1
    if room.grows:
        for factor in (2, 4, 8):
            yield "parallel.num_stages", config.parallel.num_stages * factor
    if is_own_model:
        return
    if config.model.dtype == "float64":
        yield "model.dtype", "float32"
    for part in (2, 4, 8):
        yield "model.hidden_channels", config.model.hidden_channels // part
    for part in (2, 4):
        yield "model.num_layers", config.model.num_layers // part


def size_text(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
