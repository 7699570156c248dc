"""Link prediction's loss and figures, on the embeddings that the last stage gives.

A pair's score is the dot product of its ends. The loss of a step is the mean binary cross-entropy
over its training pairs and, for each of them, one negative: the same source with another target,
drawn anew every epoch from (seed, epoch). Both ends are *fresh*: a pair is counted when the later
of its two chunks is computed, with the rows that the earlier one has had since the step began. So
in one step per epoch every pair counts, and with one chunk this is plain full-graph training; in
more steps, the pairs whose ends are in the same step. Gradients reach both ends.
"""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from gnnpipe.auc import roc_auc
from gnnpipe.counter import stream_key
from gnnpipe.errors import UserError
from gnnpipe.losses import SPLITS, Targets
from gnnpipe.tasks import Kind, Labelled, Task

NUM_RIVALS = 50
"""Negatives of each evaluated pair; AUC takes the first, the reciprocal rank all."""


class Paired(Labelled, Protocol):
    """Graph and ChunkedGraph."""

    @property
    def num_nodes(self) -> int: ...
    @property
    def pairs(self) -> Any: ...
    @property
    def pair_split(self) -> Any: ...


class Link(Task):
    """Which nodes are joined.

    Args:
        graph: with pairs; their ids count rows.
        seed: of the negatives.
        metric: ``auc`` or ``mrr``, the mean reciprocal rank among 50 negatives of each pair.

    Raises:
        UserError: the graph has no pairs.
    """

    kind: Kind = "link"
    tally_shape = (3, 2)

    def __init__(self, graph: Paired, *, seed: int, metric: str = "auc") -> None:
        if graph.pairs is None:
            raise UserError(
                "`task.kind` (=link) needs held-out pairs, which this graph or partition lacks; "
                "leave data.inductive and partition.path out"
            )
        self.metric = metric
        self._seed, self._num_nodes = seed, graph.num_nodes
        # Negatives are drawn as the data set's own ids, whatever the chunks.
        node_id = getattr(graph, "node_id", None)
        self._row_of: NDArray[np.int64] = np.arange(graph.num_nodes)
        if node_id is not None:
            self._row_of[np.asarray(node_id)] = np.arange(graph.num_nodes)
        split = np.asarray(graph.pair_split)
        self._pairs = [np.asarray(graph.pairs)[split == which] for which in range(3)]
        self._train = torch.from_numpy(self._pairs[0])
        self._ends = self._train
        self._is_edge = torch.empty(0)
        self._is_fresh = torch.zeros(graph.num_nodes, dtype=torch.bool)
        self._values = self._gradient = torch.empty(0)

    def labels_of(self, labels: Any, like: Tensor) -> Tensor:
        """The number of each row: what :meth:`loss` has to know of its rows."""
        return torch.arange(len(labels), device=like.device)

    def normaliser(self, graph: Labelled) -> float:
        """Nodes; pairs are weighed so that the loss is their mean."""
        return len(graph.labels)

    def start_step(self, epoch: int) -> None:
        """Draws the epoch's negatives; no row is fresh."""
        rivals = self._negatives(len(self._train), (0, epoch))
        negative = torch.stack((self._train[:, 0], rivals), dim=1)
        self._ends = torch.cat((self._train, negative))  # [2 P, 2]
        self._is_edge = torch.arange(len(self._ends)) < len(self._train)
        self._is_fresh.zero_()

    def loss(
        self, scores: Tensor, labels: Tensor, train_mask: Tensor, *, total: float
    ) -> tuple[Tensor, Tensor]:
        """The pairs that these rows complete.

        Args:
            scores: embeddings ``[num_rows, T]``.
            labels: numbers of the rows, consecutive.
            train_mask: of no meaning here.
            total: nodes of the step.

        Returns:
            The loss, and a view of the gradient to which rows that come later in the step add.
        """
        if self._values.shape != (self._num_nodes, scores.shape[1]) or not self._is_fresh.any():
            self._values = scores.new_zeros((self._num_nodes, scores.shape[1]))
            self._gradient = torch.zeros_like(self._values)
        rows = slice(int(labels[0]), int(labels[-1]) + 1)
        is_new = torch.zeros(self._num_nodes, dtype=torch.bool)
        is_new[rows] = True
        self._is_fresh[rows] = True
        self._values[rows] = scores.detach()
        chosen = is_new[self._ends].any(dim=1) & self._is_fresh[self._ends].all(dim=1)
        source, target = self._ends[chosen].T
        wanted = self._is_edge[chosen].to(scores)
        a, b = self._values[source], self._values[target]
        dot = (a * b).sum(dim=1)
        weight = self._num_nodes / (len(self._ends) * total)
        loss = functional.binary_cross_entropy_with_logits(dot, wanted, reduction="sum") * weight
        slope = ((dot.sigmoid() - wanted) * weight).unsqueeze(1)
        self._gradient.index_add_(0, source, slope * b)
        self._gradient.index_add_(0, target, slope * a)
        return loss, self._gradient[rows]

    def whole_loss(self, scores: Tensor, epoch: int) -> Tensor:
        """The same by autograd, of all rows at once."""
        self.start_step(epoch)
        dot = (scores[self._ends[:, 0]] * scores[self._ends[:, 1]]).sum(dim=1)
        return functional.binary_cross_entropy_with_logits(dot, self._is_edge.to(scores))

    def tally(self, scores: Tensor, targets: Targets) -> Tensor:
        """The figure and whether it is defined, ``[3, 2]``; all rows are here."""
        found = []
        for which, pairs in enumerate(self._pairs):
            if not len(pairs):
                found.append((0.0, 0.0))
                continue
            ends = torch.from_numpy(pairs)
            rivals = self._negatives(len(pairs) * NUM_RIVALS, (1, which)).view(-1, NUM_RIVALS)
            source = scores[ends[:, 0]]  # [P, T]
            right = (source * scores[ends[:, 1]]).sum(dim=1)
            wrong = torch.stack([(source * scores[n]).sum(dim=1) for n in rivals.T], dim=1)
            figure = _auc(right, wrong[:, 0]) if self.metric == "auc" else _mrr(right, wrong)
            found.append((figure, 1.0))
        return torch.tensor(found, dtype=torch.float64)

    def figures(self, tally: Tensor) -> dict[str, float | None]:
        """The figure of each split."""
        rows = zip(SPLITS, tally.tolist(), strict=True)
        return {split: figure if is_defined else None for split, (figure, is_defined) in rows}

    def _negatives(self, count: int, purpose: tuple[int, int]) -> Tensor:
        """Rows of uniformly drawn nodes, ``[count]``."""
        draw = np.random.default_rng(stream_key(self._seed, *purpose))
        return torch.from_numpy(self._row_of[draw.integers(self._num_nodes, size=count)])


def _auc(right: Tensor, wrong: Tensor) -> float:
    labels = torch.cat((torch.ones_like(right), torch.zeros_like(wrong)))
    area = roc_auc(torch.cat((right, wrong)), labels)
    assert area is not None
    return area


def _mrr(right: Tensor, wrong: Tensor) -> float:
    """Mean of 1 / rank; of ties half are before."""
    right = right.unsqueeze(1)
    rank = 1.0 + (wrong > right).sum(dim=1).double() + (wrong == right).sum(dim=1).double() / 2.0
    return float((1.0 / rank).mean())
