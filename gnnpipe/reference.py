"""The plain full-graph loop: the oracle that the pipeline is compared with, and its baseline.

Original node order, torch.sparse and autograd: no chunk, table, kernel or schedule that the
pipeline uses appears here, so that the two can only agree by being right.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gnnpipe.full_graph import FullGraph, FullGraphView
from gnnpipe.graph import Graph
from gnnpipe.link_task import Link
from gnnpipe.losses import Targets
from gnnpipe.models.layer import Layer
from gnnpipe.optimizer import Updates, learning_rate, make_optimizer, set_learning_rate
from gnnpipe.tasks import SingleLabel, Task


class Reference:
    """Trains a list of layers on the whole graph at once.

    Args:
        graph: nodes with one label each; -1 is unlabelled.
        layers: the model, with its initial weights; their dtype and device are the loop's.
        seed: seed of the dropout masks.
        lr: Adam's learning rate, where there are no ``updates``.
        weight_decay: factor of each weight that is added to its gradient, likewise.
        updates: how weights change.
    """

    def __init__(
        self,
        graph: Graph,
        layers: Sequence[Layer],
        *,
        seed: int,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        updates: Updates | None = None,
        task: Task | None = None,
    ) -> None:
        self.layers = nn.ModuleList(layers)
        weight = next(self.layers.parameters())
        self._seed = seed
        self._full = FullGraph(graph, dtype=weight.dtype, device=weight.device)
        self._task = task or SingleLabel()
        self._labels = self._task.labels_of(graph.labels, weight)  # [N] or [N, T]
        known = graph.labels if graph.labels.ndim == 1 else graph.labels.max(axis=1)
        is_known = known >= 0 if known.dtype.kind != "f" else np.ones(len(known), np.bool_)
        self._nodes = {
            split: torch.from_numpy(np.flatnonzero(mask & is_known)).to(weight.device)
            for split, mask in _splits(graph).items()
        }
        self._updates = updates or Updates(lr=lr, weight_decay=weight_decay)
        self.optimizer = make_optimizer(self.layers.parameters(), self._updates)

    def train_epoch(self, epoch: int) -> float:
        """Takes one optimizer step.

        Args:
            epoch: number of the epoch, from 1; it chooses the dropout masks.

        Returns:
            The mean cross entropy over the labelled training nodes, before the step.
        """
        train = self._nodes["train"]
        self.optimizer.zero_grad()
        logits = self._forward((self._seed, epoch))
        if isinstance(self._task, Link):
            loss = self._task.whole_loss(logits, epoch)
        else:
            loss = self._loss(logits[train], self._labels[train])
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
        max_norm = self._updates.clip_norm
        if max_norm is not None:
            nn.utils.clip_grad_norm_(self.layers.parameters(), max_norm, foreach=False)
        set_learning_rate(self.optimizer, learning_rate(epoch, self._updates))
        self.optimizer.step()
        return float(loss.detach())

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """torch's own losses; single labels as a sum, which rounds as the pipeline's does."""
        if isinstance(self._task, SingleLabel):
            cross_entropy = partial(
                nn.functional.cross_entropy, label_smoothing=self._task.smoothing
            )
            weight = self._task.class_weight
            if weight is not None:
                return cross_entropy(scores, labels, weight.to(scores))
            return cross_entropy(scores, labels, reduction="sum") / len(labels)
        is_known = ~labels.isnan()
        is_real = self._task.kind == "regression"
        mean_loss = (
            nn.functional.mse_loss if is_real else nn.functional.binary_cross_entropy_with_logits
        )
        return mean_loss(scores[is_known], labels[is_known])

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Returns the class scores of all nodes without dropout, ``[N, num_classes]``."""
        return self._forward(None)

    def accuracy(self, logits: Tensor) -> dict[str, float | None]:
        """Returns the share of right classes in ``train``, ``val`` and ``test``.

        Args:
            logits: class scores, ``[N, num_classes]``.

        Returns:
            Fractions of the labelled nodes of each split; None where there are none.
        """
        if not isinstance(self._task, SingleLabel):
            masks = torch.zeros((3, len(self._labels)), dtype=torch.bool)
            for mask, nodes in zip(masks, self._nodes.values(), strict=True):
                mask[nodes.cpu()] = True
            return self._task.figures(self._task.tally(logits, Targets(self._labels, masks)))
        right = logits.argmax(1) == self._labels  # [N]
        return {
            split: int(right[nodes].sum()) / nodes.numel() if nodes.numel() else None
            for split, nodes in self._nodes.items()
        }

    def _forward(self, stream: tuple[int, int] | None) -> Tensor:
        x = self._full.features
        carried: dict[str, Tensor] = {}
        for layer_index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            parts = None if stream is None else (*stream, layer_index)
            x = layer(x, FullGraphView(self._full, layer.operator, stream=parts, carried=carried))
        return x


def _splits(graph: Graph) -> dict[str, NDArray[np.bool_]]:
    return {"train": graph.train_mask, "val": graph.val_mask, "test": graph.test_mask}
