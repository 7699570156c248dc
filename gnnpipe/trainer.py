"""The main flow: find the graph, cut it, train epoch by epoch, evaluate, log, save."""

import json
import logging
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numba
import torch
from torch import nn

from gnnpipe import checkpoint, chunk
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.comm import KINDS
from gnnpipe.config import Config, to_dict, to_yaml
from gnnpipe.costs import LATENCY_US, LOCAL_GBPS, Links
from gnnpipe.datasets import from_pyg, load_graph
from gnnpipe.errors import Stopped, UserError
from gnnpipe.graph import Graph
from gnnpipe.metrics import EpochRecord, time_shares
from gnnpipe.models.foreign import EdgeFacts, adapt
from gnnpipe.models.layer import Layer
from gnnpipe.planner import Setting
from gnnpipe.planning import applied, auto_plan
from gnnpipe.preflight import check_world_size, resolve_threads
from gnnpipe.resume import Start, check_same, checked_threads, find_start
from gnnpipe.run_directory import PARTITION_DIR, TRACE_FILE, WEIGHTS_DIR, flatten, summary_text
from gnnpipe.runs import (
    WAIT_KINDS,
    PipelineRun,
    ReferenceRun,
    Run,
    configured_task,
    model_layers,
)
from gnnpipe.saving import Saver
from gnnpipe.shards import Shards
from gnnpipe.stopping import StopRequest, stop_requests
from gnnpipe.telemetry import Done, RunLog
from gnnpipe.weights import save_weights
from gnnpipe.world import World, join
from partition import PartitionError, assign

LIBRARIES = ("gnnpipe", "torch", "numpy", "numba", "pymetis")

EpochEnd = Callable[[EpochRecord], None]

logger = logging.getLogger("gnnpipe")


class Trainer:
    """Trains one model as its configuration says; every rank of a run makes one.

    Args:
        config: the run.
        graph: trains on this ``Graph`` or PyG ``Data`` instead of ``config.data``; needed on
            rank 0 only.
        layers: trains these instead of ``config.model``, the same on every rank: any torch
            modules that map rows, convolutions of torch_geometric, layers of the pipeline.
        on_epoch_end: called on rank 0 with every epoch's figures.
    """

    def __init__(
        self,
        config: Config,
        *,
        graph: Any = None,  # Graph, or PyG's Data, which has no types
        layers: Sequence[nn.Module] | None = None,
        on_epoch_end: Sequence[EpochEnd] = (),
    ) -> None:
        self.config = config
        self._graph = graph if graph is None or isinstance(graph, Graph) else from_pyg(graph)
        self._layers = layers
        self._on_epoch_end = on_epoch_end

    def fit(self) -> dict[str, Any]:
        """Trains and returns the summary; on ranks other than 0 it is empty.

        Raises:
            UserError: what the user can mend, on every rank.
            PeerError: another rank failed.
            Stopped: SIGTERM or Ctrl-C asked for it; a checkpoint has been written.
        """
        config = self.config
        with (
            stop_requests(is_on=config.checkpoint.every > 0) as request,
            join(device=config.device, timeout_s=config.run.timeout_s) as world,
            world.failing_together(),
        ):
            outcome = self._fit(world, request)
        return finished(outcome)

    def _fit(self, world: World, request: StopRequest) -> "Outcome":
        """Everything between joining and leaving the other processes."""
        if self.config.parallel.plan == "auto":
            self.config = self._planned(world)
        config = self.config
        check_world_size(config, world.world_size)
        start = Start(**json.loads(world.first("setup", self._set_up)))
        if start.summary is not None:
            return Outcome(start.summary if world.rank == 0 else {})
        assert start.partition is not None
        threads = set_threads(config, world.world_size, start)
        chunked = chunk.load(start.partition)
        layers: Sequence[Layer] = model_layers(config, chunked)
        if self._layers is not None:
            layers = adapted(self._layers, config, chunked)
        run = PipelineRun(config, chunked, world=world, layers=layers)
        if start.path is None:
            run.warm_start()
        facts = {key: chunked.manifest[key] for key in ("graph_fingerprint", "chunk_id_sha256")}
        plan = LoopPlan(config, start, threads, facts, self._on_epoch_end)
        return fit_epochs(run, plan, request)

    def _planned(self, world: World) -> Config:
        """Rank 0 measures this machine and chooses how the ranks there are shall work."""

        def plan() -> str:
            graph = self._graph or load_data(self.config)
            links = Links(LOCAL_GBPS, LATENCY_US, LOCAL_GBPS, world.world_size)
            best = auto_plan(self.config, graph, world.world_size, links)
            logger.info("planned %s", best.setting)
            return json.dumps(best.setting)

        return applied(self.config, Setting(*json.loads(world.first("plan", plan))))

    def _set_up(self) -> str:
        """Rank 0: claims the run directory, loads the graph, cuts it where nobody has."""
        config = self.config
        start = find_start(config)
        if start.summary is not None:
            return start.to_json()
        path = config.partition.path or start.partition
        graph = self._graph
        if graph is None and start.partition is None:
            graph = load_data(config)
        if path is None:
            assert graph is not None
            configured_task(config, graph)
            path = str(Path(config.run.dir).resolve() / PARTITION_DIR)
            chunk.save(cut_graph(graph, config), path, overwrite=True)
        chunked = chunk.load(path)
        configured_task(config, chunked)
        check_partition(chunked, config)
        if graph is not None:
            chunk.check_belongs(chunked, graph)
        if start.path is not None:
            check_same(start.state, chunked.manifest)
        return start._replace(partition=path).to_json()


