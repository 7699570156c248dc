"""What the epoch loop drives, and the pipeline behind that face."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gnnpipe.assembly import Plan, build_engine, stage_bounds
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.comm import KINDS, Comm
from gnnpipe.config import Config
from gnnpipe.configured import configured_task, configured_updates
from gnnpipe.correction import PREFIX, Correction
from gnnpipe.environment import give_back_memory
from gnnpipe.fields import require
from gnnpipe.history import Table
from gnnpipe.kernels import half_products_gain
from gnnpipe.mesh import Mesh
from gnnpipe.messages import Formats
from gnnpipe.models.layer import Layer
from gnnpipe.models.norm import NodeNorm
from gnnpipe.optimizer import (
    averaged_weights,
    clip,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from gnnpipe.order import chunk_order
from gnnpipe.recall import Keeping
from gnnpipe.reports import Reports
from gnnpipe.shapes import gathers
from gnnpipe.shards import Shards
from gnnpipe.shortage import AskingFor
from gnnpipe.stage import LocalLayer
from gnnpipe.state import (
    history_state,
    load_history,
    load_mirrors,
    load_model_state,
    load_moments,
    load_recall,
    load_state,
    mirror_state,
    model_state,
    moment_state,
    named_state,
)
from gnnpipe.tasks import Task
from gnnpipe.world import World, make_groups

SLOW_PRODUCTS = (
    "training.precision=bf16: this CPU has no unit for bfloat16 products (AMX); they will be no"
    " quicker than fp32, and rounded"
)
WAIT_KINDS = ("boundary", "carried", "halo", "gradient", "ranks")

HISTORY_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger("gnnpipe")


class Usage(NamedTuple):
    """What one rank sent and waited for since the last look."""

    sent_bytes: list[int]
    """In the order of ``comm.KINDS``."""
    wait_s: list[float]
    """In the order of :data:`WAIT_KINDS`."""


class Run(Protocol):
    """One rank's part of a training run."""

    rank: int
    world_size: int
    num_parameters: int
    table_bytes: int
    task: Task

    def train_epoch(self, epoch: int, *, is_measured: bool) -> float:
        """Takes the epoch's optimizer steps, measuring the staleness on the way if asked.

        Returns:
            This rank's part of the loss.
        """

    def staleness(self) -> list[float | None] | None:
        """Relative drift per layer in the last measured epoch, on every rank."""

    @property
    def persistence(self) -> float | None:
        """How much of what gradients lacked lasts; None where nothing corrects them."""

    def evaluate(self) -> dict[str, float | None]:
        """Accuracy of each split, on every rank."""

    def weights(self) -> dict[str, Tensor] | None:
        """All weights by name, on rank 0."""

    def usage(self) -> Usage:
        """Bytes sent and seconds waited since the last call."""

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's ``values``, on rank 0."""

    def transfer_s(self) -> list[float]:
        """How long each rank waited for messages on their way, on rank 0, ``[ranks]``."""

    def write_trace(self, path: Path) -> None:
        """Writes the last epochs of all ranks as a Chrome trace, on rank 0."""

    def write_timeline(self, path: Path, epoch: int) -> None:
        """Writes the last epoch of all ranks for who draws it, on rank 0."""

    def gradient_norms(self) -> list[float]:
        """Norm of the parameters' gradients of each of this rank's stages."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of every rank's ``values``, on every rank."""

    def state(self, *, histories: bool) -> dict[str, Tensor]:
        """What this rank adds to a checkpoint."""

    def restore(self, shards: Shards) -> None:
        """Takes its part of a checkpoint, which any ranks may have written."""


