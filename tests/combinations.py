"""Trains a table of configurations in a process pool and reads what they left."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from process_pool import Job, ProcessPool
from torch import Tensor

from gnnpipe import chunk
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.config import Config, load_config
from gnnpipe.datasets import load_graph
from gnnpipe.graph import Graph
from gnnpipe.metrics import read_metrics
from gnnpipe.reference_run import ReferenceRun
from gnnpipe.trainer import Trainer
from gnnpipe.weights import load_weights
from partition import assign

COMMON = ("run.tensorboard=false", "run.threads=1", "run.timeout_s=60", "run.log_every=1000")


class Result(NamedTuple):
    """What one run computed."""

    losses: list[float]
    """One per epoch."""
    accuracy: list[Any]
    """One per evaluation."""
    comm_bytes: list[dict[str, int]]
    """One per epoch, by kind, all ranks together."""
    weights: dict[str, Tensor]
    """Of the last epoch."""
    summary: dict[str, Any]


def train(overrides: Sequence[str]) -> None:
    """A job of the pool: one rank of a run."""
    Trainer(load_config(None, overrides)).fit()


def train_all(
    pool: ProcessPool, directory: Path, table: Mapping[str, Sequence[str]]
) -> dict[str, Result]:
    """Trains every configuration of a table.

    Args:
        pool: where.
        directory: gets a run directory for each.
        table: name to overrides.
    """
    jobs = []
    for name, overrides in table.items():
        own = [*COMMON, *overrides, f"run.dir={directory / name}"]
        num_ranks = load_config(None, own).world_size
        jobs.append(Job("combinations:train", num_ranks, {"overrides": own}))
    pool.run(jobs)
    return {name: read_run(directory / name) for name in table}


def read_run(directory: Path) -> Result:
    """Reads a finished run directory."""
    records = read_metrics(directory / "metrics.jsonl")
    assert [record["epoch"] for record in records] == list(range(1, len(records) + 1))
    return Result(
        losses=[record["loss"] for record in records],
        accuracy=[record["accuracy"] for record in records if "accuracy" in record],
        comm_bytes=[record["comm_bytes"] for record in records],
        weights=load_weights(directory / "weights" / "last.safetensors")[0],
        summary=json.loads((directory / "summary.json").read_text()),
    )


def reference_run(overrides: Sequence[str]) -> Result:
    """The plain full-graph loop on the same configuration, in this process."""
    config = load_config(None, [*COMMON, *overrides])
    run = ReferenceRun(config, load_graph(config.data.name), device=torch.device("cpu"))
    losses, accuracy = [], []
    for epoch in range(1, config.training.epochs + 1):
        losses.append(run.train_epoch(epoch))
        if is_evaluated(config, epoch):
            accuracy.append(run.evaluate())
    return Result(losses, accuracy, [], run.weights(), {})


def is_evaluated(config: Config, epoch: int) -> bool:
    return epoch % config.training.eval_every == 0 or epoch == config.training.epochs


def differing(one: Result, other: Result) -> list[str]:
    """Names of everything that is not equal bit for bit."""
    assert one.weights.keys() == other.weights.keys()
    names = [name for name in ("losses", "accuracy") if getattr(one, name) != getattr(other, name)]
    weights = [(name, tensor, other.weights[name]) for name, tensor in one.weights.items()]
    return names + [name for name, mine, its in weights if not torch.equal(mine, its)]


def largest_difference(one: Result, other: Result) -> float:
    """Largest difference of a loss or a weight."""
    assert one.weights.keys() == other.weights.keys()
    losses = (torch.tensor(run.losses, dtype=torch.float64) for run in (one, other))
    pairs = [tuple(losses), *((one.weights[name], other.weights[name]) for name in one.weights)]
    return max(float((a - b).abs().max()) for a, b in pairs)


def write_npz(path: Path, edges: Iterable[tuple[int, int]], *, num_nodes: int) -> Graph:
    """Writes a graph with random features and three classes; every second node trains.

    Args:
        path: the ``.npz`` file.
        edges: source and target of each edge.
        num_nodes: number of nodes.
    """
    rng, node = np.random.default_rng(num_nodes), np.arange(num_nodes)
    np.savez(
        path,
        edge_index=np.array(list(edges), dtype=np.int64).reshape(-1, 2).T,
        x=rng.standard_normal((num_nodes, 5)).astype(np.float32),
        y=rng.integers(0, 3, num_nodes),
        num_classes=3,
        train_mask=node % 2 == 0,
        val_mask=node % 4 == 1,
        test_mask=node % 4 == 3,
    )
    return load_graph(str(path))


def both_ways(edges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Every edge and its reverse, each once."""
    return sorted({pair for a, b in edges for pair in ((a, b), (b, a))})


def save_partition(
    graph: Graph, directory: Path, *, num_chunks: int, num_ways: int, method: str = "bfs"
) -> ChunkedGraph:
    """Cuts a graph and writes it."""
    assignment = assign(
        graph.indptr, graph.indices, num_chunks=num_chunks, num_ways=num_ways, method=method
    )
    chunked = chunk.cut(graph, *assignment, num_ways=num_ways, method=method, seed=0)
    chunk.save(chunked, directory)
    return chunked
