"""ReLU that remembers one bit of each number instead of the number.

Deep models keep every layer's output only to know, in the backward, where it was positive.
"""

from typing import Any

import torch
from torch import Tensor

from gnnpipe.kernels import cpu


def rectify(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Makes ``max(x, 0)`` of ``x`` in place.

    Args:
        x: contiguous.
        mask: where to write the result, if an earlier one of as many numbers is at hand.

    Returns:
        Which numbers have stayed: a bit of each, on other devices than CPUs a byte.
    """
    if not cpu.owns(x):
        mask = torch.gt(x, 0, out=mask)
        x.relu_()
        return mask
    if mask is None:
        mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    cpu.rectify(x.detach().numpy().reshape(-1), mask.numpy(), work=x.numel())
    return mask


def keep_where(x: Tensor, mask: Tensor, *, out: Tensor) -> Tensor:
    """``x`` where the mask of :func:`rectify` has a bit, 0 elsewhere; ``out`` may be ``x``."""
    if not cpu.owns(x):
        return torch.mul(x, mask, out=out)
    arrays = (x.numpy().reshape(-1), mask.numpy(), out.numpy().reshape(-1))
    cpu.keep(*arrays, work=x.numel())
    return out


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # Any: torch's context
        ctx.mark_dirty(x)
        ctx.mask = rectify(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        return keep_where(grad, ctx.mask, out=torch.empty_like(grad))


def relu(x: Tensor) -> Tensor:
    """``max(x, 0)``, in place where autograd allows it.

    Args:
        x: a result that nothing else needs, ``[num_rows, F]``.
    """
    is_result = x.grad_fn is not None and x.is_contiguous()
    if not cpu.owns(x) or not is_result or not torch.is_grad_enabled():
        return x.relu()
    out: Tensor = _ReLU.apply(x)  # type: ignore[no-untyped-call]
    return out
