"""The area under the ROC curve from ranks: no curve is drawn.

For P positive and Q negative scores it is the share of the P Q pairs that are in order, ties
counting half: ``(sum of the positives' ranks - P (P + 1) / 2) / (P Q)`` with mean ranks for ties.
"""

import torch
from torch import Tensor


def roc_auc(scores: Tensor, labels: Tensor) -> float | None:
    """The area of one task.

    Args:
        scores: ``[n]``.
        labels: ``[n]``, 1 positive and 0 negative.

    Returns:
        In [0, 1]; None where a class is missing.
    """
    is_positive = labels == 1
    positives = int(is_positive.sum())
    negatives = labels.numel() - positives
    if positives == 0 or negatives == 0:
        return None
    _, position, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()  # rank of the last of equal scores, from 1
    mean_rank = last - (counts.double() - 1.0) / 2.0
    rank_sum = mean_rank[position[is_positive]].sum()
    wins = float(rank_sum) - positives * (positives + 1) / 2.0
    return wins / (positives * negatives)


def mean_roc_auc(scores: Tensor, labels: Tensor) -> float | None:
    """The mean over the tasks that have both classes, as OGB's Evaluator defines it.

    Args:
        scores: ``[n, T]``.
        labels: ``[n, T]``, 1, 0, or below 0 or NaN where not known.

    Returns:
        None where no task has both classes.
    """
    areas = []
    for score, label in zip(scores.T, labels.T, strict=True):
        is_known = label >= 0  # False for NaN too
        area = roc_auc(score[is_known], label[is_known])
        if area is not None:
            areas.append(area)
    return sum(areas) / len(areas) if areas else None
