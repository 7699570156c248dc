"""Builds one rank's engine from a chunked graph and a list of layers."""

from collections.abc import Iterator, Sequence
from itertools import pairwise, starmap
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from gnnpipe.cell import Cells, build_cells
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.comm import Comm
from gnnpipe.compensation import Compensation, Stale
from gnnpipe.counter import stream_key
from gnnpipe.engine import Engine, Inputs, cuts_of
from gnnpipe.graph import Graph
from gnnpipe.history import Table
from gnnpipe.kernels import SparseRows
from gnnpipe.kernels.graphs import CudaGraphs
from gnnpipe.losses import Targets
from gnnpipe.models.layer import Layer
from gnnpipe.models.norm import NodeNorm
from gnnpipe.moments import Moments
from gnnpipe.recall import Keeping, LateGradients, Recall
from gnnpipe.schedule import SCHEDULES, ScheduleName, split_layers
from gnnpipe.shapes import gathers
from gnnpipe.shortage import AskingFor
from gnnpipe.stage import LocalLayer, Stage
from gnnpipe.store import private_map
from gnnpipe.strata import Strata, strata_of
from gnnpipe.tasks import SingleLabel, Task
from gnnpipe.way import WayGraph, way_graph


class Plan(NamedTuple):
    """How the engine is to run; plain values from the configuration."""

    seed: int
    bounds: Sequence[int]
    """First layer of each stage and, last, the number of layers."""
    virtual_stages: int
    period: int
    cross_chunk_gradient: float
    steps: int = 1
    """Optimizer steps of an epoch."""
    schedule: ScheduleName = "fill_drain"
    keeping: Keeping = Keeping()
    strata: int = 0
    """Most strata whose mean drift historical rows are moved by; 0 leaves them as they are."""
    late_gradient: float = 0.0
    late_gradient_momentum: float = 0.0
    task: Task | None = None
    """None is single labels without weights."""
    backend: str | None = None
    """What sums over neighbours, ``numba`` or ``torch``; None chooses by the device."""
    replays: bool = False
    """Whether a chunk's kernels are captured once and launched together."""
    precision: str = "fp32"
    """Of dense products in training: ``fp32``, as everything else is computed, or ``bf16``."""
    history_dtype: torch.dtype | None = None
    """Of the tables' values; None is that of everything else."""
    memory: str = "keep"
    """Where what backwards need comes from: ``keep``, ``recompute`` or ``offload``."""
    is_trained: bool = True
    """Whether the engine trains; one that only evaluates holds no tables."""


def initialise(layer: Layer, *, seed: int, index: int, like: Tensor) -> Layer:
    """Gives a layer without storage its initial weights, a function of (seed, index) alone.

    Args:
        layer: a layer on the meta device.
        seed: the run's.
        index: place of the layer in the model.
        like: a tensor that gives dtype and device.
    """
    layer = layer.to_empty(device="cpu").to(like.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(seed, index) >> 1)
        layer.reset_parameters()
    return layer.to(like.device)


def stage_bounds(
    layers: Sequence[Layer],
    graph: ChunkedGraph | Graph,
    *,
    num_stages: int,
    sizes: Sequence[int] | None,
) -> list[int]:
    """First layer of each stage and, last, the number of layers.

    Args:
        layers: the whole model.
        graph: gives the counts that layer costs depend on.
        num_stages: virtual ones included.
        sizes: layers of each stage; None balances their costs.
    """
    if sizes is None:
        costs = [layer.cost(graph.num_nodes, graph.num_edges) for layer in layers]
        sizes = split_layers(costs, num_stages)
    return [sum(sizes[:stage]) for stage in range(num_stages + 1)]


