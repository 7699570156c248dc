"""What historical embeddings cost in accuracy and in epochs: variants of the method, side by side.

    python benchmarks/convergence.py --data ../shared/data --graphs cora pubmed --seeds 0 1 2
    python benchmarks/convergence.py --report benchmarks/results/convergence.md

A cell is one training run: (graph, model, chunks, variant, seed). All variants of a seed have the
same initial weights and dropout masks, so differences are paired. The numbers of a run do not
depend on the number of stages, so a cell runs in this process on one rank. Each finished cell is a
line of ``cells.jsonl`` in ``--work``; cells that are there are not run again, and ``--limit-s``
starts no new cell after that time, so a study can be made in slices.

``exact`` is C = 1: exact full-graph training by the same code. The gradient of every
variant is compared with the exact one at the same weights and dropout masks in some epochs.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from convergence_cases import GRAPHS, MODELS, TUNED, VARIANTS  # noqa: E402
from convergence_table import draw, report  # noqa: E402
from layerwise import Idea, Layerwise, idea_of, whole_run  # noqa: E402
from torch import Tensor  # noqa: E402

from gnnpipe import chunk  # noqa: E402
from gnnpipe.config import Config, from_dict  # noqa: E402
from gnnpipe.configured import model_layers  # noqa: E402
from gnnpipe.datasets import load_graph  # noqa: E402
from gnnpipe.graph import Graph  # noqa: E402
from gnnpipe.runs import PipelineRun  # noqa: E402
from gnnpipe.shapes import gathers  # noqa: E402
from gnnpipe.sources import merge  # noqa: E402
from gnnpipe.world import World  # noqa: E402
from partition import assign  # noqa: E402

COMPARED = (1, 2, 5, 10, 20, 50, 100)
"""Epochs in which gradients are compared with the exact ones."""


class Cell(NamedTuple):
    """One run of the study."""

    graph: str
    model: str
    layers: int
    hidden: int
    epochs: int
    chunks: int
    variant: str
    seed: int


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then reports."""
    options = parse(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "cells.jsonl"
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # As a run does.
    start_s = time.monotonic()
    done = {tuple(cell["cell"]) for cell in read(path)}
    for cell in cells(options) if options.report is None else ():
        if tuple(cell) in done or time.monotonic() - start_s > options.limit_s:
            continue
        result = {"cell": list(cell), **run_cell(cell, options)}
        gc.collect()  # A run is a circle of references; of a large graph two do not fit.
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        say(f"{cell} test {result['test']} val {result['val']} in {result['cpu_s']:.0f} s")
    if options.report is not None:
        options.report.write_text(report(read(path)), encoding="utf-8")
        if options.plots is not None:
            draw(read(path), options.plots)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of .npz files")
    add("--work", type=Path, default=ROOT / "runs/convergence", help="keeps finished cells")
    add("--graphs", nargs="+", default=["cora"], choices=list(GRAPHS))
    add("--models", nargs="+", default=["gcnii"])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--chunks", nargs="+", type=int, default=[32])
    add("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    add("--layers", type=int, default=32)
    add("--hidden", type=int, default=64)
    add("--epochs", type=int, help="instead of the graph's own number")
    add("--eval-every", type=int, default=2)
    add("--threads", type=int, default=1)
    add("--limit-s", type=float, default=math.inf, help="start no cell after this time")
    add("--report", type=Path, help="write the tables of all finished cells, run nothing")
    add("--plots", type=Path, help="with --report: a folder for curves of each graph and model")
    return parser.parse_args(argv)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """All cells asked for; seed by seed, so that a slice compares variants."""
    for graph in options.graphs:
        for model in options.models:
            training: Any = merge(GRAPHS[graph], TUNED.get((graph, model), {}))["training"]
            epochs = options.epochs or training["epochs"]
            for seed in options.seeds:
                plain = Cell(
                    graph, model, options.layers, options.hidden, epochs, 1, "exact", seed
                )
                if "exact" in options.variants:
                    yield plain
                for chunks in options.chunks:
                    for variant in options.variants:
                        if variant != "exact":
                            yield plain._replace(chunks=chunks, variant=variant)


def config_of(cell: Cell, options: argparse.Namespace) -> Config:
    """The run of a cell."""
    values: dict[str, Any] = {
        "seed": cell.seed,
        "data": {"name": str(options.data / f"{cell.graph}.npz")},
        "partition": {"num_chunks": cell.chunks},
        "model": {
            "name": cell.model,
            "num_layers": cell.layers,
            "hidden_channels": cell.hidden,
        },
    }
    variant = {key: part for key, part in VARIANTS[cell.variant].items() if key != "idea"}
    tuned = TUNED.get((cell.graph, cell.model), {})
    for more in (GRAPHS[cell.graph], MODELS.get(cell.model, {}), tuned, variant):
        values = merge(values, more)
    return from_dict(merge(values, {"training": {"epochs": cell.epochs}}))


def run_cell(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Trains once; validation curve, gradient bias and staleness on the way."""
    config = config_of(cell, options)
    graph = graph_of(config)
    layerwise = start(config, graph, idea_of(config, VARIANTS[cell.variant].get("idea", {})))
    is_compared_at_all = cell.chunks > 1 and isinstance(layerwise, Layerwise)
    plain = whole_run(config, graph) if is_compared_at_all else None
    curve, losses, bias, drift = [], [], {}, {}
    train_s = 0.0
    for epoch in range(1, cell.epochs + 1):
        is_compared = epoch in COMPARED
        wanted = exact_gradients(plain, layerwise.run, epoch) if plain and is_compared else None
        start_s = time.process_time()
        losses.append(layerwise.train_epoch(epoch))
        train_s += time.process_time() - start_s
        if is_compared:
            drift[epoch] = [round(x, 4) for x in layerwise.staleness()]
        if wanted is not None:
            bias[epoch] = compare(gradients(layerwise.run), wanted)
        if epoch % options.eval_every == 0 or epoch == cell.epochs:
            figures = layerwise.evaluate()
            curve.append((epoch, figures["val"], figures["test"]))
    best = max(curve, key=lambda point: point[1] or 0.0)
    return {
        "val": best[1],
        "test": best[2],
        "best_epoch": best[0],
        "loss": losses[-1],
        "losses": [round(loss, 4) for loss in losses],
        "curve": curve,
        "bias": bias,
        "drift": drift,
        "cpu_s": train_s,
    }


_GRAPHS: dict[tuple[Any, ...], Graph] = {}


def graph_of(config: Config) -> Graph:
    """The graph, loaded once."""
    data = config.data
    key = (data.name, data.features, data.row_normalize)
    if key not in _GRAPHS:
        _GRAPHS[key] = load_graph(
            data.name,
            root=None,
            split=data.split,
            undirected=data.undirected,
            features=data.features,
            row_normalize=data.row_normalize,
        )
    return _GRAPHS[key]


@cache
def _chunk_id(name: str, num_chunks: int, method: str) -> Any:
    graph = next(graph for key, graph in _GRAPHS.items() if key[0] == name)
    parts: dict[str, Any] = {"num_chunks": num_chunks, "num_ways": 1, "method": method, "seed": 0}
    return assign(graph.indptr, graph.indices, **parts)[0]


class Chunked:
    """The pipeline itself, chunk by chunk: where the shortcut by layers has nothing to save
    (exact training), or does not know how (several steps in an epoch, layers that
    gather from histories that are not plain, or moved)."""

    def __init__(self, config: Config, graph: Graph, chunk_id: Any) -> None:
        ways = np.zeros_like(chunk_id)
        chunked = chunk.cut(graph, chunk_id, ways, num_ways=1, method="file", seed=0)
        world = World(0, 1, device=torch.device("cpu"), store=None)
        layers = model_layers(config, chunked)
        self.run = PipelineRun(config, chunked, world=world, layers=layers)
        self.run.warm_start()
        self.train_epoch, self.evaluate = self.run.train_epoch, self.run.evaluate

    def staleness(self) -> list[float]:
        """Not measured."""
        return []


def start(config: Config, graph: Graph, idea: Idea) -> Layerwise | Chunked:
    """The run of a variant; every seed has the same chunks."""
    wanted = config.partition
    chunk_id = _chunk_id(config.data.name, wanted.num_chunks, wanted.method)
    sums = all(not gathers(layer.operator) for layer in model_layers(config, graph))
    knows = sums or idea == Idea()
    if wanted.num_chunks == 1 or config.training.steps_per_epoch > 1 or not knows:
        return Chunked(config, graph, chunk_id)
    return Layerwise(config, graph, chunk_id, idea=idea)


def gradients(run: PipelineRun) -> list[Tensor]:
    """Of each layer with weights, as one vector."""
    found = []
    for _, stage in sorted(run.engine.stages.items()):
        for local in stage.layers:
            parts = [p.grad.flatten() for p in local.layer.parameters() if p.grad is not None]
            if parts:
                found.append(torch.cat(parts).double())
    return found


def exact_gradients(plain: PipelineRun, run: PipelineRun, epoch: int) -> list[Tensor]:
    """Of full-graph training at a run's weights, with the epoch's dropout masks."""
    weights = run.weights()
    assert weights is not None
    plain.load_weights(weights)
    for _, stage in plain.engine.stages.items():
        for parameter in stage.parameters:
            parameter.grad = None
    plain.engine.train_step(epoch, [0])
    return [gradient.clone() for gradient in gradients(plain)]


def compare(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, list[float]]:
    """Cosine and ratio of norms by layer, and of all together (last)."""
    pairs = [*zip(found, wanted, strict=True), (torch.cat(list(found)), torch.cat(list(wanted)))]
    cosine = [float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in pairs]
    ratio = [float(a.norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]
    return {"cosine": [round(x, 4) for x in cosine], "ratio": [round(x, 4) for x in ratio]}


def read(path: Path) -> list[dict[str, Any]]:
    """Finished cells."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
