"""Dense products in bfloat16 of rows in float32: operands are rounded, sums and results are not.

What is saved for the backward are the rows as they are, which mostly lie in a table anyway. Why
not torch's autocast: it would save rounded copies, and hand rounded results to kernels that know
none.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class HalfProducts(TorchFunctionMode):
    """While it is entered, products of float32 matrices round their operands to bfloat16."""

    def __torch_function__(  # Any: whatever torch calls
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        if func is torch.nn.functional.linear and not keywords and are_matrices(*args[:2]):
            out = product(args[0], args[1].t())
            bias = args[2] if len(args) > 2 else None
            return out if bias is None else out + bias
        if func in PRODUCTS and not keywords and are_matrices(*args):
            return product(*args)
        return func(*args, **keywords)


def are_matrices(*parts: Any) -> bool:
    """Whether all are float32 matrices with all their entries."""
    return all(
        isinstance(part, Tensor)
        and part.dtype == torch.float32
        and part.ndim == 2
        and part.layout == torch.strided
        for part in parts
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with operands rounded to bfloat16, float32 sums and a float32 result.

    Args:
        a: ``[n, k]``.
        b: ``[k, m]``.
    """
    out: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # Any: torch's context
        ctx.save_for_backward(a, b)
        return _rounded(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        return (
            _rounded(grads[0], b.t()) if needs_a else None,
            _rounded(a.t(), grads[0]) if needs_b else None,
        )


def _rounded(a: Tensor, b: Tensor) -> Tensor:
    return (a.bfloat16() @ b.bfloat16()).to(a.dtype)


def multiply(
    a: Tensor, b: Tensor, *, out: Tensor, base: Tensor | None = None, is_half: bool = False
) -> Tensor:
    """``base + a @ b``, outside autograd.

    Args:
        a: ``[n, k]``.
        b: ``[k, m]``.
        out: the result, ``[n, m]``; may be ``base``.
        base: ``[n, m]``, ``[m]``, or None for 0.
        is_half: round operands to bfloat16, where they are float32.
    """
    if is_half and are_matrices(a, b):
        rounded = _rounded(a, b)
        return out.copy_(rounded) if base is None else torch.add(base, rounded, out=out)
    return torch.mm(a, b, out=out) if base is None else torch.addmm(base, a, b, out=out)


def half_products_gain() -> bool:
    """Whether this CPU has instructions that make them quicker than float32's."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
