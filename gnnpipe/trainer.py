"""The main flow: find the graph, cut it, train epoch by epoch, evaluate, log, save."""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numba
import torch

from gnnpipe import chunk
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.comm import KINDS
from gnnpipe.config import Config, to_yaml
from gnnpipe.datasets import load_graph
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.metrics import EpochRecord
from gnnpipe.models.layer import Layer
from gnnpipe.preflight import resolve_threads
from gnnpipe.run_directory import WEIGHTS_DIR, prepare_run_directory, summary_text
from gnnpipe.runs import WAIT_KINDS, PipelineRun, ReferenceRun, Run, check_task, model_layers
from gnnpipe.telemetry import RunLog
from gnnpipe.weights import save_weights
from gnnpipe.world import join
from partition import PartitionError, assign

PARTITION_DIR = "partition"
LIBRARIES = ("gnnpipe", "torch", "numpy", "numba", "pymetis")

EpochEnd = Callable[[EpochRecord], None]

logger = logging.getLogger("gnnpipe")


class Trainer:
    """Trains one model as its configuration says; every rank of a run makes one.

    Args:
        config: the run.
        graph: trains on this graph instead of ``config.data``; needed on rank 0 only.
        layers: trains these layers, the same on every rank, instead of ``config.model``.
        on_epoch_end: called on rank 0 with every epoch's figures.
    """

    def __init__(
        self,
        config: Config,
        *,
        graph: Graph | None = None,
        layers: Sequence[Layer] | None = None,
        on_epoch_end: Sequence[EpochEnd] = (),
    ) -> None:
        self.config = config
        self._graph = graph
        self._layers = layers
        self._on_epoch_end = on_epoch_end

    def fit(self) -> dict[str, Any]:
        """Trains and returns the summary; on ranks other than 0 it is empty.

        Raises:
            UserError: what the user can mend, on every rank.
            PeerError: another rank failed.
        """
        config = self.config
        with join(device=config.device, timeout_s=config.run.timeout_s) as world:
            threads = set_threads(config, world.world_size)
            with world.failing_together():
                outcome = json.loads(world.first("setup", self._set_up))
                if outcome["summary"] is not None:
                    return dict(outcome["summary"]) if world.rank == 0 else {}
                chunked = chunk.load(outcome["partition"])
                layers = self._layers or model_layers(config, chunked)
                run = PipelineRun(config, chunked, world=world, layers=layers)
                run.warm_start()
                return fit_epochs(run, config, threads=threads, on_epoch_end=self._on_epoch_end)

    def _set_up(self) -> str:
        """Rank 0: claims the run directory, loads the graph, cuts it where nobody has."""
        config = self.config
        summary = prepare_run_directory(config.run.dir, to_yaml(config))
        if summary is not None:
            logger.info("%s holds this very run, finished", config.run.dir)
            return json.dumps({"summary": summary})
        graph = self._graph or load_data(config)
        check_task(graph)
        path = config.partition.path
        if path is None:
            path = str(Path(config.run.dir).resolve() / PARTITION_DIR)
            chunk.save(cut_graph(graph, config), path, overwrite=True)
        chunked = chunk.load(path)
        check_partition(chunked, config)
        chunk.check_belongs(chunked, graph)
        return json.dumps({"summary": None, "partition": path})


def train(config: Config) -> None:
    """``python -m gnnpipe train``: trains and says where everything is."""
    start_logging()
    summary = Trainer(config).fit()
    if summary:
        sys.stdout.write(summary_text(summary, config.run.dir) + "\n")


def run_reference(config: Config) -> None:
    """``python -m gnnpipe reference``: the plain full-graph loop, same run directory."""
    start_logging()
    with join(device=config.device, timeout_s=config.run.timeout_s) as world:
        threads = set_threads(config, 1)
        summary = prepare_run_directory(config.run.dir, to_yaml(config))
        if summary is None:
            graph = load_data(config)
            check_task(graph)
            run = ReferenceRun(config, graph, device=world.device)
            summary = fit_epochs(run, config, threads=threads)
    sys.stdout.write(summary_text(summary, config.run.dir) + "\n")


def fit_epochs(
    run: Run, config: Config, *, threads: int, on_epoch_end: Sequence[EpochEnd] = ()
) -> dict[str, Any]:
    """The epoch loop: one optimizer step, then now and then an evaluation, every epoch logged.

    Args:
        run: this rank's part of the run.
        config: its configuration.
        threads: CPU threads of each rank, for the summary.
        on_epoch_end: called on rank 0 with every epoch's figures.

    Returns:
        The summary; on ranks other than 0 it is empty.
    """
    log = _open_log(config) if run.rank == 0 else None
    with log or nullcontext():
        best_val = -math.inf
        for epoch in range(1, config.training.epochs + 1):
            record, val = _epoch(run, config, epoch)
            if log and record:
                log.epoch(record)
                for callback in on_epoch_end:
                    callback(record)
            if val > best_val:
                best_val = val
                _save(run, config, "best", epoch)
        _save(run, config, "last", config.training.epochs)
        return log.finish(_facts(run, threads)) if log else {}


def set_threads(config: Config, world_size: int) -> int:
    """Gives torch and numba the configured number of threads, and returns it."""
    threads = resolve_threads(config, world_size)
    # numba cannot have more than it was started with.
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    torch.set_num_threads(threads)
    return threads


