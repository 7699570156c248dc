"""How weights change: the update rule, its learning rate over the epochs, a bound on gradients.

Neither rule nor rate has a state besides torch's own: the rate is a function of the epoch.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn


class Updates(NamedTuple):
    """How weights are to change; plain values from the configuration."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 0.01
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: Literal["cosine", "step"] | None = None
    epochs: int = 1
    """Of the whole run, where a cosine ends."""
    warm_up_epochs: int = 0
    decay_every: int = 100
    decay: float = 0.5
    clip_norm: float | None = None


def make_optimizer(parameters: Iterable[nn.Parameter], updates: Updates) -> torch.optim.Optimizer:
    """The update rule of some parameters, which may be none: a stage of hops has no weights."""
    groups: Any = [{"params": list(parameters)}]
    # foreach would fuse parameters across layers, and so depend on the cut into stages.
    rates: Any = {"lr": updates.lr, "weight_decay": updates.weight_decay, "foreach": False}
    match updates.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, momentum=updates.momentum, **rates)
        case "adamw":
            return torch.optim.AdamW(groups, **rates)
        case "adam":
            return torch.optim.Adam(groups, **rates)


def learning_rate(epoch: int, updates: Updates) -> float:
    """The learning rate of an epoch, counted from 1.

    After a linear rise ``lr * epoch / (warm_up_epochs + 1)``, with t the epochs since then:
    ``lr``, or ``lr * decay ** (t // decay_every)`` (step), or
    ``lr * (1 + cos(pi t / T)) / 2`` over the T epochs that are left (cosine; Loshchilov and
    Hutter, "SGDR: stochastic gradient descent with warm restarts", without the restarts).
    """
    lr, warm_up = updates.lr, updates.warm_up_epochs
    if epoch <= warm_up:
        return lr * epoch / (warm_up + 1)
    since = epoch - warm_up - 1
    if updates.schedule == "step":
        return lr * math.pow(updates.decay, since // updates.decay_every)
    if updates.schedule == "cosine":
        return lr * (1.0 + math.cos(math.pi * since / max(1, updates.epochs - warm_up))) / 2.0
    return lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives all parameters one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def squared_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The sum of the squared gradients, one parameter after the other, float64."""
    total = torch.zeros((), dtype=torch.float64)
    for parameter in parameters:
        if parameter.grad is not None:
            total += parameter.grad.double().square().sum().cpu()
    return total


def clip(parameters: Iterable[nn.Parameter], *, norm: float, max_norm: float) -> None:
    """Scales gradients whose norm, over all parameters of the model, is ``norm``.

    ``g * min(1, max_norm / (norm + 1e-6))``, as torch does (Pascanu et al., "On the difficulty of
    training recurrent neural networks").
    """
    factor = min(1.0, max_norm / (norm + 1e-6))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