class PipelineRun:
    """This rank's engine and optimizer.

    Args:
        config: the run.
        chunked: the graph.
        world: the processes.
        layers: the model, on the meta device or with weights of its own.
        evaluated_on: another graph that evaluations read; None is the trained one.
    """

    def __init__(
        self,
        config: Config,
        chunked: ChunkedGraph,
        *,
        world: World,
        layers: Sequence[Layer],
        evaluated_on: ChunkedGraph | None = None,
    ) -> None:
        parallel = config.parallel
        kind = world.device.type
        config.check_device(kind)
        has_triton = config.kernels.backend != "triton" or find_spec("triton") is not None
        require(has_triton, "kernels.backend", "triton", "needs Triton; pip install triton")
        if kind == "cpu" and config.training.precision == "bf16" and not half_products_gain():
            logger.warning(SLOW_PRODUCTS)
        self._config = config
        self._layers = layers
        self._num_chunks = chunked.num_chunks
        self._has_trained = False
        self._epoch = 0
        """The last one that was trained here."""
        self._refreshed = 0
        """The epoch after which an evaluation left exact histories."""
        self.rank, self.world_size = world.rank, world.world_size
        self.num_parameters = sum(p.numel() for layer in layers for p in layer.parameters())
        mesh = Mesh(parallel.num_stages, parallel.num_ways)
        like = torch.empty(0, dtype=getattr(torch, config.model.dtype), device=world.device)
        groups = make_groups(mesh, world.device)
        timeout_s = config.run.timeout_s
        formats = Formats(**dataclasses.asdict(config.comm), seed=config.seed)
        self._comm = Comm(
            mesh, world.rank, groups=groups, like=like, timeout_s=timeout_s, formats=formats
        )
        self._reports = Reports(self._comm)
        self._bounds = stage_bounds(
            layers, chunked, num_stages=parallel.total_stages, sizes=parallel.layers_per_stage
        )
        _check_sums(layers, config.history.late_gradient or 0.0)
        plan = Plan(
            seed=config.seed,
            bounds=self._bounds,
            virtual_stages=parallel.virtual_stages,
            period=config.history.period,
            cross_chunk_gradient=config.history.cross_chunk_gradient,
            steps=config.training.steps_per_epoch,
            schedule=parallel.schedule,
            keeping=Keeping(
                config.history.dropout,
                config.history.momentum,
                config.history.predict == "linear",
            ),
            strata=config.num_strata,
            late_gradient=config.late_gradient,
            late_gradient_momentum=config.history.late_gradient_momentum,
            memory=config.memory.mode,
            replays=config.kernels.cuda_graphs,
            precision=config.training.precision,
            backend=None if config.kernels.backend == "auto" else config.kernels.backend,
            history_dtype=HISTORY_DTYPES.get(config.history.dtype or ""),
            task=configured_task(config, chunked),
        )
        assert plan.task is not None
        self.task: Task = plan.task
        self.engine = build_engine(chunked, layers, plan=plan, comm=self._comm, like=like)
        self._stages = [stage for _, stage in sorted(self.engine.stages.items())]
        self._evaluator = self.engine
        if evaluated_on is not None:
            own = {local.layer_index: local.layer for local in self._local}
            same = [own.get(index, layer) for index, layer in enumerate(layers)]
            plan = plan._replace(is_trained=False, steps=1)
            self._evaluator = build_engine(
                evaluated_on, same, plan=plan, comm=self._comm, like=like
            )
        world.answer(lambda: self._comm.action)
        self.table_bytes = table_bytes(t for stage in self._stages for t in stage.tables)
        parameters = [p for stage in self._stages for p in stage.parameters]
        self._updates = configured_updates(config)
        self._is_one_forward = evaluated_on is None and _refreshes_by_evaluating(config, layers)
        self._optimizer = make_optimizer(parameters, self._updates)
        self.add_exact_gradients = self.engine.add_exact_gradients
        self.correction: Correction | None = None
        if config.history.correct_every is not None and self._num_chunks > 1:
            _check_columns(layers, config.history.correct_every)
            self.correction = self.new_correction(config.history.correct_every)

    def new_correction(self, every: int) -> Correction:
        """What corrects the gradients of this rank's layers.

        Args:
            every: epochs between two exact gradients.
        """
        is_first_way = self._comm.mesh.way(self.rank) == 0  # ways hold equal gradients

        def add_up(sums: Tensor) -> Tensor:
            self._comm.during("the fit of the correction")
            return self._comm.sum_over_ranks(sums if is_first_way else torch.zeros_like(sums))

        layers = [(local.layer_index, local.layer) for local in self._local]
        return Correction(layers, num_layers=len(self._layers), every=every, add_up=add_up)

    def warm_start(self) -> None:
        """Fills the first history with the exact values of the initial weights."""
        if self._config.history.warm_start == "exact":
            self.engine.infer(into_tables=True)
        give_back_memory()

    def train_epoch(self, epoch: int, *, is_measured: bool = False) -> float:
        """Takes the epoch's optimizer steps; returns this rank's part of the loss."""
        config = self._config
        order = chunk_order(config.seed, epoch, self._num_chunks, kind=config.history.order)
        self._comm.wait_s.clear()  # What was waited for between epochs is no part of one.
        if self._is_due(epoch - 1):
            self.engine.infer(into_tables=True)
        recorder = self._comm.recorder
        recorder.start()
        set_learning_rate(self._optimizer, learning_rate(epoch, self._updates))
        is_measured |= config.history.max_drift is not None
        loss = 0.0
        for step in range(config.training.steps_per_epoch):
            self._optimizer.zero_grad()
            loss += self.engine.train_step(epoch, order, step=step, is_measured=is_measured)
            self._correct(epoch)
            start_s = time.perf_counter()
            if self.engine.step_train(order, step):
                self._update()
            recorder.step(start_s=start_s, end_s=time.perf_counter())
        self._renew_histories()
        self._epoch = epoch
        self._reports.take(recorder.stop(), has_exact=self._is_exact(epoch))
        if not self._has_trained:
            give_back_memory()
        self._has_trained = True
        return loss

    def _correct(self, epoch: int) -> None:
        """Makes the epoch's gradients exact, or less biased."""
        if self.correction is None:
            return
        if not self._is_exact(epoch):
            self.correction.apply(epoch)
            return
        self.correction.set_aside()
        self.add_exact_gradients(epoch)
        self.correction.take()

    def _is_exact(self, epoch: int) -> bool:
        """Whether an epoch's step takes the exact gradient, which the epoch computes too."""
        return self.correction is not None and self.correction.is_due(epoch)

    def _is_due(self, epoch: int) -> bool:
        """Whether the histories that an epoch has left are to be replaced by exact ones."""
        every = self._config.refresh_every
        is_wanted = every is not None and epoch > 0 and epoch % every == 0
        return is_wanted and self._num_chunks > 1 and self._refreshed != epoch

    def _renew_histories(self) -> None:
        """Between two epochs: fits predictions, and recomputes histories that drift too far."""
        wanted = self._config.history
        if wanted.predict is not None:
            self._comm.during("the fit of the histories")
            self.engine.fit_histories(len(self._layers))
        if wanted.max_drift is not None:
            drift = max((d for d in self.staleness() if d is not None), default=0.0)
            if drift > wanted.max_drift:
                self.engine.infer(into_tables=True)

    def _update(self) -> None:
        """One optimizer step, with the gradients of all ranks bounded together."""
        max_norm = self._updates.clip_norm
        if max_norm is not None:
            self._comm.during("the norm of the gradient")
            norm = self.engine.gradient_norm(len(self._layers))
            clip((p for s in self._stages for p in s.parameters), norm=norm, max_norm=max_norm)
        with AskingFor("optimizer", "the optimizer's moments"):
            self._optimizer.step()

    def staleness(self) -> list[float | None]:
        """Relative drift per layer in the last measured epoch, on every rank."""
        return self.engine.staleness(len(self._layers))

    @property
    def persistence(self) -> float | None:
        """How much of what gradients lacked lasts; None where nothing corrects them."""
        return None if self.correction is None else self.correction.persistence

    def evaluate(self) -> dict[str, float | None]:
        """Accuracy of each split, on every rank; refreshes the histories on the way if due."""
        is_refresh = self._is_one_forward and self._is_due(self._epoch)
        with averaged_weights(self._optimizer):
            tally = self._evaluator.evaluate(into_tables=is_refresh)
        if is_refresh:
            self._refreshed = self._epoch
        return self.task.figures(tally)

    def weights(self) -> dict[str, Tensor] | None:
        """All weights by name, on rank 0; way 0 of every other stage rank sends its own there."""
        mesh, virtual = self._comm.mesh, self._config.parallel.virtual_stages
        held = [
            [
                (index, self._layers[index])
                for stage in mesh.stages_of(stage_rank, virtual_stages=virtual)
                for index in range(self._bounds[stage], self._bounds[stage + 1])
            ]
            for stage_rank in range(mesh.num_stages)
        ]
        counts = [sum(t.numel() for t in named_state(layers).values()) for layers in held]
        sizes = [
            (mesh.rank_of(stage_rank, 0), count)
            for stage_rank, count in enumerate(counts)
            if count
        ]
        own = [(local.layer_index, local.layer) for local in self._local]
        with averaged_weights(self._optimizer):
            tensors = [tensor.flatten() for tensor in named_state(own).values()]
            flat = torch.cat(tensors) if tensors else None
        self._reports.flush()
        parts = self._comm.collect_flat(flat, sizes)
        if self.rank != 0:
            return None
        shapes = named_state([pair for layers in held for pair in layers])
        return _split(torch.cat(parts), shapes)

    def usage(self) -> Usage:
        """Bytes sent and seconds waited since the last call."""
        comm = self._comm
        usage = Usage(
            [comm.sent_bytes[kind] for kind in KINDS], [comm.wait_s[kind] for kind in WAIT_KINDS]
        )
        comm.sent_bytes.clear()
        comm.wait_s.clear()
        return usage

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's ``values``, on rank 0; the others do not wait for it."""
        return self._reports.send(values)

    def transfer_s(self) -> list[float]:
        """How long each rank waited for messages on their way, on rank 0, ``[ranks]``."""
        return self._reports.trace.transfer_s()

    def write_trace(self, path: Path) -> None:
        """Writes the last epochs of all ranks, on rank 0."""
        self._reports.trace.write(path)

    def write_timeline(self, path: Path, epoch: int) -> None:
        """Writes the last epoch of all ranks for who draws it, on rank 0."""
        self._reports.trace.write_timeline(path, epoch)

    def gradient_norms(self) -> list[float]:
        """Norm of the parameters' gradients of each of this rank's stages."""
        return [gradient_norm(stage.parameters) for stage in self._stages]

    def total(self, values: Tensor) -> Tensor:
        """The sum of every rank's ``values``, on every rank."""
        return self._comm.sum_over_ranks(values)

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites this rank's weights."""
        load_state([(local.layer_index, local.layer) for local in self._local], tensors)

    def state(self, *, histories: bool) -> dict[str, Tensor]:
        """What this rank adds to a checkpoint: way 0 the model, each way its own rows."""
        tensors = history_state(self._local) if histories else {}
        if histories and self._comm.formats.halo != "fp32":
            tensors |= mirror_state(self._local, self._comm.mesh.place(self.rank))
        if self._comm.mesh.way(self.rank) == 0:
            layers = [(local.layer_index, local.layer) for local in self._local]
            tensors |= model_state(layers, self._optimizer)
            tensors |= moment_state(self._local) if histories else {}
            if histories and self.correction is not None:
                tensors |= self.correction.state_dict()
        return tensors | self.engine.weight_sums.state_dict()

    def restore(self, shards: Shards) -> None:
        """Takes its part of a checkpoint; computes the histories anew if it holds none."""
        layers = [(local.layer_index, local.layer) for local in self._local]
        load_model_state(layers, self._optimizer, shards)
        owed = {name: shards.tensor(name) for name in shards.names("rounding.")}
        self.engine.weight_sums.load_state_dict(owed, [index for index, _ in layers])
        if self.correction is not None:
            kept = {name: shards.tensor(name) for name in shards.names(PREFIX)}
            self.correction.load_state_dict(kept)
        if shards.names("history."):
            load_moments(self._local, shards)
            for local in self._local:
                self._restore_table(local, shards)
        else:
            self.engine.infer(into_tables=True)
        self.usage()  # No epoch's business.

    def _restore_table(self, local: LocalLayer, shards: Shards) -> None:
        table, cell = local.table, local.cells.whole
        if table is None:
            return
        self._comm.during(f"restoring layer {local.layer_index}")
        load_history(local, shards)
        # Own rows -> the ways that mirror them.
        self._comm.pull(table.values, cell.in_exchanges)()
        if table.late is not None:
            self._comm.pull(table.late.rows, cell.out_exchanges)()
        load_mirrors(local, shards, self._comm.mesh.place(self.rank))
        table.warm()
        load_recall(local, shards)

    @property
    def _local(self) -> list[LocalLayer]:
        return [local for stage in self._stages for local in stage.layers]