def train(config: Config) -> None:
    """``python -m gnnpipe train``: trains and says where everything is."""
    start_logging()
    summary = Trainer(config).fit()
    if summary:
        sys.stdout.write(summary_text(summary, config.run.dir) + "\n")


def run_reference(config: Config) -> None:
    """``python -m gnnpipe reference``: the plain full-graph loop, same run directory."""
    start_logging()
    with (
        stop_requests(is_on=config.checkpoint.every > 0) as request,
        join(device=config.device, timeout_s=config.run.timeout_s) as world,
    ):
        outcome = _fit_reference(config, world, request)
    sys.stdout.write(summary_text(finished(outcome), config.run.dir) + "\n")


def _fit_reference(config: Config, world: World, request: StopRequest) -> "Outcome":
    start = find_start(config)
    if start.summary is not None:
        return Outcome(start.summary)
    threads = set_threads(config, 1, start)
    graph = load_data(config)
    configured_task(config, graph)
    facts = {"graph_fingerprint": graph.fingerprint(), "chunk_id_sha256": None}
    if start.path is not None:
        check_same(start.state, facts)
    run = ReferenceRun(config, graph, device=world.device)
    return fit_epochs(run, LoopPlan(config, start, threads, facts), request)


class Outcome(NamedTuple):
    """How the epoch loop ended."""

    summary: dict[str, Any]
    """On rank 0, of a finished run."""
    stopped: Stopped | None = None
    """Why it ended early."""


def finished(outcome: Outcome) -> dict[str, Any]:
    """The summary of a run that was not stopped."""
    if outcome.stopped is not None:
        raise outcome.stopped
    return outcome.summary


class LoopPlan(NamedTuple):
    """What the epoch loop has to know besides the run itself."""

    config: Config
    start: Start
    threads: int
    """CPU threads of each rank."""
    facts: Mapping[str, Any]
    """What a checkpoint must have in common with the run."""
    on_epoch_end: Sequence[EpochEnd] = ()
    """Called on rank 0 with every epoch's figures."""


def fit_epochs(run: Run, plan: LoopPlan, request: StopRequest) -> Outcome:
    """The epoch loop: one optimizer step, then now and then an evaluation, every epoch logged.

    Args:
        run: this rank's part of the run.
        plan: where to start and what to do.
        request: tells when somebody wants the run to stop.
    """
    config, start = plan.config, plan.start
    every, epochs = config.checkpoint.every, config.training.epochs
    best_val = _restore(run, start)
    saver = Saver(
        run,
        config.run.dir,
        keep=config.checkpoint.keep,
        histories=config.checkpoint.histories == "save",
    )
    log = _open_log(config, start) if run.rank == 0 else None
    with log or nullcontext():
        for epoch in range(start.epoch + 1, epochs + 1):
            record, val = _epoch(run, config, epoch)
            if log and record:
                log.epoch(record)
                for callback in plan.on_epoch_end:
                    callback(record)
            if val > best_val:
                best_val = val
                _save(run, config, "best", epoch)
            stopper = _stopper(run, request) if every else None
            if every and (epoch % every == 0 or epoch == epochs or stopper):
                if log:
                    log.sync()
                saver.save(epoch, _state(plan, log, val=val, best_val=best_val))
            if stopper and epoch < epochs:
                return Outcome({}, Stopped(stopper, epoch))
        _save(run, config, "last", epochs)
        if log and config.run.trace:
            run.write_trace(Path(config.run.dir) / TRACE_FILE)
        return Outcome(log.finish(_facts(run, plan.threads)) if log else {})


