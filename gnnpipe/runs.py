"""What the epoch loop drives: the pipeline, or the plain full-graph loop beside it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gnnpipe.assembly import Plan, build_engine, initialise, stage_bounds
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.comm import KINDS, Comm
from gnnpipe.config import Config
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.losses import accuracies
from gnnpipe.mesh import Mesh
from gnnpipe.models import build_layers
from gnnpipe.models.layer import Layer
from gnnpipe.reference import Reference
from gnnpipe.schedule import chunk_order
from gnnpipe.world import World, make_groups

WAIT_KINDS = ("boundary", "carried", "halo", "gradient", "ranks")


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

    def train_epoch(self, epoch: int, *, is_measured: bool) -> float:
        """Takes one optimizer step, measuring the staleness on the way if asked.

        Returns:
            This rank's part of the loss.
        """

    def staleness(self) -> list[float] | None:
        """Relative drift per layer in the last measured epoch, on every rank."""

    def evaluate(self) -> dict[str, float | None]:
        """Accuracy of each split, on every rank."""

    def weights(self) -> dict[str, Tensor] | None:
        """All weights by name, on rank 0."""

    def usage(self) -> Usage:
        """Bytes sent and seconds waited since the last call."""

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's ``values``, on rank 0."""


def model_layers(config: Config, graph: Graph | ChunkedGraph) -> list[Layer]:
    """Builds the configured model without storage: shapes, but no memory."""
    model = config.model
    features = graph.features
    row_entries = None if isinstance(features, np.ndarray) else features.nnz / graph.num_nodes
    with torch.device("meta"):
        return build_layers(
            model.name,
            in_channels=graph.num_features,
            hidden_channels=model.hidden_channels,
            out_channels=graph.num_classes,
            num_layers=model.num_layers,
            dropout=model.dropout,
            options=model.options,
            row_entries=row_entries,
        )


class PipelineRun:
    """This rank's engine and optimizer.

    Args:
        config: the run.
        chunked: the graph.
        world: the processes.
        layers: the model, on the meta device or with weights of its own.
    """

    def __init__(
        self, config: Config, chunked: ChunkedGraph, *, world: World, layers: Sequence[Layer]
    ) -> None:
        parallel = config.parallel
        self._config = config
        self._layers = layers
        self._num_chunks = chunked.num_chunks
        self.rank, self.world_size = world.rank, world.world_size
        self.num_parameters = sum(p.numel() for layer in layers for p in layer.parameters())
        mesh = Mesh(parallel.num_stages, parallel.num_ways)
        like = torch.empty(0, dtype=getattr(torch, config.model.dtype), device=world.device)
        groups = make_groups(mesh, world.device)
        timeout_s = config.run.timeout_s
        self._comm = Comm(mesh, world.rank, groups=groups, like=like, timeout_s=timeout_s)
        self._bounds = stage_bounds(
            layers, chunked, num_stages=parallel.total_stages, sizes=parallel.layers_per_stage
        )
        plan = Plan(
            seed=config.seed,
            bounds=self._bounds,
            virtual_stages=parallel.virtual_stages,
            period=config.history.period,
            cross_chunk_gradient=config.history.cross_chunk_gradient,
        )
        self.engine = build_engine(chunked, layers, plan=plan, comm=self._comm, like=like)
        self._stages = [stage for _, stage in sorted(self.engine.stages.items())]
        self.table_bytes = sum(t.num_bytes for stage in self._stages for t in stage.tables)
        parameters = [p for stage in self._stages for p in stage.parameters]
        # foreach would fuse parameters across layers, and so depend on the cut.
        self._optimizer = torch.optim.Adam(
            parameters,
            lr=config.training.lr,
            weight_decay=config.training.weight_decay,
            foreach=False,
        )

    def warm_start(self) -> None:
        """Fills the first history with the exact values of the initial weights."""
        if self._config.history.warm_start == "exact":
            self.engine.infer(into_tables=True)

    def train_epoch(self, epoch: int, *, is_measured: bool = False) -> float:
        """Takes one optimizer step; returns this rank's part of the loss."""
        config = self._config
        order = chunk_order(config.seed, epoch, self._num_chunks, kind=config.history.order)
        self._optimizer.zero_grad()
        loss = self.engine.train_step(epoch, order, is_measured=is_measured)
        self._optimizer.step()
        return loss

    def staleness(self) -> list[float]:
        """Relative drift per layer in the last measured epoch, on every rank."""
        return self.engine.staleness(len(self._layers))

    def evaluate(self) -> dict[str, float | None]:
        """Accuracy of each split, on every rank."""
        return accuracies(self.engine.evaluate())

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
        sizes = [
            (mesh.rank_of(stage_rank, 0), sum(t.numel() for t in named_state(layers).values()))
            for stage_rank, layers in enumerate(held)
        ]
        own = [
            (local.layer_index, local.layer) for stage in self._stages for local in stage.layers
        ]
        flat = torch.cat([tensor.flatten() for tensor in named_state(own).values()])
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
        """Every rank's ``values``, on rank 0."""
        return self._comm.gather_at_first(values)

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites this rank's weights."""
        load_state(
            [(o.layer_index, o.layer) for stage in self._stages for o in stage.layers], tensors
        )


