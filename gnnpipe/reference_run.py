"""The plain full-graph loop behind the face that the epoch loop drives."""

from pathlib import Path

import torch
from torch import Tensor

from gnnpipe.assembly import initialise
from gnnpipe.comm import KINDS
from gnnpipe.config import Config
from gnnpipe.configured import configured_task, configured_updates, model_layers
from gnnpipe.fields import require
from gnnpipe.graph import Graph
from gnnpipe.optimizer import averaged_weights
from gnnpipe.reference import Reference
from gnnpipe.runs import WAIT_KINDS, Usage, gradient_norm
from gnnpipe.shards import Shards
from gnnpipe.state import load_model_state, model_state, named_state
from gnnpipe.subgraph import training_part


class ReferenceRun:
    """The plain full-graph loop behind the same face."""

    rank = 0
    world_size = 1
    table_bytes = 0

    def __init__(self, config: Config, graph: Graph, *, device: torch.device) -> None:
        steps = config.training.steps_per_epoch
        rule = "must be 1 for the plain loop, which has no chunks; set it to 1"
        require(steps == 1, "training.steps_per_epoch", steps, rule)
        like = torch.empty(0, dtype=getattr(torch, config.model.dtype), device=device)
        self.layers = [
            initialise(layer, seed=config.seed, index=index, like=like)
            for index, layer in enumerate(model_layers(config, graph))
        ]
        self.num_parameters = sum(p.numel() for layer in self.layers for p in layer.parameters())
        self.task = configured_task(config, graph)
        trained = training_part(graph) if config.data.inductive else graph
        self.reference = Reference(
            trained,
            self.layers,
            seed=config.seed,
            updates=configured_updates(config),
            task=self.task,
        )
        self._evaluator = self.reference
        if config.data.inductive:
            self._evaluator = Reference(graph, self.layers, seed=0, lr=1.0, task=self.task)

    def train_epoch(self, epoch: int, *, is_measured: bool = False) -> float:
        """Takes one optimizer step; returns the loss."""
        return self.reference.train_epoch(epoch)

    def staleness(self) -> None:
        """Nothing is stale."""

    @property
    def persistence(self) -> None:
        """Nothing is lacking."""

    def evaluate(self) -> dict[str, float | None]:
        """Accuracy of each split."""
        with averaged_weights(self.reference.optimizer):
            return self._evaluator.accuracy(self._evaluator.evaluate())

    def weights(self) -> dict[str, Tensor]:
        """All weights by name."""
        with averaged_weights(self.reference.optimizer):
            state = named_state(list(enumerate(self.layers)))
            return {name: tensor.clone() for name, tensor in state.items()}

    def usage(self) -> Usage:
        """Nothing is sent."""
        return Usage([0] * len(KINDS), [0.0] * len(WAIT_KINDS))

    def gather(self, values: Tensor) -> list[Tensor]:
        """The one rank's ``values``."""
        return [values]

    def transfer_s(self) -> list[float]:
        """Nothing travels."""
        return [0.0]

    def write_trace(self, path: Path) -> None:
        """There is nothing to show."""

    def write_timeline(self, path: Path, epoch: int) -> None:
        """There is nothing to show."""

    def gradient_norms(self) -> list[float]:
        """Norm of the gradients of the whole model."""
        return [gradient_norm(p for layer in self.layers for p in layer.parameters())]

    def total(self, values: Tensor) -> Tensor:
        """The one rank's ``values``."""
        return values

    def state(self, *, histories: bool) -> dict[str, Tensor]:
        """The model; nothing is historical."""
        return model_state(list(enumerate(self.layers)), self.reference.optimizer)

    def restore(self, shards: Shards) -> None:
        """Takes the model out of a checkpoint."""
        load_model_state(list(enumerate(self.layers)), self.reference.optimizer, shards)