def build_engine(
    chunked: ChunkedGraph, layers: Sequence[Layer], *, plan: Plan, comm: Comm, like: Tensor
) -> Engine:
    """Builds the engine of one rank.

    Args:
        chunked: the whole graph; only this rank's part is copied out of it.
        layers: the whole model, on the meta device; this rank's layers are replaced by
            initialised ones, layers with storage are taken as they are.
        plan: how to run.
        comm: this rank's messages.
        like: a tensor that gives dtype and device.
    """
    mesh = comm.mesh
    stage_rank, way = mesh.stage_rank(comm.rank), mesh.way(comm.rank)
    bounds = plan.bounds
    graph = way_graph(chunked, way=way, num_ways=mesh.num_ways)
    builder = _StageBuilder(chunked, graph, plan, like, comm)
    stages = {}
    for index in mesh.stages_of(stage_rank, virtual_stages=plan.virtual_stages):
        local = range(bounds[index], bounds[index + 1])
        stages[index] = Stage(
            [builder.layer(i, layers[i], stage=index) for i in local],
            halo=comm,
            seed=plan.seed,
            factor=plan.cross_chunk_gradient,
            mode=plan.memory,
            precision=plan.precision,
            capture=CudaGraphs() if plan.replays else None,
        )
    # Rounded rows are rounded at every cut, so that numbers do not depend on who has which stage.
    held_by = mesh.num_stages if comm.formats.carried == "fp32" else 1
    cuts = cuts_of(layers, bounds, num_ranks=held_by)
    steps, virtual = plan.steps, plan.virtual_stages
    schedule = SCHEDULES[plan.schedule](mesh.num_stages, chunked.num_chunks, virtual, steps=steps)
    task = plan.task or SingleLabel()
    inputs = _inputs(chunked, graph, like, task=task, needs_features=0 in stages)
    actions = schedule[stage_rank]
    return Engine(stages, cuts, actions=actions, inputs=inputs, comm=comm, steps=steps)


class _StageBuilder:
    """Makes layers ready; layers with the same operator share their cells."""

    def __init__(
        self, chunked: ChunkedGraph, graph: WayGraph, plan: Plan, like: Tensor, comm: Comm
    ) -> None:
        self._graph = graph
        self._comm = comm
        self._plan = plan
        self._like = like
        self._cells: dict[str, Cells] = {}
        self._scratch: dict[tuple[bool, int], Tensor] = {}
        self._strata: Strata | None = None
        if plan.is_trained and plan.strata and chunked.num_chunks > 1:  # One reads no history.
            self._strata = strata_of(chunked, graph, limit=plan.strata, like=like)
        self._stale: dict[tuple[int, str], Stale] = {}

    def layer(self, index: int, layer: Layer, *, stage: int) -> LocalLayer:
        """Initialises a layer without storage and gives it cells and a table."""
        if any(parameter.is_meta for parameter in layer.parameters()):
            layer = initialise(layer, seed=self._plan.seed, index=index, like=self._like)
        layer = layer.to(self._like)
        operator, like = layer.operator, self._like
        if operator not in self._cells:
            self._cells[operator] = build_cells(
                self._graph,
                operator=operator,
                dtype=like.dtype,
                device=like.device,
                backend=self._plan.backend,
            )
        with AskingFor("table", f"the table of layer {index}"):
            table = self._table(layer, self._cells[operator], stage)
        return LocalLayer(index, layer, self._cells[operator], table, self._norms(layer))

    def _norms(self, layer: Layer) -> dict[nn.Module, Moments]:
        """What the layer's norms over nodes know."""
        chunks, add_up = self._graph.num_chunks, self._comm.add_up
        return {
            part: Moments(name, part, num_chunks=chunks, add_up=add_up)
            for name, part in layer.named_modules()
            if isinstance(part, NodeNorm)
        }

    def _table(self, layer: Layer, cells: Cells, stage: int) -> Table | None:
        if layer.operator == "none":
            return None
        graph = self._graph
        num_values = graph.num_rows + graph.in_mirrors.row_id.size
        # A gather sends gradients back to the mirrors that it read; an aggregation reads the
        # gradients of the targets of its own rows.
        is_gather = gathers(layer.operator)
        mirrors = graph.in_mirrors if is_gather else graph.out_mirrors
        num_gradients = graph.num_rows + mirrors.row_id.size
        plan, sizes = self._plan, (graph.num_rows, layer.table_channels)
        recall = None
        if plan.is_trained and not plan.keeping.is_plain:
            keeping, period = plan.keeping, plan.period
            recall = Recall(*sizes, like=self._like, keeping=keeping, period=period)
        late, reads_history = None, len(cells.chunks) > 1
        if plan.is_trained and plan.late_gradient > 0 and reads_history and not is_gather:
            late = LateGradients(
                num_gradients,
                layer.table_channels,
                like=self._like,
                factor=plan.late_gradient,
                momentum=plan.late_gradient_momentum,
            )
        table = Table(
            num_values,
            num_gradients if self._plan.is_trained else 0,
            layer.table_channels if self._plan.is_trained else 0,
            like=self._like,
            period=self._plan.period,
            recall=recall,
            late=late,
            scratch=self._shared_gradients(layer, cells, num_gradients),
            dtype=plan.history_dtype,
        )
        if self._strata is not None:
            key = stage, layer.operator
            if key not in self._stale:
                self._stale[key] = Stale(self._strata, cells)
            table.compensation = Compensation(
                self._stale[key],
                table.values,
                factor=plan.cross_chunk_gradient,
                start_sum=self._comm.start_add_up,
            )
        return table

    def _shared_gradients(self, layer: Layer, cells: Cells, num_rows: int) -> Tensor | None:
        """Memory for the gradients of all layers alike, where one is done with it before the next.

        It is so where no chunk reads another's rows, and what lies there from a forward to its
        backward, an aggregation's result, is computed again.
        """
        plan = self._plan
        runs_again = plan.is_trained and plan.memory == "recompute"
        if not runs_again or not cells.are_closed:
            return None
        key = gathers(layer.operator), layer.table_channels
        if key not in self._scratch:
            self._scratch[key] = self._like.new_zeros((num_rows, layer.table_channels))
        return self._scratch[key]


