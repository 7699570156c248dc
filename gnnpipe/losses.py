"""What the last stage optimises and what an evaluation counts."""

from typing import NamedTuple

import torch
from torch import Tensor

SPLITS = ("train", "val", "test")


class Targets(NamedTuple):
    """Labels and split of one rank's rows."""

    labels: Tensor
    """Class of each row, ``[num_rows]``, int64; -1 is unlabelled."""
    masks: Tensor
    """``[3, num_rows]``, bool: training, validation and test rows that have a label."""


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    train_mask: Tensor,
    *,
    num_train: int,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy of some rows' training nodes, and its gradient.

    ``loss = sum over training rows of -log softmax(logits)[label] / num_train``; with smoothing,
    that share of the target is spread evenly over all classes (Szegedy et al., "Rethinking the
    inception architecture for computer vision").

    Args:
        logits: ``[num_rows, num_classes]``.
        labels: ``[num_rows]``, int64.
        train_mask: ``[num_rows]``, bool.
        num_train: training nodes of the whole graph, so that chunks add up.
        smoothing: share of the target that all classes get, in [0, 1).

    Returns:
        The loss (a scalar) and its gradient ``[num_rows, num_classes]``.
    """
    rows = train_mask.nonzero().squeeze(1)
    gradient = torch.zeros_like(logits)
    log_p = torch.log_softmax(logits[rows], dim=1)
    label = labels[rows].unsqueeze(1)
    loss = -log_p.gather(1, label).sum() / num_train
    if smoothing:
        loss = (1.0 - smoothing) * loss - smoothing * log_p.mean(dim=1).sum() / num_train
    hit = torch.full_like(label, smoothing - 1.0, dtype=logits.dtype)
    at_rows = log_p.exp_().scatter_add_(1, label, hit)
    if smoothing:
        at_rows -= smoothing / logits.shape[1]
    gradient[rows] = at_rows / num_train
    return loss, gradient


def count_correct(logits: Tensor, targets: Targets) -> Tensor:
    """Counts right predictions: ``[3, 2]``, int64: correct and all, for train, val and test."""
    is_right = logits.argmax(dim=1) == targets.labels
    correct = (targets.masks & is_right).sum(dim=1)
    return torch.stack((correct, targets.masks.sum(dim=1)), dim=1).cpu()


def accuracies(counts: Tensor) -> dict[str, float | None]:
    """Accuracy of each split from its counts; None for a split without labelled nodes."""
    pairs = zip(SPLITS, counts.tolist(), strict=True)
    return {split: correct / total if total else None for split, (correct, total) in pairs}