def load_data(config: Config) -> Graph:
    """Loads the configured graph."""
    data = config.data
    logger.info("loading %s", data.name)
    return load_graph(
        data.name,
        root=data.root,
        split=data.split,
        undirected=data.undirected,
        features=data.features,
        row_normalize=data.row_normalize,
    )


def cut_graph(graph: Graph, config: Config) -> ChunkedGraph:
    """Cuts a graph into chunks and ways as configured."""
    wanted, num_ways = config.partition, config.parallel.num_ways
    logger.info(
        "cutting %s nodes into %d chunks by %s",
        f"{graph.num_nodes:,}",
        wanted.num_chunks,
        wanted.method,
    )
    try:
        assignment = assign(
            graph.indptr,
            graph.indices,
            num_chunks=wanted.num_chunks,
            num_ways=num_ways,
            method=wanted.method,
            seed=wanted.seed,
            file=wanted.file,
        )
    except PartitionError as error:
        raise UserError(str(error)) from error
    ids = (assignment.chunk_id, assignment.way_id)
    return chunk.cut(graph, *ids, num_ways=num_ways, method=wanted.method, seed=wanted.seed)


def check_partition(chunked: ChunkedGraph, config: Config) -> None:
    """Checks that a partition is the one that the configuration describes."""
    wanted, ways = config.partition.num_chunks, config.parallel.num_ways
    if chunked.num_chunks != wanted:
        raise UserError(
            f"`partition.num_chunks` (={wanted}) must equal the chunks of the partition "
            f"(={chunked.num_chunks}); set partition.num_chunks={chunked.num_chunks} or cut again"
        )
    if chunked.num_ways % ways:
        logger.warning(
            "the partition has %d way(s), not a multiple of the %d asked for: chunks are split by"
            " rows, which makes a larger halo; cut again with --num-ways %d",
            chunked.num_ways,
            ways,
            ways,
        )


def start_logging() -> None:
    """Sends progress to standard error, plainly."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


def _epoch(run: Run, config: Config, epoch: int) -> tuple[EpochRecord | None, float]:
    """One epoch on this rank; the record on rank 0, the validation figure everywhere."""
    is_evaluated = epoch % config.training.eval_every == 0 or epoch == config.training.epochs
    start = time.perf_counter()
    loss = run.train_epoch(epoch, is_measured=is_evaluated)
    epoch_s = time.perf_counter() - start
    if not math.isfinite(loss):
        raise ArithmeticError(
            f"the loss became {loss} in epoch {epoch}; try a smaller training.lr"
        )
    usage = run.usage()
    accuracy, staleness, evaluation_s = None, None, None
    if is_evaluated:
        start = time.perf_counter()
        accuracy, staleness = run.evaluate(), run.staleness()
        evaluation_s = time.perf_counter() - start
    evaluation_bytes = run.usage().sent_bytes[KINDS.index("evaluation")]
    own = [loss, epoch_s, peak_memory_bytes(), run.table_bytes, evaluation_bytes]
    values = torch.tensor([*own, *usage.sent_bytes, *usage.wait_s], dtype=torch.float64)
    parts = run.gather(values)
    val = -math.inf if accuracy is None or accuracy["val"] is None else accuracy["val"]
    if not parts:
        return None, val
    record = _record(epoch, torch.stack(parts))
    return replace(record, accuracy=accuracy, staleness=staleness, evaluation_s=evaluation_s), val


def _record(epoch: int, parts: torch.Tensor) -> EpochRecord:
    """Puts the figures of all ranks together, ``parts [ranks, figures]``."""
    loss, own_s, peak, table, evaluation_bytes = (column.tolist() for column in parts.T[:5])
    sent = parts[:, 5 : 5 + len(KINDS)].sum(dim=0).long().tolist()
    waits = parts[:, 5 + len(KINDS) :]
    epoch_s = max(own_s)
    compute_s = (parts[:, 1] - waits.sum(dim=1)).tolist()
    sent_bytes = dict(zip(KINDS, sent, strict=True))
    return EpochRecord(
        epoch=epoch,
        loss=sum(loss),
        epoch_s=epoch_s,
        bubble_fraction=max(0.0, 1.0 - sum(compute_s) / (len(own_s) * epoch_s)),
        comm_bytes=sent_bytes | {"evaluation": int(sum(evaluation_bytes))},
        peak_memory_bytes=[int(value) for value in peak],
        table_bytes=[int(value) for value in table],
        compute_s=compute_s,
        wait_s=dict(zip(WAIT_KINDS, waits.T.tolist(), strict=True)),
    )


def peak_memory_bytes() -> int:
    """Most memory that this process has held: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


def _open_log(config: Config) -> RunLog:
    return RunLog(
        config.run.dir,
        config_text=to_yaml(config),
        epochs=config.training.epochs,
        log_every=config.run.log_every,
        tensorboard=config.run.tensorboard,
    )


def _save(run: Run, config: Config, name: str, epoch: int) -> None:
    """Every rank takes part; rank 0 writes the file."""
    tensors = run.weights()
    if tensors is not None:
        path = Path(config.run.dir) / WEIGHTS_DIR / f"{name}.safetensors"
        save_weights(path, tensors, {"epoch": str(epoch), "model": config.model.name})


def _facts(run: Run, threads: int) -> dict[str, Any]:
    return {
        "num_parameters": run.num_parameters,
        "world_size": run.world_size,
        "threads": threads,
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