def _refreshes_by_evaluating(config: Config, layers: Sequence[Layer]) -> bool:
    """Whether the exact forward that refreshes histories computes what an evaluation does.

    Not with averaged weights, rows rounded by the tables, or norms over nodes, whose statistics
    it takes chunk by chunk.
    """
    is_other = config.training.ema_decay > 0 or config.history.dtype is not None
    modules = (module for layer in layers for module in layer.modules())
    return not is_other and not any(isinstance(module, NodeNorm) for module in modules)


def _check_columns(layers: Sequence[Layer], every: int) -> None:
    modules = (module for layer in layers for module in layer.modules())
    has_columns = any(isinstance(module, NodeNorm) for module in modules)
    rule = "must be null with norms of columns, which know all rows chunk by chunk; set it to null"
    require(not has_columns, "history.correct_every", every, f"{rule} or `model.norm` to layer")


def _check_sums(layers: Sequence[Layer], late_gradient: float) -> None:
    for layer in layers:
        rule = f"must be 0 for {type(layer).__name__}, which gathers its neighbours' rows"
        is_right = not late_gradient or not gathers(layer.operator)
        way_out = "leave it out, or take a model that sums them"
        require(is_right, "history.late_gradient", late_gradient, f"{rule}; {way_out}")


def table_bytes(tables: Iterable[Table]) -> int:
    """Memory of some tables, what they share counted once."""
    tables = list(tables)
    shared = {t.gradients.data_ptr(): t.gradients.nbytes for t in tables if t.is_shared}
    return sum(t.num_bytes for t in tables) + sum(shared.values())


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Norm of all gradients of some parameters together."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients))


def _split(flat: Tensor, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cuts a flat tensor into named tensors of given shapes."""
    parts = torch.split(flat, [tensor.numel() for tensor in shapes.values()])
    return {  # A norm's counter of steps has travelled as a floating-point number.
        name: part.view(tensor.shape).to(
            part.dtype if tensor.is_floating_point() else tensor.dtype
        )
        for (name, tensor), part in zip(shapes.items(), parts, strict=True)
    }
