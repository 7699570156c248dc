"""The largest value among the sources of each target, column by column.

Its gradient goes to the edge that won; among equal values that is the edge whose source has the
smallest id, so no numbering of the nodes and no cut into chunks decides.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from gnnpipe.kernels import cpu
from gnnpipe.kernels.attention import EdgeOrder


def _largest(indptr, source, source_id, x, out, winner):  # type: ignore[no-untyped-def]
    """``winner[i, c]`` is the edge whose source gives ``out[i, c]``; -1 without edges."""
    for i in prange(out.shape[0]):
        start, end = indptr[i], indptr[i + 1]
        for c in range(out.shape[1]):
            out[i, c] = 0
            winner[i, c] = -1
        for e in range(start, end):
            j = source[e]
            for c in range(out.shape[1]):
                best = winner[i, c]
                value = x[j, c]
                is_equal = value == out[i, c] and best >= 0
                # A NaN wins and stays, as in torch.
                is_more = best < 0 or not (value <= out[i, c] or out[i, c] != out[i, c])
                if is_more or (is_equal and source_id[e] < source_id[best]):
                    out[i, c] = value
                    winner[i, c] = e


def _to_sources(indptr, target, edge, grad, winner, out):  # type: ignore[no-untyped-def]
    """A thread owns a source, so nothing is added up by two of them."""
    for j in prange(out.shape[0]):
        for c in range(out.shape[1]):
            out[j, c] = 0
        for k in range(indptr[j], indptr[j + 1]):
            i, e = target[k], edge[k]
            for c in range(out.shape[1]):
                if winner[i, c] == e:
                    out[j, c] += grad[i, c]


_find = cpu.compiled(_largest)
_spread = cpu.compiled(_to_sources)


class _Largest(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, order: EdgeOrder, source_id: Tensor
    ) -> Tensor:  # Any: torch's
        indptr, source = order.by_target
        out = x.new_empty((indptr.size - 1, x.shape[1]))
        ctx.order, ctx.num_sources = order, x.shape[0]
        ctx.winner = np.empty(out.shape, np.int32)
        arrays = indptr, source, source_id.numpy(), x.detach().contiguous().numpy()
        _find(*arrays, out.numpy(), ctx.winner, work=source.size * x.shape[1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous()
        out = grad.new_empty((ctx.num_sources, grad.shape[1]))
        indptr, target, edge = ctx.order.by_source
        arrays = indptr, target, edge, grad.numpy(), ctx.winner, out.numpy()
        _spread(*arrays, work=target.size * grad.shape[1])
        return out, None, None


def largest(x: Tensor, *, order: EdgeOrder, source_id: Tensor) -> Tensor:
    """``out[i, c] = max x[j, c]`` over the edges j -> i; 0 where there are none.

    Args:
        x: rows of the sources, ``[num_sources, F]``.
        order: the edges.
        source_id: id of each edge's source, ``[E]``, int64, in the order of the edges.

    Returns:
        ``[num_targets, F]``.
    """
    if order.backend != "numba":
        return largest_plainly(x, order=order, source_id=source_id)
    out: Tensor = _Largest.apply(x, order, source_id)  # type: ignore[no-untyped-call]
    return out


def largest_plainly(x: Tensor, *, order: EdgeOrder, source_id: Tensor) -> Tensor:
    """The same in plain torch, a message for each edge, for devices without a kernel."""
    source, target = order.edge_index
    index = target.unsqueeze(1).expand(-1, x.shape[1])
    shape = (order.num_targets, x.shape[1])
    rows = x.detach()[source]
    top = rows.new_zeros(shape).scatter_reduce(0, index, rows, "amax", include_self=False)
    is_top = (rows == top[target]) | (rows.isnan() & top[target].isnan())
    place = torch.empty_like(source)
    place[source_id.argsort(stable=True)] = torch.arange(source.numel(), device=source.device)
    place = torch.where(is_top, place.unsqueeze(1), source.numel())
    first = torch.full(shape, source.numel(), device=source.device)
    first = first.scatter_reduce(0, index, place, "amin")
    chosen = torch.where(is_top & (place == first[target]), x[source], 0.0)
    return x.new_zeros(shape).index_add(0, target, chosen)
