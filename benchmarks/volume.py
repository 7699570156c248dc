"""The published volume table, counted: GNNPipe (arXiv 2308.10087), 8 ranks, 32 layers.

Every cell runs one epoch of the real engine in eight processes and adds up what its counters
say was sent. Bytes do not depend on values, so one epoch is enough and no model is evaluated.

    python benchmarks/volume.py --data ../shared/data
    python benchmarks/volume.py --data ../shared/data --quick      seconds instead of minutes
    python benchmarks/volume.py --data ../shared/data --derive     cuts the graphs, runs nothing

``--quick`` counts a small model (10 convolutions, 16 wide) and scales it by the closed formula of
``gnnpipe.volume``, which must equal the counters to the byte there; ``--derive`` is the formula
alone, on the same partitions. The table says which cells are derived.
"""

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gnnpipe import chunk
from gnnpipe.assembly import stage_bounds
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.comm import KINDS
from gnnpipe.config import Config, load_config
from gnnpipe.configured import model_layers
from gnnpipe.datasets import load_graph
from gnnpipe.environment import end_with_parent
from gnnpipe.preflight import thread_variables
from gnnpipe.runs import PipelineRun
from gnnpipe.strata import strata_among
from gnnpipe.volume import MirrorCounts, predict_comm_bytes
from gnnpipe.way import way_graph
from gnnpipe.world import World, join
from launch.local import run_local
from partition import assign
from partition.adjacency import symmetrised
from partition.metis import cut as metis_cut

GIB = 2**30
NUM_RANKS = 8
MODELS = ("gcn", "sage", "gcnii", "resgcn+")
QUICK = {"model.num_layers": 10, "model.hidden_channels": 16}


class Setting(NamedTuple):
    """One way to use eight ranks."""

    num_stages: int
    num_ways: int
    num_chunks: int


SETTINGS = {
    "graph": Setting(1, 8, 1),
    "pipeline": Setting(8, 1, 32),
    # The published hybrid runs chunks of 32 in pairs, which makes 16 of them.
    "hybrid": Setting(4, 2, 16),
}


class Subject(NamedTuple):
    """A graph of the published table."""

    hidden_channels: int
    overrides: list[str]
    published_gib: dict[str, tuple[float, float, float]]
    """Model to graph, pipeline, hybrid; weights included."""
    published_mirrors: float
    """Mirror rows per node at 8 parts, back-solved from the published graph column."""


SUBJECTS = {
    "squirrel": Subject(
        1000,
        [],
        {
            "gcn": (4.43, 0.271, 1.38),
            "sage": (6.10, 0.271, 1.62),
            "gcnii": (4.53, 0.543, 1.51),
            "resgcn+": (6.20, 0.271, 1.63),
        },
        2.22,
    ),
    "coauthor_physics": Subject(
        100,
        [],
        {
            "gcn": (0.876, 0.180, 0.620),
            "sage": (0.935, 0.180, 0.629),
            "gcnii": (0.877, 0.360, 0.698),
            "resgcn+": (0.894, 0.180, 0.623),
        },
        0.99,
    ),
    "ogbn_arxiv": Subject(
        100,
        ["data.undirected=true", "data.features=surrogate"],
        {
            "gcn": (2.74, 0.883, 2.33),
            "sage": (2.76, 0.883, 2.34),
            "gcnii": (2.74, 1.77, 2.71),
            "resgcn+": (2.76, 0.883, 2.34),
        },
        0.68,
    ),
}


class Cell(NamedTuple):
    """One entry of the table."""

    graph: str
    model: str
    setting: str


