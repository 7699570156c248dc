"""What is learned: the loss of some rows with its gradient, and the figure of an evaluation.

Losses are sums over rows divided by a number of the whole graph, so that chunks and ways add up.
Figures come from sums over ranks; only ROC-AUC needs the scores of all ranks in one place.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gnnpipe.auc import mean_roc_auc
from gnnpipe.errors import UserError
from gnnpipe.losses import SPLITS, Targets, accuracies, count_correct, cross_entropy

Kind = Literal["single_label", "multi_label", "multi_task_auc", "regression", "link"]
ClassWeight = Literal["balanced"] | Sequence[float] | None


class Labelled(Protocol):
    """Graph and ChunkedGraph."""

    @property
    def labels(self) -> Any: ...
    @property
    def train_mask(self) -> Any: ...
    @property
    def num_classes(self) -> int: ...


class Task(ABC):
    """What is optimised and what is reported."""

    kind: Kind
    metric: str
    """Name of the figure; larger is better."""
    needs_all_scores: bool = False
    """Whether :meth:`tally` wants the rows of all ranks at once."""
    tally_shape: tuple[int, ...]

    def labels_of(self, labels: Any, like: Tensor) -> Tensor:
        """Labels as the loss reads them: real numbers, NaN where not known."""
        values = torch.from_numpy(np.asarray(labels, np.float64))
        if labels.dtype.kind != "f":
            values = values.masked_fill(values < 0, float("nan"))
        return values.to(like)

    def start_step(self, epoch: int) -> None:  # noqa: B027  # most tasks have nothing to do
        """Called before the losses of a step."""

    @abstractmethod
    def normaliser(self, graph: Labelled) -> float:
        """What the loss of the whole graph is divided by."""

    @abstractmethod
    def loss(
        self, scores: Tensor, labels: Tensor, train_mask: Tensor, *, total: float
    ) -> tuple[Tensor, Tensor]:
        """The loss of some rows, and its gradient.

        Args:
            scores: ``[num_rows, T]``.
            labels: ``[num_rows]`` or ``[num_rows, T]``.
            train_mask: ``[num_rows]``, bool.
            total: the normaliser.
        """

    @abstractmethod
    def tally(self, scores: Tensor, targets: Targets) -> Tensor:
        """What the figures are computed from; adds up over ranks."""

    @abstractmethod
    def figures(self, tally: Tensor) -> dict[str, float | None]:
        """The metric of each split; None where it is not defined."""


class SingleLabel(Task):
    """One class for each node: softmax cross-entropy, accuracy.

    Args:
        class_weight: factor of each class's nodes ``[num_classes]``; None for ones.
        smoothing: share of the target that all classes get.
    """

    kind = "single_label"
    metric = "accuracy"
    tally_shape = (3, 2)

    def __init__(self, class_weight: Tensor | None = None, *, smoothing: float = 0.0) -> None:
        self.class_weight = class_weight
        self.smoothing = smoothing

    def labels_of(self, labels: Any, like: Tensor) -> Tensor:
        """Classes, int64, -1 where not known."""
        return torch.from_numpy(np.asarray(labels, np.int64)).to(like.device)

    def normaliser(self, graph: Labelled) -> float:
        """Training nodes; with weights, the sum of theirs."""
        train = np.asarray(graph.labels)[np.asarray(graph.train_mask) & (graph.labels >= 0)]
        if self.class_weight is None:
            return int(train.size)
        return float(self.class_weight.double()[torch.from_numpy(train)].sum())

    def loss(
        self, scores: Tensor, labels: Tensor, train_mask: Tensor, *, total: float
    ) -> tuple[Tensor, Tensor]:
        """``sum of -w_y log softmax(scores)_y / total``."""
        if self.class_weight is None:
            smoothing = self.smoothing
            return cross_entropy(
                scores, labels, train_mask, num_train=int(total), smoothing=smoothing
            )
        weight = self.class_weight.to(scores)
        rows = train_mask.nonzero().squeeze(1)
        leaf = scores[rows].detach().requires_grad_()
        options: Any = {"weight": weight, "label_smoothing": self.smoothing, "reduction": "sum"}
        loss = functional.cross_entropy(leaf, labels[rows], **options) / total
        return loss.detach(), _spread(loss, leaf, scores, rows)

    def tally(self, scores: Tensor, targets: Targets) -> Tensor:
        """Right predictions and all, ``[3, 2]``."""
        return count_correct(scores, targets)

    def figures(self, tally: Tensor) -> dict[str, float | None]:
        """Accuracy."""
        return accuracies(tally)


class _Columns(Task):
    """Several values for each node; those that are not known (NaN) count nowhere."""

    def normaliser(self, graph: Labelled) -> float:
        """Known values of the training nodes."""
        labels = np.asarray(graph.labels)[np.asarray(graph.train_mask)]
        is_known = ~np.isnan(labels) if labels.dtype.kind == "f" else labels >= 0
        return int(is_known.sum())

    def loss(
        self, scores: Tensor, labels: Tensor, train_mask: Tensor, *, total: float
    ) -> tuple[Tensor, Tensor]:
        """The sum over the known values of the training rows, over ``total``."""
        rows = train_mask.nonzero().squeeze(1)
        leaf = scores[rows].detach().requires_grad_()
        wanted = labels[rows]
        is_known = ~wanted.isnan()
        loss = self.sum_of(leaf[is_known], wanted[is_known]) / total
        return loss.detach(), _spread(loss, leaf, scores, rows)

    @abstractmethod
    def sum_of(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss of known values, summed."""


