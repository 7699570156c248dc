"""Means and variances over all nodes while the nodes are computed chunk by chunk.

A norm keeps of every chunk the number of rows, their sum and the sum of their squares. A chunk
that is computed puts its own into place and is normalised by the total: what it reads is fresh of
itself and of the chunks done before it, and the last known of the others, as in a table of rows
(history.py)::

    order 0 1 2           forward of chunk 1
    sums                  [fresh 0] + [own, fresh] + [last epoch's 2]  ->  mean, variance

Gradients flow through the chunk's own part of the total; the rest is constant. With one chunk this
is torch's batch normalisation. A chunk that nobody has computed counts no rows, so the first epoch
without a first history is normalised by what there is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gnnpipe.models.norm import NodeNorm, scale_and_shift

AddUp = Callable[[Tensor], Tensor]
"""Adds up a few numbers over the ways of a stage; the same bits on all of them."""


class Moments:
    """What one norm of one layer knows of all nodes; the same on all ways.

    Args:
        name: of the norm in its layer.
        norm: the norm.
        num_chunks: chunks.
        add_up: sums over the ways.
    """

    def __init__(self, name: str, norm: NodeNorm, *, num_chunks: int, add_up: AddUp) -> None:
        self.name = name
        self._norm = norm
        self._add_up = add_up
        width = 2 * norm.num_features + 1
        self.sums = torch.zeros(
            (num_chunks, width), dtype=torch.float64, device=norm.weight.device
        )
        """Of each chunk, all ways together: rows, their sum, the sum of their squares."""
        self.warmed: Sequence[slice] = ()
        """Rows of each chunk on this way whose sums :meth:`infer` shall take."""
        self._totals: dict[int, Tensor] = {}

    def train(self, x: Tensor, chunk: int) -> Tensor:
        """Normalises one chunk's rows on this way, ``[num_rows, num_features]``.

        A forward that is run again within the step is normalised as the first was.
        """
        if chunk not in self._totals:
            self.sums[chunk] = self._add_up(_sums(x.detach()))
            self._totals[chunk] = self.sums.sum(dim=0)
        mean, var = _Moments.apply(x, self._totals[chunk], self._add_up)  # type: ignore[no-untyped-call]
        return _mapped(x, self._norm, mean, var)

    def infer(self, x: Tensor) -> Tensor:
        """Normalises all rows of this way, without a gradient.

        By their own sums where these are to be taken as the last known ones; in an evaluation by
        running statistics where the norm has them.
        """
        norm = self._norm
        if self.warmed:
            self.sums = self._add_up(torch.stack([_sums(x[rows]) for rows in self.warmed]))
            total = self.sums.sum(dim=0)
        elif isinstance(norm, nn.BatchNorm1d):
            statistics = norm.running_mean, norm.running_var
            return functional.batch_norm(x, *statistics, norm.weight, norm.bias, eps=norm.eps)
        else:
            total = self._add_up(_sums(x))
        return _mapped(x, norm, *(part.to(x.dtype) for part in _moments(total)))

    @torch.no_grad()
    def end_step(self) -> None:
        """Ends an optimizer step: running statistics take what is known now, once."""
        norm = self._norm
        self._totals.clear()
        if isinstance(norm, nn.BatchNorm1d):
            total = self.sums.sum(dim=0)
            mean, var = _moments(total)
            rows = total[0]
            var *= rows / (rows - 1).clamp(min=1)  # unbiased, as torch's
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked += 1
            factor = norm.momentum
            assert factor is not None
            norm.running_mean.lerp_(mean.to(norm.running_mean), factor)
            norm.running_var.lerp_(var.to(norm.running_var), factor)


Norms = Mapping[nn.Module, Moments]
NO_NORMS: Norms = {}


class _Moments(torch.autograd.Function):
    """Mean and variance as functions of one chunk's rows; the other chunks' are constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, total: Tensor, add_up: AddUp
    ) -> tuple[Tensor, Tensor]:  # Any: torch's context
        mean, var = (part.to(x.dtype) for part in _moments(total))
        ctx.save_for_backward(x, mean)
        ctx.rows, ctx.add_up = total[0].clamp(min=1), add_up
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, mean = ctx.saved_tensors
        # The rows of all ways read these two; on each way a part of their gradient arises.
        sums = ctx.add_up(torch.stack(grads).double()) / ctx.rows
        to_mean, to_var = sums.to(x.dtype)
        return torch.addcmul(to_mean, x - mean, 2.0 * to_var), None, None


def _sums(x: Tensor) -> Tensor:
    """Rows, their sum and the sum of their squares, ``[2 * num_features + 1]``, float64.

    The squares are taken around the mean in the rows' own precision, and moved in double: the
    variance of rows far from zero would be lost otherwise.
    """
    num_rows = x.shape[0]
    mean = x.sum(dim=0) / max(num_rows, 1)
    around = (x - mean).square_().sum(dim=0)
    first = mean.double()
    count = first.new_tensor([num_rows])
    return torch.cat((count, num_rows * first, around.double() + num_rows * first.square()))


def _moments(total: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, float64."""
    mean, square = (total[1:] / total[0].clamp(min=1)).chunk(2)
    return mean, (square - mean.square()).clamp_(min=0.0)


def _mapped(x: Tensor, norm: NodeNorm, mean: Tensor, var: Tensor) -> Tensor:
    scale, shift = scale_and_shift(norm, mean, var)
    return torch.addcmul(shift, x, scale)