def main() -> int:
    """Counts what is missing, then writes the table."""
    options = _parser().parse_args()
    if options.count is not None:
        end_with_parent()
        count(json.loads(Path(options.count).read_text()))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    full, quick = options.work / "full.jsonl", options.work / "quick.jsonl"
    done = {**(_rows(quick) if options.quick or options.derive else {}), **_rows(full)}
    wanted = [
        Cell(graph, model, setting)
        for graph in options.graphs
        for model in options.models
        for setting in SETTINGS
    ]
    for graph in options.graphs:
        cells = [cell for cell in wanted if cell.graph == graph and cell not in done]
        results = quick if options.quick or options.derive else full
        status = _count_graph(graph, cells, options, results) if cells else 0
        if status:
            return status
    found = {**_rows(quick), **_rows(full)}  # What was counted in full comes before what was not.
    text = "\n".join(_report([found[cell] for cell in wanted]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return 0


def _count_graph(name: str, cells: list[Cell], options: argparse.Namespace, results: Path) -> int:
    """Cuts one graph for every setting and counts its cells in eight processes."""
    partitions = {
        key: str(options.work / f"{name}-{key}") for key in {cell.setting for cell in cells}
    }
    _cut(name, partitions, options.data)
    jobs = [
        {
            "cell": cell,
            "overrides": _overrides(cell, options.data, quick=options.quick),
            "published": _overrides(cell, options.data, quick=False),
            "partition": partitions[cell.setting],
        }
        for cell in cells
    ]
    if options.derive:
        rows = [json.dumps(_row(entry, None)) for entry in jobs]
        with results.open("a") as file:
            file.writelines(f"{row}\n" for row in rows)
        return 0
    job = options.work / f"job-{name}.json"
    job.write_text(json.dumps({"jobs": jobs, "results": str(results)}))
    command = [sys.executable, __file__, "--count", str(job)]
    return run_local(command, NUM_RANKS, variables=thread_variables(1))


def _overrides(cell: Cell, data: Path, *, quick: bool) -> list[str]:
    subject, setting = SUBJECTS[cell.graph], SETTINGS[cell.setting]
    sizes = {"model.num_layers": 32, "model.hidden_channels": subject.hidden_channels}
    values = {
        "data.name": data / f"{cell.graph}.npz",
        "model.name": cell.model,
        "parallel.num_stages": setting.num_stages,
        "parallel.num_ways": setting.num_ways,
        "partition.num_chunks": setting.num_chunks,
        "run.threads": 1,
        "run.timeout_s": 600,
        **(QUICK if quick else sizes),
    }
    return [*subject.overrides, *(f"{key}={value}" for key, value in values.items())]


def _cut(name: str, partitions: dict[str, str], data: Path) -> None:
    """Partitions for each setting, and what plain METIS, one part per rank, would mirror."""
    config = load_config(None, [f"data.name={data / f'{name}.npz'}", *SUBJECTS[name].overrides])
    options = config.data
    graph = load_graph(options.name, undirected=options.undirected, features=options.features)
    for key, path in partitions.items():
        counts = {"num_chunks": SETTINGS[key].num_chunks, "num_ways": SETTINGS[key].num_ways}
        assignment = assign(graph.indptr, graph.indices, **counts)
        ids = (assignment.chunk_id, assignment.way_id)
        chunked = chunk.cut(graph, *ids, num_ways=counts["num_ways"], method="metis", seed=0)
        chunk.save(chunked, path, overwrite=True)
    adjacency = symmetrised(graph.indptr, graph.indices)
    plain = metis_cut(adjacency, np.ones(graph.num_nodes, np.int64), num_parts=NUM_RANKS, seed=0)
    target = plain[np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))]
    outside = target != plain[graph.indices]
    pairs = np.unique(target[outside].astype(np.int64) * graph.num_nodes + graph.indices[outside])
    path = Path(next(iter(partitions.values()))).with_name(f"{name}-plain.json")
    path.write_text(json.dumps({"plain_mirrors": pairs.size / graph.num_nodes}))


def count(job: dict[str, Any]) -> None:
    """One rank: runs one epoch of every cell; rank 0 appends what all ranks sent."""
    torch.set_num_threads(1)
    with join(device="cpu", timeout_s=600.0) as world, world.failing_together():
        for entry in job["jobs"]:
            row = _count_cell(entry, world)
            gc.collect()
            if row is not None:
                with Path(job["results"]).open("a") as file:
                    file.write(json.dumps(row) + "\n")
                sys.stderr.write(f"{' '.join(row['cell'])}: {row['epoch_s']:.1f} s\n")


def _count_cell(entry: dict[str, Any], world: World) -> dict[str, Any] | None:
    config = load_config(None, entry["overrides"])
    chunked = chunk.load(entry["partition"])
    run = PipelineRun(config, chunked, world=world, layers=model_layers(config, chunked))
    start = time.perf_counter()
    run.train_epoch(1)
    epoch_s = time.perf_counter() - start
    parts = run.gather(torch.tensor(run.usage().sent_bytes))
    if not parts:
        return None
    counted = dict(zip(KINDS, torch.stack(parts).sum(dim=0).tolist(), strict=True))
    predicted = _predict(config, chunked, _mirrors(chunked, config))
    assert counted == {**predicted, "evaluation": 0}, (counted, predicted)
    return _row(entry, epoch_s)


