"""ReLU that remembers one bit of each number instead of the number.

Deep models keep every layer's output only to know, in the backward, where it was positive.
"""

from typing import Any

import torch
from torch import Tensor

from gnnpipe.kernels import cpu


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # Any: torch's context
        ctx.mark_dirty(x)
        ctx.mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
        cpu.rectify(x.detach().numpy().reshape(-1), ctx.mask.numpy(), work=x.numel())
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        out = torch.empty_like(grad)
        arrays = (grad.numpy().reshape(-1), ctx.mask.numpy(), out.numpy().reshape(-1))
        cpu.keep(*arrays, work=grad.numel())
        return out


def relu(x: Tensor) -> Tensor:
    """``max(x, 0)``, in place where autograd allows it.

    Args:
        x: a result that nothing else needs, ``[num_rows, F]``.
    """
    is_result = x.grad_fn is not None and x.is_contiguous()
    if x.device.type != "cpu" or not is_result or not torch.is_grad_enabled():
        return x.relu()
    out: Tensor = _ReLU.apply(x)  # type: ignore[no-untyped-call]
    return out
