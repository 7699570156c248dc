"""How weights change: the update rule, its learning rate over the epochs, a bound on gradients.

Neither rule nor rate has a state besides torch's own: the rate is a function of the epoch. The
averages of the weights are part of the optimizer's state, so checkpoints hold them.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    ema_decay: float = 0.0


def make_optimizer(parameters: Iterable[nn.Parameter], updates: Updates) -> torch.optim.Optimizer:
    """The update rule of some parameters, which may be none: a stage of hops has no weights."""
    optimizer = _rule(parameters, updates)
    if updates.ema_decay:
        optimizer.register_step_post_hook(lambda rule, *_: _average(rule, updates.ema_decay))
    return optimizer


def _rule(parameters: Iterable[nn.Parameter], updates: Updates) -> torch.optim.Optimizer:
    groups: Any = [{"params": list(parameters)}]
    # Fused: one kernel for all of a parameter's numbers, each on its own, so neither the cut into
    # stages nor the number of threads changes a bit.
    rates: Any = {"lr": updates.lr, "weight_decay": updates.weight_decay, "fused": True}
    match updates.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, momentum=updates.momentum, **rates)
        case "adamw":
            return torch.optim.AdamW(groups, **rates)
        case "adam":
            return torch.optim.Adam(groups, **rates)


@torch.no_grad()
def _average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not parameters:
        return
    states = [optimizer.state[parameter] for parameter in parameters]
    for parameter, state in zip(parameters, states, strict=True):
        if "average" not in state:
            state["average"] = torch.zeros_like(parameter)
            state["average_steps"] = torch.zeros((), dtype=torch.float64)
        state["average_steps"] += 1
    share = (1.0 - decay) / (1.0 - decay ** float(states[0]["average_steps"]))
    torch._foreach_lerp_([state["average"] for state in states], parameters, share)


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, weights are their exponential moving average over the optimizer's steps.

    ``average = (1 - share) average + share weights`` after step t, with
    ``share = (1 - decay) / (1 - decay^t)``, so that the weights of all steps add up to one (Polyak
    and Juditsky, "Acceleration of stochastic approximation by averaging"; the bias correction is
    Adam's). Without a decay, or before the first step, they are as they are.
    """
    averages = {p: s["average"] for p, s in optimizer.state.items() if "average" in s}
    with torch.no_grad():
        kept = [parameter.clone() for parameter in averages]
        for parameter, average in averages.items():
            parameter.copy_(average)
        try:
            yield
        finally:
            for parameter, own in zip(averages, kept, strict=True):
                parameter.copy_(own)


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