def _row(entry: dict[str, Any], epoch_s: float | None) -> dict[str, Any]:
    """A cell at the published size; ``epoch_s`` is None where nothing ran."""
    config, chunked = load_config(None, entry["published"]), chunk.load(entry["partition"])
    mirrors = _mirrors(chunked, config)
    plain = Path(entry["partition"]).with_name(f"{entry['cell'][0]}-plain.json")
    return {
        "cell": entry["cell"],
        "bytes": _predict(config, chunked, mirrors),
        "is_counted": epoch_s is not None and entry["overrides"] == entry["published"],
        "mirrors_per_node": mirrors.incoming / chunked.num_nodes,
        "epoch_s": epoch_s,
        **json.loads(plain.read_text()),
    }


def _predict(config: Config, chunked: ChunkedGraph, mirrors: MirrorCounts) -> dict[str, int]:
    layers = model_layers(config, chunked)
    stages = config.parallel.total_stages
    return predict_comm_bytes(
        layers,
        bounds=stage_bounds(layers, chunked, num_stages=stages, sizes=None),
        num_stages=config.parallel.num_stages,
        num_nodes=chunked.num_nodes,
        num_ways=config.parallel.num_ways,
        mirrors=mirrors,
        element_bytes=4,
        num_chunks=chunked.num_chunks,
        num_strata=min(config.num_strata, strata_among(np.diff(chunked.out_indptr))),
    )


def _mirrors(chunked: ChunkedGraph, config: Config) -> MirrorCounts:
    ways = config.parallel.num_ways
    graphs = [way_graph(chunked, way=way, num_ways=ways) for way in range(ways)]
    return MirrorCounts(
        sum(graph.in_mirrors.row_id.size for graph in graphs),
        sum(graph.out_mirrors.row_id.size for graph in graphs),
    )


def _report(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table as Markdown, with what it was made by."""
    command = " ".join(["python benchmarks/volume.py", *sys.argv[1:]])
    yield "# Communication volume of one epoch, 8 ranks, 32 layers"
    yield ""
    yield f"`{command}`; {_hardware()}; METIS seed 0. GiB (2^30 bytes) over all ranks."
    yield ""
    yield (
        "| graph | model | setting | published | ours | ratio | boundary | carried | halo "
        "| gradient | how |"
    )
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    for row in rows:
        yield _table_row(row)
    yield ""
    yield "| graph | ways | mirror rows per node | plain METIS, 8 parts | published, 8 parts |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    seen = set()
    for row in rows:
        graph, _, setting = row["cell"]
        if (graph, setting) not in seen and setting != "pipeline":
            seen.add((graph, setting))
            subject = SUBJECTS[graph]
            others = f"{row['plain_mirrors']:.3f} | {subject.published_mirrors:.2f}"
            ways = SETTINGS[setting].num_ways
            own = f"| {graph} | {ways} | {row['mirrors_per_node']:.3f} "
            yield own + f"| {others if setting == 'graph' else ' | '} |"


def _table_row(row: dict[str, Any]) -> str:
    graph, model, setting = row["cell"]
    column = list(SETTINGS).index(setting)
    published = SUBJECTS[graph].published_gib[model][column]
    kinds = [f"{row['bytes'][kind] / GIB:.3f}" for kind in KINDS if kind != "evaluation"]
    total = sum(row["bytes"].values()) / GIB
    how = "counted" if row["is_counted"] else "derived"
    figures = [f"{published:g}", f"{total:.3f}", f"{total / published:.3f}", *kinds, how]
    return f"| {graph} | {model} | {setting} | {' | '.join(figures)} |"


def _hardware() -> str:
    threads = f"{os.cpu_count()} CPU cores, {platform.machine()}, gloo on loopback"
    return f"{threads}, one thread per rank, torch {torch.__version__}"


def _rows(path: Path) -> dict[Cell, dict[str, Any]]:
    """The cells that an earlier run has left in a file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {Cell(*row["cell"]): row for row in map(json.loads, lines)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="folder of the .npz graphs")
    add("--graphs", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--quick", action="store_true", help="count a small model, derive the published size")
    add("--derive", action="store_true", help="cut the graphs and derive every cell")
    add("--work", type=Path, default=Path("runs/volume"), help="partitions and counts; resumed")
    add("--out", type=Path, default=Path("benchmarks/results/volume.md"))
    add("--count", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
