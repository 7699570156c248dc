"""What the pipeline's gradient lacks, seen in some epochs and added in those between.

Histories bias every epoch's gradient ``g``: values are old, and readers of history send nothing
back. Every ``k``-th epoch the exact gradient ``G`` of the same weights and dropout masks is
computed too, and the optimizer's step takes it. Until the next one steps take ::

    g + persistence^(age / k) * (G - g of the last exact epoch)         age in epochs

    persistence = sum over i of 2^-i <b_{i+1}, b_i> / sum over i of 2^-i |b_{i+1}|^2, in [0, 1]

where ``b_0``, ``b_1``, ... are the differences ``G - g`` seen so far, the newest first: the factor
that, by least squares, makes of a difference the one k epochs later. A bias that stays is so taken
away, and one that changes from epoch to epoch is left alone, where it would only add noise.

SVRG (Johnson and Zhang, NeurIPS 2013) keeps an exact gradient as a control variate against the
noise of samples; this one is against bias, and measures how long it holds.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

PAST = 0.5
"""Weight of a pair of differences, relative to the pair after it."""
PREFIX = "correction."
"""Of its names in a checkpoint."""


class Correction:
    """The differences that one rank's layers have.

    Args:
        layers: index in the model and layer.
        num_layers: of the whole model.
        every: epochs between two exact gradients.
        add_up: sums ``[num_layers, 2]`` over all ranks, in place; layers that several ranks hold
            are to be counted once.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, nn.Module]],
        *,
        num_layers: int,
        every: int,
        add_up: Callable[[Tensor], Tensor],
    ) -> None:
        self._parameters = {
            (index, name): parameter
            for index, layer in layers
            for name, parameter in layer.named_parameters()
        }
        self._num_layers = num_layers
        self._every = every
        self._add_up = add_up
        self._aside: dict[tuple[int, str], Tensor] = {}
        self._bias: dict[tuple[int, str], Tensor] = {}
        self._sums = torch.zeros(2, dtype=torch.float64)

    @property
    def persistence(self) -> float:
        """How much of a difference is left ``every`` epochs later, in [0, 1]."""
        product, square = self._sums.tolist()
        return min(1.0, max(0.0, product / square)) if square else 0.0

    def is_due(self, epoch: int) -> bool:
        """Whether an epoch, counted from 1, computes the exact gradient."""
        return epoch % self._every == 0

    @torch.no_grad()
    def set_aside(self) -> None:
        """Remembers the pipeline's gradients, and makes room for the exact ones."""
        for key, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._aside[key] = parameter.grad.clone()
                parameter.grad.zero_()

    @torch.no_grad()
    def take(self) -> None:
        """Compares the exact gradients with those set aside; the step takes them as they are."""
        sums = torch.zeros((self._num_layers, 2), dtype=torch.float64)
        for key, gradient in self._gradients():
            old, new = self._bias.get(key), gradient - self._aside.get(key, 0.0)
            self._bias[key] = new
            if old is not None:
                flat = old.flatten().double()
                sums[key[0]] += torch.stack((flat @ new.flatten().double(), flat @ flat)).cpu()
        self._aside.clear()
        # By layer and then over layers, so that no bit depends on who holds which.
        of_layers = self._add_up(sums).tolist()
        for column in range(2):
            pair = sum(values[column] for values in of_layers)
            self._sums[column] = PAST * self._sums[column] + pair

    @torch.no_grad()
    def apply(self, epoch: int) -> None:
        """Adds to the gradients of an epoch in between what they lack."""
        share = self.persistence
        if not share:
            return
        weight = share ** (epoch % self._every / self._every)
        for key, gradient in self._gradients():
            if key in self._bias:
                gradient.add_(self._bias[key], alpha=weight)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, named by layer and parameter; nothing before the first exact gradient."""
        if not self._bias:
            return {}
        named = {f"{PREFIX}layers.{i}.{name}": bias for (i, name), bias in self._bias.items()}
        return named | {f"{PREFIX}sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state_dict` gave, as far as it is of these layers."""
        for index, name in self._parameters:
            held = state.get(f"{PREFIX}layers.{index}.{name}")
            if held is not None:
                parameter = self._parameters[index, name]
                self._bias[index, name] = held.to(parameter, copy=True)
        if f"{PREFIX}sums" in state:
            self._sums = state[f"{PREFIX}sums"].clone()

    def _gradients(self) -> list[tuple[tuple[int, str], Tensor]]:
        parameters = self._parameters.items()
        return [(key, p.grad) for key, p in parameters if p.grad is not None]
