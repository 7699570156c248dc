"""What the forward of one layer leaves for its backward, chunk by chunk.

It is autograd's graph, with what that keeps in memory (``keep``); or the graph with what it keeps
on the host (``offload``); or a recipe for running the layer again (``recompute``): its input, and
of the tables what they will not hold any more.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from gnnpipe.kernels import SparseRows
from gnnpipe.reader import Kept, is_same_memory
from gnnpipe.view import View


class Record(NamedTuple):
    """One layer's graph of one chunk."""

    x: "Entry | None"
    """None where the rows have no gradient: input features."""
    carried: "dict[str, Entry]"
    out: GradientEdge | None
    handed_on: dict[str, GradientEdge | None]


class Recipe(NamedTuple):
    """What a layer is run on, for one chunk; enough to run it again."""

    x: Tensor | SparseRows | None
    """Its input; None where all that the backward needs of it lies in the layer's table."""
    carried: dict[str, Tensor]
    """What it reads of earlier layers."""
    kept: Kept | None
    """None where it will not be run again."""


class Entry:
    """Where a layer's graph ends: takes the gradient, and does not hold the values.

    Why not a leaf: it would keep the rows until the backward, whether or not anyone needs them.
    """

    def __init__(self, value: Tensor) -> None:
        self.grad: Tensor | None = None
        self._like = value.shape, value.dtype, value.device

    def rows(self, value: Tensor) -> Tensor:
        """The values, with this end behind them."""
        handle = value.new_zeros(()).requires_grad_()
        rows: Tensor = _Enter.apply(handle, value, self)  # type: ignore[no-untyped-call]
        return rows

    def gradient(self) -> Tensor:
        """What has arrived; zeros if the layer did not use the rows."""
        shape, dtype, device = self._like
        return torch.zeros(shape, dtype=dtype, device=device) if self.grad is None else self.grad


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, value: Tensor, entry: Entry) -> Tensor:  # Any: torch's
        ctx.entry = entry
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.entry.grad = grads[0]
        return None, None, None


def edge(value: Tensor) -> GradientEdge | None:
    """Where the backward of a value starts; the value itself need not be kept for it."""
    return get_gradient_edge(value) if value.requires_grad else None


class TableRows(saved_tensors_hooks):
    """While it is entered, autograd saves no rows that the layer's table holds at lower precision.

    Args:
        view: of the layer that runs.
        values: the table's rows of the cell.
    """

    def __init__(self, view: View, values: Tensor) -> None:
        def pack(saved: Tensor) -> tuple[torch.dtype | None, Tensor]:
            rows = view.in_table
            if rows is not None and is_same_memory(rows, saved):
                return saved.dtype, values
            return None, saved.detach()  # itself it would hold the graph that holds it

        def unpack(packed: tuple[torch.dtype | None, Tensor]) -> Tensor:
            dtype, saved = packed
            return saved if dtype is None else saved.to(dtype)

        super().__init__(pack, unpack)


class Offload(saved_tensors_hooks):
    """While it is entered, what autograd saves goes to host memory, and comes back when needed.

    Args:
        resident: tensors that stay in the device's memory anyway, such as tables and weights;
            parts of them are not copied.
        pins: whether host memory is pinned, so that copies need not be waited for.
    """

    def __init__(self, resident: Iterable[Tensor], *, pins: bool) -> None:
        places = {tensor.untyped_storage().data_ptr() for tensor in resident}

        def pack(saved: Tensor) -> tuple[torch.device | None, Tensor]:
            if saved.untyped_storage().data_ptr() in places:
                return None, saved.detach()  # itself it would hold the graph that holds it
            host = torch.empty_like(saved, device="cpu", pin_memory=pins)
            return saved.device, host.copy_(saved, non_blocking=pins)

        def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
            device, saved = packed
            return saved if device is None else saved.to(device, non_blocking=pins)

        super().__init__(pack, unpack)
