"""Peak memory of each rank for a sweep of stages and ways, beside the closed formula.

    python benchmarks/memory.py --data ../shared/data

Each (S, W) gets fresh processes. A rank first trains a toy graph, which loads libraries, kernels
and connections; its resident memory then, trimmed, is the baseline. Then it loads its part of the
real graph from a memory-mapped partition and trains. *Growth* is the highest resident memory
(``VmHWM``, reset at the baseline) minus the baseline, over building, warm start, epochs and an
exact evaluation. It counts everything: freed but unreturned pages, and pages of mapped files.

Every cell is measured twice: as glibc's malloc is by default, and with ``MALLOC_MMAP_THRESHOLD_``
pinned below the size of a chunk's rows, so that freed blocks go back at once. The formula counts
live arrays, so it is held against the second; the difference between the two is what the
allocator keeps in pieces.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gnnpipe import chunk
from gnnpipe.assembly import stage_bounds
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.config import Config, load_config
from gnnpipe.configured import model_layers
from gnnpipe.datasets import load_graph
from gnnpipe.environment import end_with_parent
from gnnpipe.graph import Graph
from gnnpipe.memory import (
    FeatureCounts,
    MemoryBytes,
    WayCounts,
    predict_memory_bytes,
    storage_of,
)
from gnnpipe.mesh import Mesh
from gnnpipe.preflight import thread_variables
from gnnpipe.runs import PipelineRun
from gnnpipe.strata import strata_among
from gnnpipe.way import way_graph
from gnnpipe.world import World, join
from launch.local import run_local
from partition import assign

MIB = 2**20
MESHES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]
FINEST_WAYS = 4
EPOCHS = 2
PINNED = {"MALLOC_MMAP_THRESHOLD_": "16384"}
MALLOCS = {"default": {}, "pinned": PINNED}


def main() -> int:
    """Measures every mesh, then writes the tables."""
    options = _parser().parse_args()
    if options.measure is not None:
        end_with_parent()
        measure(json.loads(Path(options.measure).read_text()))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "memory.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {
        (row["graph"], row["malloc"], row["stages"], row["ways"]) for row in map(json.loads, lines)
    }
    for name in options.graphs:
        cells = [(malloc, *mesh) for mesh in MESHES for malloc in options.mallocs]
        missing = [cell for cell in cells if (name, *cell) not in done]
        if missing:
            _cut(name, options)
        for malloc, stages, ways in missing:
            job = options.work / "job.json"
            facts = {"graph": name, "malloc": malloc, "stages": stages, "ways": ways}
            job.write_text(json.dumps(facts | _job(facts, options, results)))
            command = [sys.executable, __file__, "--measure", str(job)]
            variables = {**thread_variables(1), **MALLOCS[malloc]}
            status = run_local(command, stages * ways, variables=variables)
            if status:
                return status
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    text = "\n".join(_report([row for row in rows if row["graph"] in options.graphs]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return 0


def _cut(name: str, options: argparse.Namespace) -> None:
    """The graph and the toy, cut into the finest ways; coarser ones are nested in them."""
    graphs = {"toy": _toy(), name: load_graph(str(options.data / f"{name}.npz"))}
    for key, graph in graphs.items():
        assignment = assign(
            graph.indptr, graph.indices, num_chunks=options.chunks, num_ways=FINEST_WAYS
        )
        ids = (assignment.chunk_id, assignment.way_id)
        chunked = chunk.cut(graph, *ids, num_ways=FINEST_WAYS, method="metis", seed=0)
        chunk.save(chunked, options.work / key, overwrite=True)


def _toy() -> Graph:
    """A ring whose only purpose is to load code."""
    num_nodes = 2048
    node = np.arange(num_nodes)
    ends = np.stack(
        [np.append(node, (node + 1) % num_nodes), np.append((node + 1) % num_nodes, node)]
    )
    return Graph.from_edge_index(
        ends,
        name="toy",
        num_nodes=num_nodes,
        features=np.ones((num_nodes, 4), np.float32),
        labels=node % 2,
        num_classes=2,
        train_mask=node % 3 == 0,
        val_mask=node % 3 == 1,
        test_mask=node % 3 == 2,
    )


def _job(facts: dict[str, Any], options: argparse.Namespace, results: Path) -> dict[str, Any]:
    values = {
        "model.name": options.model,
        "model.num_layers": options.layers,
        "model.hidden_channels": options.channels,
        "parallel.num_stages": facts["stages"],
        "parallel.num_ways": facts["ways"],
        "partition.num_chunks": options.chunks,
        "run.threads": 1,
        "run.timeout_s": 600,
    }
    return {
        "overrides": [*(f"{key}={value}" for key, value in values.items()), *options.set],
        "partition": str(options.work / facts["graph"]),
        "toy": str(options.work / "toy"),
        "results": str(results),
    }


def measure(job: dict[str, Any]) -> None:
    """One rank: trains the toy, then the graph; rank 0 appends what all ranks measured."""
    torch.set_num_threads(1)
    config = load_config(None, job["overrides"])
    with join(device="cpu", timeout_s=600.0) as world, world.failing_together():
        _train(config, chunk.load(job["toy"]), world)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        baseline = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        chunked = chunk.load(job["partition"])
        run = _train(config, chunked, world)
        figures = [_status("VmHWM") - baseline, baseline, run.table_bytes]
        predicted = _predict(config, chunked, world)
        parts = run.gather(torch.tensor([*figures, *predicted]))
    if parts:
        facts = {key: job[key] for key in ("graph", "malloc", "stages", "ways")}
        names = ["growth", "baseline", "table_bytes", *MemoryBytes._fields]
        row = facts | {"ranks": [dict(zip(names, p.tolist(), strict=True)) for p in parts]}
        with Path(job["results"]).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _train(config: Config, chunked: ChunkedGraph, world: World) -> PipelineRun:
    run = PipelineRun(config, chunked, world=world, layers=model_layers(config, chunked))
    run.warm_start()
    for epoch in range(1, EPOCHS + 1):
        run.train_epoch(epoch)
    run.evaluate()
    return run


def _status(name: str) -> int:
    """A line of ``/proc/self/status``, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def _predict(config: Config, chunked: ChunkedGraph, world: World) -> MemoryBytes:
    """The formula for this rank."""
    mesh = Mesh(config.parallel.num_stages, config.parallel.num_ways)
    stage, layers = mesh.stage_rank(world.rank), model_layers(config, chunked)
    bounds = stage_bounds(layers, chunked, num_stages=mesh.num_stages, sizes=None)
    graph = way_graph(chunked, way=mesh.way(world.rank), num_ways=mesh.num_ways)
    part = chunked.features[graph.row_id]
    is_dense = isinstance(part, np.ndarray)
    return predict_memory_bytes(
        layers[bounds[stage] : bounds[stage + 1]],
        is_first=stage == 0,
        num_cuts=(stage > 0) + (stage < mesh.num_stages - 1),
        way=WayCounts(
            num_rows=graph.num_rows,
            in_mirrors=graph.in_mirrors.row_id.size,
            out_mirrors=graph.out_mirrors.row_id.size,
            num_edges=graph.incoming.indices.size,
            is_symmetric=graph.outgoing is graph.incoming,
            largest_chunk=int(np.diff(graph.chunk_ptr).max()),
            is_closed=mesh.num_ways == chunked.num_chunks == 1,
            num_strata=strata_among(np.diff(chunked.out_indptr)),
        ),
        features=FeatureCounts(chunked.num_features, None if is_dense else part.nnz),
        num_chunks=chunked.num_chunks,
        storage=storage_of(config),
    )