def _inputs(
    chunked: ChunkedGraph, graph: WayGraph, like: Tensor, *, task: Task, needs_features: bool
) -> Inputs:
    """This rank's features and targets, chunk by chunk."""
    bounds = [(int(a), int(b)) for a, b in zip(graph.chunk_ptr, graph.chunk_ptr[1:], strict=False)]
    labels = task.labels_of(chunked.labels[graph.row_id], like)
    masks = np.stack(
        [mask[graph.row_id] for mask in (chunked.train_mask, chunked.val_mask, chunked.test_mask)]
    )
    is_known = labels >= 0 if labels.ndim == 1 else ~labels.isnan().all(dim=1)
    whole = Targets(labels, torch.from_numpy(masks).to(like.device) & is_known)
    num_rows = graph.num_rows  # a closure over the graph itself would keep its edges alive
    features = InputRows(chunked.features, graph.row_id if needs_features else None, like)
    return Inputs(
        features=[features.rows(a, b) for a, b in bounds] if needs_features else [],
        all_features=lambda: features.rows(0, num_rows),
        targets=[Targets(whole.labels[a:b], whole.masks[:, a:b]) for a, b in bounds],
        all_targets=whole,
        chunk_train=[task.normaliser(part) for part in _chunk_labels(chunked)],
        task=task,
    )


class _ChunkLabels(NamedTuple):
    """The labels of one chunk, on all ways."""

    labels: Any  # numpy
    train_mask: Any
    num_classes: int


def _chunk_labels(chunked: ChunkedGraph) -> Iterator[_ChunkLabels]:
    for rows in starmap(slice, pairwise(chunked.cell_ptr[:: chunked.num_ways])):
        yield _ChunkLabels(chunked.labels[rows], chunked.train_mask[rows], chunked.num_classes)


class InputRows:
    """A way's input features; sparse ones stay sparse, mapped ones on disk where they can.

    The rows of a chunk are one range of the whole table, unless the partition was made for fewer
    ways: torch then reads the file's own pages, which the system may drop at any time.

    Args:
        table: of all nodes.
        row_id: the way's own rows, ascending; None where they are not needed.
        like: computed with this dtype, there.
    """

    def __init__(self, table: Any, row_id: Any, like: Tensor) -> None:  # Any: as scipy's arrays
        self._mapped = None if row_id is None else private_map(table)
        self._row_id = row_id
        self._rows: Any = None
        if row_id is not None and self._mapped is None:
            self._rows = table[row_id]
        self._like = like

    def _part(self, start: int, end: int) -> Any:
        if self._mapped is None:
            return self._rows[start:end]
        ids = self._row_id[start:end]
        is_range = ids.size and ids[-1] - ids[0] == ids.size - 1
        return self._mapped[ids[0] : ids[-1] + 1] if is_range else self._mapped[ids]

    def rows(self, start: int, end: int) -> Tensor | SparseRows:
        """The rows ``start:end`` as tensors."""
        like = self._like
        part = self._part(start, end)
        if not sparse.issparse(part):
            return torch.from_numpy(np.ascontiguousarray(part)).to(like.device, like.dtype)
        return SparseRows.from_csr(
            torch.from_numpy(part.indptr.astype(np.int64)).to(like.device),
            torch.from_numpy(part.indices.astype(np.int32)).to(like.device),
            torch.from_numpy(part.data).to(like.device, like.dtype),
            part.shape[1],
        )
