"""How long training takes to 99% of exact training's best validation accuracy, in one process.

    python benchmarks/time_to_accuracy.py --data ../shared/data
    python benchmarks/time_to_accuracy.py --report benchmarks/results/time_to_accuracy.md

Three ways to train one GCNII with the same hyperparameters and the same initial weights:

- ``exact``: full-graph training, this project with one chunk: one optimizer step per epoch.
- ``steps k of C``: the pipeline's ``training.steps_per_epoch: k`` on C chunks (metis-grouped);
  ``steps k of C by P``: with ``partition.parts_per_chunk: P``. ``steps 32 of 32 by 16, averaged``
  is ``preset: many-steps``.
- ``cluster k of C``: mini-batches as Cluster-GCN makes them, of the same chunks: every epoch k
  random unions of C / k chunks, each a graph of its own with its own degrees; plain
  torch_geometric layers on torch CSR, sparse features as torch CSR.
- ``..., averaged``: the same with ``training.ema_decay: 0.9``, an average over optimizer steps.

A cell is (graph, method, seed); each is trained on one thread in this process, seed by seed and
graph by graph, so that a busy machine slows all methods alike. Timed is training: optimizer steps,
the first exact forward, the making of batches (counted apart too); not loading, cutting,
normalising the whole graph and the exact evaluation after every epoch. Finished cells are lines of
``cells.jsonl`` in ``--work`` and are not run again; ``--limit-s`` starts no new cell after that
time.
"""

import argparse
import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import numba  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from cluster_batches import Clusters  # noqa: E402
from convergence_cases import GRAPHS, MODELS, TUNED  # noqa: E402
from time_table import report  # noqa: E402

from gnnpipe import chunk  # noqa: E402
from gnnpipe.config import Config, from_dict  # noqa: E402
from gnnpipe.configured import model_layers  # noqa: E402
from gnnpipe.datasets import load_graph  # noqa: E402
from gnnpipe.graph import Graph  # noqa: E402
from gnnpipe.runs import PipelineRun  # noqa: E402
from gnnpipe.sections import DataConfig, PartitionConfig  # noqa: E402
from gnnpipe.sources import merge  # noqa: E402
from gnnpipe.world import World  # noqa: E402
from partition import assign  # noqa: E402

EPOCHS = {"pubmed": 60, "amazon_computers": 80, "facebook_pages": 50, "coauthor_physics": 30}
AVERAGED, EMA_DECAY = ", averaged", 0.9
METHODS = (
    "exact",
    "exact, averaged",
    "steps 16 of 16",
    "steps 16 of 16, averaged",
    "steps 16 of 16 by 16",
    "steps 16 of 16 by 16, averaged",
    "steps 32 of 32 by 16, averaged",
    "cluster 8 of 32",
    "cluster 8 of 32, averaged",
)


class Cell(NamedTuple):
    """One run."""

    graph: str
    method: str
    seed: int
    layers: int
    hidden: int
    epochs: int


