"""The main flow: find the graph, cut it, make the run, train."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import torch
from torch import nn

from gnnpipe import chunk
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.config import Config
from gnnpipe.configured import configured_task, model_layers
from gnnpipe.console import be_quiet, show_table, working
from gnnpipe.costs import LATENCY_US, LOCAL_GBPS, Links
from gnnpipe.cut_facts import cut_report
from gnnpipe.datasets import from_pyg, load_graph
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.links import link_graph
from gnnpipe.loop import EpochEnd, LoopPlan, Outcome, finished, fit_epochs
from gnnpipe.models.foreign import EdgeFacts, adapt
from gnnpipe.models.layer import Layer
from gnnpipe.planning import applied, auto_plan
from gnnpipe.preflight import check_world_size, resolve_threads
from gnnpipe.reference_run import ReferenceRun
from gnnpipe.resume import Start, check_same, checked_threads, find_start
from gnnpipe.room import Room, check_before_cut, check_room, gpu_room, host_room
from gnnpipe.run_directory import PARTITION_DIR, WHOLE_PARTITION_DIR, summary_text
from gnnpipe.runs import PipelineRun
from gnnpipe.setting import Setting
from gnnpipe.stopping import StopRequest, stop_requests
from gnnpipe.subgraph import training_part
from gnnpipe.world import World, join
from partition import PartitionError, assign

logger = logging.getLogger("gnnpipe")


class Trainer:
    """Trains one model as its configuration says; every rank of a run makes one.

    Args:
        config: the run.
        graph: trains on this ``Graph`` or PyG ``Data`` instead of ``config.data``; needed on
            rank 0 only.
        layers: trains these instead of ``config.model``, the same on every rank: any torch
            modules that map rows, convolutions of torch_geometric, layers of the pipeline.
        on_epoch_end: called on rank 0 with every epoch's figures; one that returns True ends the
            training after this epoch.
        request: by which this program, too, may ask the run to stop.
    """

    def __init__(
        self,
        config: Config,
        *,
        graph: Any = None,  # Graph, or PyG's Data, which has no types
        layers: Sequence[nn.Module] | None = None,
        on_epoch_end: Sequence[EpochEnd] = (),
        request: StopRequest | None = None,
    ) -> None:
        self.config = config
        if graph is not None:
            graph = prepared(graph if isinstance(graph, Graph) else from_pyg(graph), config)
        self._graph: Graph | None = graph
        self._layers = layers
        self._adapted: Sequence[Layer] | None = None
        self._on_epoch_end = on_epoch_end
        self._request = request

    def fit(self) -> dict[str, Any]:
        """Trains and returns the summary; on ranks other than 0 it is empty.

        Raises:
            UserError: what the user can mend, on every rank.
            PeerError: another rank failed.
            Stopped: SIGTERM or Ctrl-C asked for it; a checkpoint has been written.
        """
        config = self.config
        with (
            stop_requests(is_on=config.checkpoint.every > 0, request=self._request) as request,
            join(device=config.device, timeout_s=config.run.timeout_s) as world,
            world.failing_together(),
        ):
            outcome = self._fit(world, request)
        return finished(outcome)

    def _fit(self, world: World, request: StopRequest) -> Outcome:
        """Everything between joining and leaving the other processes."""
        if self.config.parallel.plan == "auto":
            self.config = self._planned(world)
        config = self.config
        check_world_size(config, world.world_size)
        start = Start(**json.loads(world.first("setup", lambda: self._set_up(world))))
        if start.summary is not None:
            return Outcome(start.summary if world.rank == 0 else {})
        assert start.partition is not None
        threads = set_threads(config, world.world_size, start)
        chunked = chunk.load(start.partition)
        layers = self._model(chunked)
        whole = chunk.load(_whole_path(config)) if config.data.inductive else None
        run = PipelineRun(config, chunked, world=world, layers=layers, evaluated_on=whole)
        if start.path is None:
            run.warm_start()
        facts = {key: chunked.manifest[key] for key in ("graph_fingerprint", "chunk_id_sha256")}
        plan = LoopPlan(config, start, threads, facts, self._on_epoch_end)
        return fit_epochs(run, plan, request)

    def _planned(self, world: World) -> Config:
        """Rank 0 measures this machine and chooses how the ranks there are shall work."""

        def plan() -> str:
            graph = self._graph or load_data(self.config)
            graph = training_part(graph) if self.config.data.inductive else graph
            links = Links(LOCAL_GBPS, LATENCY_US, LOCAL_GBPS, world.world_size)
            cores = len(os.sched_getaffinity(0)) if world.device.type == "cpu" else None
            best = auto_plan(self.config, graph, world.world_size, links, cores=cores)
            logger.info("planned %s", best.setting)
            return json.dumps([best.setting, best.sizes])

        setting, sizes = json.loads(world.first("plan", plan))
        return applied(self.config, Setting(*setting), sizes)

    def _model(self, chunked: ChunkedGraph) -> Sequence[Layer]:
        """The configured layers, or the user's own, which are tried and wrapped once."""
        if self._layers is None:
            return model_layers(self.config, chunked)
        if self._adapted is None:
            self._adapted = adapted(self._layers, self.config, chunked)
        return self._adapted

    def _check_before_cut(self, graph: Graph, world: World) -> None:
        """Refuses what no cut of the graph would make fit; a user's own layers need the cut."""
        if self._layers is None:
            config = self.config

            def rebuild(other: Config) -> Sequence[Layer]:
                return model_layers(other, graph)

            check_before_cut(config, graph, _room(world), rebuild=rebuild)

    def _check_room(self, chunked: ChunkedGraph, world: World) -> None:
        """Before anything is made: memory as it will be, on this host or on a GPU."""
        room = _room(world)
        own = self._layers is not None
        rebuild = None if own else lambda config: model_layers(config, chunked)
        check_room(self.config, chunked, self._model(chunked), room, rebuild=rebuild)

    def _set_up(self, world: World) -> str:
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
            part = training_part(graph) if config.data.inductive else graph
            self._check_before_cut(part, world)
            whole = cut_graph(graph, config, num_chunks=1) if config.data.inductive else None
            graph = part
            cut = cut_graph(graph, config)
            self._check_room(cut, world)  # A run that does not fit leaves nothing behind.
            path = str(Path(config.run.dir).resolve() / PARTITION_DIR)
            chunk.save(cut, path, overwrite=True)
            if whole is not None:
                chunk.save(whole, _whole_path(config), overwrite=True)
        chunked = chunk.load(path)
        configured_task(config, chunked)
        check_partition(chunked, config)
        if graph is not None:
            is_part = config.data.inductive and graph is self._graph
            chunk.check_belongs(chunked, training_part(graph) if is_part else graph)
        if start.path is not None:
            check_same(start.state, chunked.manifest)
        if path in (config.partition.path, start.partition):
            self._check_room(chunked, world)
        return start._replace(partition=path).to_json()