def _report(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The tables as Markdown, with what they were made by."""
    command = " ".join(["python benchmarks/memory.py", *sys.argv[1:]])
    yield "# Memory of one rank, by stages and ways"
    yield ""
    cores = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    yield f"`{command}`; {cores}, one thread per rank, torch {torch.__version__}; METIS seed 0."
    yield ""
    yield (
        "MiB (2^20 bytes). Growth is peak resident memory above the baseline, of the rank that "
        "grew most: with glibc's malloc as it is, and with `MALLOC_MMAP_THRESHOLD_=16384`. "
        "Error: formula / pinned growth - 1, of that rank and the worst of all ranks. The columns "
        "after `table_bytes` are the formula's parts."
    )
    for graph in dict.fromkeys(row["graph"] for row in rows):
        yield ""
        yield f"## {graph}"
        yield ""
        purposes = " | ".join(MemoryBytes._fields)
        yield f"| S | W | growth | pinned | formula | error | worst | table_bytes | {purposes} |"
        yield "| ---: " * (8 + len(MemoryBytes._fields)) + "|"
        own = [row for row in rows if row["graph"] == graph]
        for mesh in MESHES:
            found = {row["malloc"]: row["ranks"] for row in own if _mesh(row) == mesh}
            if "pinned" in found:
                yield _line(mesh, found)


def _mesh(row: dict[str, Any]) -> tuple[int, int]:
    return row["stages"], row["ways"]


def _line(mesh: tuple[int, int], found: dict[str, list[dict[str, int]]]) -> str:
    ranks = found["pinned"]
    top = max(ranks, key=lambda rank: rank["growth"])
    errors = [_formula(rank) / rank["growth"] - 1 for rank in ranks]
    error, worst = _formula(top) / top["growth"] - 1, max(errors, key=abs)
    purposes = [_mib(top[name]) for name in MemoryBytes._fields]
    default = max((rank["growth"] for rank in found.get("default", [])), default=None)
    figures = ["" if default is None else _mib(default)]
    figures += [_mib(top["growth"]), _mib(_formula(top))]
    figures += [f"{error:+.1%}", f"{worst:+.1%}", _mib(top["table_bytes"]), *purposes]
    return f"| {mesh[0]} | {mesh[1]} | {' | '.join(figures)} |"


def _formula(rank: dict[str, int]) -> int:
    return sum(rank[name] for name in MemoryBytes._fields)


def _mib(count: int) -> str:
    return f"{count / MIB:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="folder of the .npz graphs")
    add("--graphs", nargs="+", default=["coauthor_physics", "amazon_computers"])
    add("--model", default="gcnii")
    add("--layers", type=int, default=32)
    add("--channels", type=int, default=64)
    add("--chunks", type=int, default=16)
    add("--set", nargs="+", default=[], help="settings of the run besides, key=value")
    add("--mallocs", nargs="+", choices=MALLOCS, default=list(MALLOCS))
    add("--work", type=Path, default=Path("runs/memory"), help="partitions and results; resumed")
    add("--out", type=Path, default=Path("benchmarks/results/memory.md"))
    add("--measure", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