class MultiLabel(_Columns):
    """Several yes-or-no labels for each node: binary cross-entropy, micro-F1."""

    kind: Kind = "multi_label"
    metric = "micro_f1"
    tally_shape = (3, 3)

    def sum_of(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy."""
        return functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")

    def tally(self, scores: Tensor, targets: Targets) -> Tensor:
        """True positives, false positives and false negatives, ``[3, 3]``."""
        said, known = scores > 0, ~targets.labels.isnan()
        is_one = targets.labels == 1
        outcomes = torch.stack((said & is_one, said & ~is_one, ~said & is_one), dim=-1)
        per_row = (outcomes & known.unsqueeze(-1)).sum(dim=1)  # [num_rows, 3]
        return torch.stack([per_row[mask].sum(dim=0) for mask in targets.masks]).cpu()

    def figures(self, tally: Tensor) -> dict[str, float | None]:
        """``2 tp / (2 tp + fp + fn)`` over all labels together."""
        rows = zip(SPLITS, tally.tolist(), strict=True)
        return {
            split: 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
            for split, (tp, fp, fn) in rows
        }


class MultiTaskAuc(MultiLabel):
    """The same loss; the mean over tasks of the area under the ROC curve."""

    kind = "multi_task_auc"
    metric = "roc_auc"
    needs_all_scores = True
    tally_shape = (3, 2)

    def tally(self, scores: Tensor, targets: Targets) -> Tensor:
        """The area and whether it is defined, ``[3, 2]``; all rows are here."""
        areas = [mean_roc_auc(scores[mask], targets.labels[mask]) for mask in targets.masks]
        pairs = [(0.0, 0.0) if area is None else (area, 1.0) for area in areas]
        return torch.tensor(pairs, dtype=torch.float64)

    def figures(self, tally: Tensor) -> dict[str, float | None]:
        """The area."""
        rows = zip(SPLITS, tally.tolist(), strict=True)
        return {split: area if is_defined else None for split, (area, is_defined) in rows}


class Regression(_Columns):
    """Real targets: squared error; R^2, the mean over targets."""

    kind = "regression"
    metric = "r2"

    def __init__(self, num_targets: int) -> None:
        self.tally_shape = (3, num_targets, 4)

    def sum_of(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Squared error."""
        return functional.mse_loss(scores, labels, reduction="sum")

    def tally(self, scores: Tensor, targets: Targets) -> Tensor:
        """Count, sum, sum of squares and squared error of each target, ``[3, T, 4]``."""
        known = ~targets.labels.isnan()
        y = targets.labels.double().nan_to_num(0.0)
        error = (scores.double() - y).square() * known
        values = torch.stack((known.double(), y, y.square(), error), dim=-1)
        return torch.stack([values[mask].sum(dim=0) for mask in targets.masks]).cpu()

    def figures(self, tally: Tensor) -> dict[str, float | None]:
        """``1 - squared error / squared deviation from the mean``."""
        count, total, squares, error = tally.unbind(-1)  # [3, T] each
        spread = squares - total.square() / count.clamp(min=1)
        found = {}
        for split, c, s, e in zip(SPLITS, count, spread, error, strict=True):
            is_defined = (c > 1) & (s > 0)
            scores = 1.0 - e[is_defined] / s[is_defined]
            found[split] = float(scores.mean()) if scores.numel() else None
        return found


def make_task(
    kind: str, graph: Labelled, *, class_weight: ClassWeight = None, smoothing: float = 0.0
) -> Task:
    """The task of a graph.

    Args:
        kind: of :data:`Kind`, or ``auto``: one class per node is single_label, several whole
            numbers multi_label, real numbers regression.
        graph: its labels.
        class_weight: of single_label: a factor for each class, or ``balanced``:
            training nodes / (classes that have any x training nodes of the class).
        smoothing: of single_label: share of the target that all classes get.

    Raises:
        UserError: the labels are of another kind, or weights do not fit.
    """
    labels = graph.labels
    is_real = labels.ndim == 2 and labels.dtype.kind == "f"
    own = "single_label" if labels.ndim == 1 else "regression" if is_real else "multi_label"
    chosen = own if kind == "auto" else kind
    fits = {own, "multi_task_auc"} if own == "multi_label" else {own}
    if chosen not in fits:
        raise UserError(
            f"`task.kind` (={kind}) must be {' or '.join(sorted(fits))}: labels have the shape "
            f"{list(labels.shape)} and the type {labels.dtype}; set task.kind=auto"
        )
    if chosen != "single_label" and class_weight is not None:
        raise UserError(
            f"`task.class_weight` goes with single_label only, not `task.kind` (={chosen}); "
            "leave it out"
        )
    if chosen != "single_label" and smoothing:
        raise UserError(
            f"`training.label_smoothing` (={smoothing}) goes with single_label only, not "
            f"`task.kind` (={chosen}); leave it out"
        )
    if chosen == "single_label":
        return SingleLabel(_class_weight(class_weight, graph), smoothing=smoothing)
    if chosen == "regression":
        return Regression(labels.shape[1])
    return MultiTaskAuc() if chosen == "multi_task_auc" else MultiLabel()


def _class_weight(wanted: ClassWeight, graph: Labelled) -> Tensor | None:
    if wanted is None:
        return None
    if wanted != "balanced":
        weight = torch.tensor([float(value) for value in wanted], dtype=torch.float64)
        if weight.numel() != graph.num_classes or not bool((weight > 0).all()):
            raise UserError(
                f"`task.class_weight` (={list(wanted)}) must hold {graph.num_classes} numbers "
                "above 0, one for each class; or set it to balanced"
            )
        return weight
    labels = np.asarray(graph.labels)
    train = labels[np.asarray(graph.train_mask) & (labels >= 0)]
    counts = torch.from_numpy(np.bincount(train, minlength=graph.num_classes)).double()
    # A class without training nodes has no loss, whatever its weight.
    return train.size / (counts.count_nonzero() * counts.clamp(min=1))


def _spread(loss: Tensor, leaf: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
    """The gradient of all scores from that of some rows."""
    gradient = torch.zeros_like(scores)
    gradient[rows] = torch.autograd.grad(loss, leaf)[0]
    return gradient