def _room(world: World) -> Room:
    """What this rank's host or GPU has left."""
    if world.device.type == "cuda":
        return gpu_room(torch.cuda.mem_get_info(world.device)[0])
    return host_room(world.world_size)


def train(config: Config, *, is_quiet: bool = False) -> None:
    """``python -m gnnpipe train``: trains and says where everything is."""
    start_logging(is_quiet=is_quiet)
    summary = Trainer(config).fit()
    if summary and not is_quiet:
        sys.stdout.write(summary_text(summary, config.run.dir) + "\n")


def run_reference(config: Config, *, is_quiet: bool = False) -> None:
    """``python -m gnnpipe reference``: the plain full-graph loop, same run directory."""
    start_logging(is_quiet=is_quiet)
    with (
        stop_requests(is_on=config.checkpoint.every > 0) as request,
        join(device=config.device, timeout_s=config.run.timeout_s) as world,
    ):
        outcome = _fit_reference(config, world, request)
    summary = finished(outcome)
    if not is_quiet:
        sys.stdout.write(summary_text(summary, config.run.dir) + "\n")


def _fit_reference(config: Config, world: World, request: StopRequest) -> Outcome:
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
    # numba cannot have more than it was started with. It reads the variable again before it
    # compiles, and fails when it finds another number there.
    started_with: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    os.environ["NUMBA_NUM_THREADS"] = str(started_with)
    numba.set_num_threads(min(threads, started_with))
    torch.set_num_threads(threads)
    return threads


def prepared(graph: Graph, config: Config) -> Graph:
    """The graph as the task wants it: link prediction holds out edges, unless pairs are given."""
    if config.task.kind != "link" or graph.pairs is not None:
        return graph
    return link_graph(graph, channels=config.model.hidden_channels)


def load_data(config: Config) -> Graph:
    """Loads the configured graph."""
    data = config.data
    with working(f"loading {data.name}"):
        graph = load_graph(
            data.name,
            root=data.root,
            split=data.split,
            undirected=data.undirected,
            features=data.features,
            row_normalize=data.row_normalize,
        )
        return prepared(graph, config)


def cut_graph(graph: Graph, config: Config, *, num_chunks: int | None = None) -> ChunkedGraph:
    """Cuts a graph into chunks and ways as configured, or into another number of chunks."""
    wanted, num_ways = config.partition, config.parallel.num_ways
    num_chunks = num_chunks or wanted.num_chunks
    nodes = f"{graph.num_nodes:,} nodes"
    with working(f"cutting {nodes} into {num_chunks} chunks by {wanted.method}"):
        try:
            ids = assign(
                graph.indptr,
                graph.indices,
                num_chunks=num_chunks,
                num_ways=num_ways,
                method=wanted.method,
                parts_per_chunk=wanted.parts_per_chunk,
                seed=wanted.seed,
                file=wanted.file,
            )
        except PartitionError as error:
            raise UserError(str(error)) from error
        cut = chunk.cut(graph, *ids, num_ways=num_ways, method=wanted.method, seed=wanted.seed)
    report = cut_report(cut)
    show_table(report, report.splitlines()[-1])
    return cut


def _whole_path(config: Config) -> Path:
    """Where an inductive run keeps the graph that it evaluates on."""
    return Path(config.run.dir).resolve() / WHOLE_PARTITION_DIR


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


def start_logging(*, is_quiet: bool = False) -> None:
    """Sends progress to standard error, plainly; with ``is_quiet`` only warnings."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if is_quiet:
        be_quiet()