class ReferenceRun:
    """The plain full-graph loop behind the same face."""

    rank = 0
    world_size = 1
    table_bytes = 0

    def __init__(self, config: Config, graph: Graph, *, device: torch.device) -> None:
        like = torch.empty(0, dtype=getattr(torch, config.model.dtype), device=device)
        self.layers = [
            initialise(layer, seed=config.seed, index=index, like=like)
            for index, layer in enumerate(model_layers(config, graph))
        ]
        self.num_parameters = sum(p.numel() for layer in self.layers for p in layer.parameters())
        self.reference = Reference(
            graph,
            self.layers,
            seed=config.seed,
            lr=config.training.lr,
            weight_decay=config.training.weight_decay,
        )

    def train_epoch(self, epoch: int, *, is_measured: bool = False) -> float:
        """Takes one optimizer step; returns the loss."""
        return self.reference.train_epoch(epoch)

    def staleness(self) -> None:
        """Nothing is stale."""

    def evaluate(self) -> dict[str, float | None]:
        """Accuracy of each split."""
        return self.reference.accuracy(self.reference.evaluate())

    def weights(self) -> dict[str, Tensor]:
        """All weights by name."""
        return named_state(list(enumerate(self.layers)))

    def usage(self) -> Usage:
        """Nothing is sent."""
        return Usage([0] * len(KINDS), [0.0] * len(WAIT_KINDS))

    def gather(self, values: Tensor) -> list[Tensor]:
        """The one rank's ``values``."""
        return [values]


def named_state(layers: Sequence[tuple[int, Layer]]) -> dict[str, Tensor]:
    """Weights as files name them, ``layers.{index}.{parameter}``."""
    return {
        f"layers.{index}.{name}": tensor
        for index, layer in layers
        for name, tensor in layer.state_dict().items()
    }


def load_state(layers: Sequence[tuple[int, Layer]], tensors: Mapping[str, Tensor]) -> None:
    """Overwrites weights with those of the same names."""
    with torch.no_grad():
        for name, tensor in named_state(layers).items():
            tensor.copy_(tensors[name])


def check_task(graph: Graph) -> None:
    """Checks that the labels are what the loss can use."""
    if graph.labels.ndim != 1:
        raise UserError(
            f"`labels` (of shape {list(graph.labels.shape)}) must be one class per node; "
            "several labels per node are not supported yet, choose one column"
        )


def _split(flat: Tensor, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cuts a flat tensor into named tensors of given shapes."""
    parts = torch.split(flat, [tensor.numel() for tensor in shapes.values()])
    return {
        name: part.view(tensor.shape)
        for (name, tensor), part in zip(shapes.items(), parts, strict=True)
    }