Train = Callable[[int], float]
"""Trains one epoch, counted from 1; returns the seconds that went into making batches."""
Evaluate = Callable[[], tuple[float, float]]
"""Accuracy of validation and test nodes."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then reports."""
    options = parse(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "cells.jsonl"
    if options.report is not None:
        text = report(read(path), [*options.note, *notes()])
        options.report.write_text(text, encoding="utf-8")
        return
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    start_s = time.monotonic()
    done = {tuple(cell["cell"]) for cell in read(path)}
    missing = [cell for cell in cells(options) if tuple(cell) not in done]
    if missing:  # Kernels are compiled before anything is timed.
        for method in ("steps 2 of 4", "cluster 2 of 4"):
            run_cell(missing[0]._replace(method=method, epochs=1), options)
    for cell in missing:
        if time.monotonic() - start_s > options.limit_s:
            break
        result = {"cell": list(cell), **run_cell(cell, options)}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        best, last = max(point["val"] for point in result["curve"]), result["curve"][-1]
        say(f"{cell.graph} {cell.method} seed {cell.seed}: val {best:.4f}, {last['cpu_s']:.1f} s")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of .npz files")
    add("--work", type=Path, default=ROOT / "runs/time_to_accuracy", help="keeps finished cells")
    add("--graphs", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    add("--methods", nargs="+", default=list(METHODS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    add("--layers", type=int, default=8)
    add("--hidden", type=int, default=64)
    add("--epochs", type=int, help="instead of the graph's own number")
    add("--limit-s", type=float, default=math.inf, help="start no cell after this time")
    add("--report", type=Path, help="write the tables of all finished cells, run nothing")
    add("--note", nargs="*", default=[], help="with --report: sentences to put above the tables")
    return parser.parse_args(argv)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """All cells asked for."""
    for seed in options.seeds:
        for graph in options.graphs:
            for method in options.methods:
                epochs = options.epochs or EPOCHS[graph]
                yield Cell(graph, method, seed, options.layers, options.hidden, epochs)


def notes() -> list[str]:
    """What is missing from the table, and why."""
    samplers = [name for name in ("pyg_lib", "torch_sparse") if importlib.util.find_spec(name)]
    if samplers:
        return []
    return [
        "torch_geometric's `NeighborLoader` is not in the table: it needs pyg-lib or torch-sparse,"
        " neither of which is installed."
    ]


SHALLOW: Mapping[str, Mapping[str, object]] = {
    "model": {"norm": None},
    "history": {"refresh_every": 0},
}
"""Eight layers do without a norm; seconds are those of training alone, without exact forwards."""


class Method(NamedTuple):
    """What a method's name says."""

    kind: str
    steps: int = 1
    chunks: int = 1
    parts_per_chunk: int | None = None


def method_of(cell: Cell) -> Method:
    """Kind, steps of an epoch, chunks and their parts."""
    kind, *counts = re.sub(" (of|by)", "", cell.method.removesuffix(AVERAGED)).split()
    return Method(kind, *(int(count) for count in counts))


def config_of(cell: Cell, options: argparse.Namespace) -> Config:
    """The run of a cell; for mini-batches what it says of model and training."""
    kind, steps, chunks, parts = method_of(cell)
    values: dict[str, Any] = {
        "seed": cell.seed,
        "data": {"name": str(options.data / f"{cell.graph}.npz")},
        "partition": {
            "num_chunks": chunks,
            "method": "metis-grouped",
            "parts_per_chunk": parts,
        },
        "model": {"name": "gcnii", "num_layers": cell.layers, "hidden_channels": cell.hidden},
    }
    for more in (GRAPHS[cell.graph], MODELS["gcnii"], TUNED.get((cell.graph, "gcnii"), {})):
        values = merge(values, more)
    values = merge(merge(values, SHALLOW), {"training": {"epochs": cell.epochs}})
    if kind == "steps":
        values = merge(values, {"training": {"steps_per_epoch": steps}})
    if cell.method.endswith(AVERAGED):
        values = merge(values, {"training": {"ema_decay": EMA_DECAY}})
    return from_dict(values)


def run_cell(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Trains once; figures and seconds so far after each epoch."""
    config = config_of(cell, options)
    graph = graph_of(config.data.name, config.data.row_normalize)
    kind, steps, *_ = method_of(cell)
    clocks = Clocks()
    with clocks:
        if kind == "cluster":
            train, evaluate = clusters(config, graph, steps)
        else:
            train, evaluate = pipeline(config, graph, clocks)
    curve, batches_s = [], 0.0
    for epoch in range(1, cell.epochs + 1):
        with clocks:
            batches_s += train(epoch)
        val, test = evaluate()
        seconds = {"wall_s": clocks.wall_s, "cpu_s": clocks.cpu_s, "batches_s": batches_s}
        curve.append({"epoch": epoch, "val": val, "test": test, **seconds})
    return {"curve": curve}


class Clocks:
    """Adds up wall and CPU seconds of the time that it is entered."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0
        self._starts = 0.0, 0.0

    def __enter__(self) -> None:
        self._starts = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall_s += time.perf_counter() - self._starts[0]
        self.cpu_s += time.process_time() - self._starts[1]

    def forget(self) -> None:
        """What has run until now does not count."""
        self.wall_s = self.cpu_s = 0.0
        self._starts = time.perf_counter(), time.process_time()


def pipeline(config: Config, graph: Graph, clocks: Clocks) -> tuple[Train, Evaluate]:
    """This project on one rank; the first exact forward is timed."""
    run = make_run(config, graph, config.partition)
    clocks.forget()
    run.warm_start()

    def train(epoch: int) -> float:
        run.train_epoch(epoch)
        return 0.0

    def evaluate() -> tuple[float, float]:
        figures = run.evaluate()
        return figures["val"] or 0.0, figures["test"] or 0.0

    return train, evaluate


def make_run(config: Config, graph: Graph, partition: PartitionConfig) -> PipelineRun:
    """An engine with its initial weights."""
    chunk_id = chunks_of(config.data, partition)
    ways = np.zeros_like(chunk_id)
    chunked = chunk.cut(graph, chunk_id, ways, num_ways=1, method="file", seed=0)
    world = World(0, 1, device=torch.device("cpu"), store=None)
    return PipelineRun(config, chunked, world=world, layers=model_layers(config, chunked))


def clusters(config: Config, graph: Graph, steps: int) -> tuple[Train, Evaluate]:
    """Mini-batches of chunks, with the initial weights that this project would have."""
    weights = make_run(config, graph, PartitionConfig(num_chunks=1)).weights()
    assert weights is not None
    chunk_id = chunks_of(config.data, config.partition)
    batches = Clusters(graph, config, chunk_id=chunk_id, steps=steps, weights=weights)
    return batches.train_epoch, batches.evaluate


@cache
def graph_of(name: str, row_normalize: bool) -> Graph:
    """The graph, loaded once."""
    return load_graph(name, row_normalize=row_normalize)


@cache
def chunks_of(data: DataConfig, partition: PartitionConfig) -> Any:
    """The chunks, the same for all seeds."""
    graph = graph_of(data.name, data.row_normalize)
    names = "num_chunks", "method", "parts_per_chunk", "seed"
    parts: Any = {name: getattr(partition, name) for name in names}
    return assign(graph.indptr, graph.indices, **parts).chunk_id


def read(path: Path) -> list[dict[str, Any]]:
    """Finished cells."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def say(text: str) -> None:
    """One line of output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