def _restore(run: Run, start: Start) -> float:
    """Loads the checkpoint to start from, if any; returns the best validation figure so far."""
    if start.path is None:
        return -math.inf
    with Shards(checkpoint.shard_paths(start.path)) as shards:
        run.restore(shards)
    best_val = start.state["best_val"]
    return -math.inf if best_val is None else float(best_val)


def _state(plan: LoopPlan, log: RunLog | None, *, val: float, best_val: float) -> dict[str, Any]:
    """What a checkpoint holds besides tensors; only rank 0's is written."""
    finite = {"val": val, "best_val": best_val}
    return {
        **{name: figure if math.isfinite(figure) else None for name, figure in finite.items()},
        **{key: plan.facts[key] for key in ("graph_fingerprint", "chunk_id_sha256")},
        "wall_s": log.wall_s if log else 0.0,
        "threads": plan.threads,
        "config": flatten(to_dict(plan.config)),
    }


def _stopper(run: Run, request: StopRequest) -> str | None:
    """The signal that any rank was asked to stop with; all ranks find the same."""
    asked = torch.zeros(65, dtype=torch.int64)
    if request.signal is not None:
        asked[request.signal] = 1
    numbers = run.total(asked).nonzero().flatten().tolist()
    return signal.Signals(numbers[0]).name if numbers else None


def set_threads(config: Config, world_size: int, start: Start | None = None) -> int:
    """Gives torch and numba the configured number of threads, and returns it.

    Args:
        config: the run.
        world_size: number of ranks.
        start: where the run starts; its checkpoint was computed with some number of threads.
    """
    threads = resolve_threads(config, world_size)
    if start is not None:
        threads = checked_threads(start.state, config, threads)
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


def adapted(
    modules: Sequence[nn.Module], config: Config, chunked: ChunkedGraph
) -> Sequence[Layer]:
    """A user's own list of modules as layers."""
    facts = EdgeFacts.of(chunked)
    layers = adapt(modules, in_channels=chunked.num_features, facts=facts)
    width, sizes = layers[-1].out_channels, config.parallel.layers_per_stage
    if width != chunked.num_classes:
        raise UserError(
            f"`layers[-1]` must give {chunked.num_classes} scores for each node, not {width}; "
            "change its width"
        )
    if sizes is not None and sum(sizes) != len(layers):
        raise UserError(
            f"`parallel.layers_per_stage` (={list(sizes)}) must add up to the {len(layers)} "
            "layers that the modules make; or set it to null"
        )
    return layers


def start_logging() -> None:
    """Sends progress to standard error, plainly."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


def _epoch(run: Run, config: Config, epoch: int) -> tuple[EpochRecord | None, float]:
    """One epoch on this rank; the record on rank 0, the validation figure everywhere."""
    is_evaluated = epoch % config.training.eval_every == 0 or epoch == config.training.epochs
    run.usage()  # What was waited for between two epochs, or before the first, is not this one's.
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
    record = _record(epoch, torch.stack(parts), run.transfer_s())
    return replace(record, accuracy=accuracy, staleness=staleness, evaluation_s=evaluation_s), val


def _record(epoch: int, parts: torch.Tensor, transfer_s: Sequence[float]) -> EpochRecord:
    """Puts the figures of all ranks together, ``parts [ranks, figures]``."""
    loss, own_s, peak, table, evaluation_bytes = (column.tolist() for column in parts.T[:5])
    sent = parts[:, 5 : 5 + len(KINDS)].sum(dim=0).long().tolist()
    waits = parts[:, 5 + len(KINDS) :]
    compute_s = (parts[:, 1] - waits.sum(dim=1)).tolist()
    shares = time_shares(own_s, compute_s, transfer_s)
    sent_bytes = dict(zip(KINDS, sent, strict=True))
    return EpochRecord(
        epoch=epoch,
        loss=sum(loss),
        epoch_s=max(own_s),
        bubble_fraction=shares["wait"] + shares["transfer"],
        time_shares=shares,
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


def _open_log(config: Config, start: Start) -> RunLog:
    done = Done(start.epoch, start.state.get("wall_s", 0.0)) if start.is_begun else None
    return RunLog(
        config.run.dir,
        config_text=to_yaml(config),
        epochs=config.training.epochs,
        log_every=config.run.log_every,
        tensorboard=config.run.tensorboard,
        done=done,
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
        "metric": run.task.metric,
        "world_size": run.world_size,
        "threads": threads,
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
