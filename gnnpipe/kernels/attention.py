"""Attention over the edges of a block, forward and backward, without a message per edge."""

from functools import cached_property
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from gnnpipe.kernels import attention_cpu as cpu
from gnnpipe.kernels.dropout import dropout_edges
from gnnpipe.kernels.sparse import backend_for

Array = np.ndarray[Any, Any]


class EdgeOrder:
    """The edges of a bipartite block by target and by source.

    Args:
        edge_index: ``[2, E]``, int64, sorted by target.
        num_sources: rows that sources count.
        num_targets: rows that targets count.
        backend: what attends, ``numba`` or ``torch``; None chooses by the device.
    """

    def __init__(
        self,
        edge_index: Tensor,
        *,
        num_sources: int,
        num_targets: int,
        backend: str | None = None,
    ) -> None:
        self.edge_index = edge_index
        self.backend = backend_for(edge_index.device, backend)
        self.num_targets = num_targets
        self._num_sources = num_sources

    @cached_property
    def by_target(self) -> tuple[Array, Array]:
        """Offsets of each target's edges, int64, and the sources, int32."""
        source, target = self.edge_index.numpy()
        return _offsets(target, self.num_targets), source.astype(np.int32)

    @cached_property
    def by_source(self) -> tuple[Array, Array, Array]:
        """Offsets of each source's edges, their targets and their places, both int32."""
        source, target = self.edge_index.numpy()
        order = np.argsort(source, kind="stable")
        offsets = _offsets(source, self._num_sources)
        return offsets, target[order].astype(np.int32), order.astype(np.int32)


class EdgeDrop(NamedTuple):
    """Dropout of attention: whose edges, how likely, which stream."""

    source_id: Tensor
    target_id: Tensor
    p: float
    key: int


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(  # Any: torch's context
        ctx: Any, x: Tensor, logit_src: Tensor, logit_dst: Tensor, *rest: Any
    ) -> Tensor:
        order, slope, drop = rest
        number = x.detach().numpy().dtype.type
        indptr, source = order.by_target
        heads = logit_src.shape[1]
        alpha = x.new_empty((source.size, heads))
        out = x.new_empty((indptr.size - 1, x.shape[1]))
        ctx.slope, ctx.order = number(slope), order
        arguments, ctx.scale = _drop_arguments(drop, number)
        arrays = [part.detach().contiguous().numpy() for part in (x, logit_src, logit_dst)]
        results = [part.numpy() for part in (alpha, torch.empty_like(alpha), out)]
        threads, work = numba.get_num_threads(), source.size * x.shape[1]
        cpu.attend(indptr, source, *arrays, ctx.slope, arguments, *results, threads, work=work)
        ctx.save_for_backward(x, logit_src, logit_dst, alpha, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, logit_src, logit_dst, alpha, out = ctx.saved_tensors
        grad, heads = grads[0].contiguous(), alpha.shape[1]
        shape = (out.shape[0], heads, out.shape[1] // heads)  # -1 fails without rows
        mean = (grad * out).view(shape).sum(2)  # [num_targets, heads]
        back = [torch.empty_like(part) for part in (alpha, x, logit_src)]
        inputs = [part.detach().contiguous().numpy() for part in (x, logit_src, logit_dst)]
        saved = [part.numpy() for part in (alpha, grad, mean, torch.empty_like(alpha))]
        threads, work = numba.get_num_threads(), alpha.shape[0] * x.shape[1]
        results = [part.numpy() for part in back]
        scales = ctx.slope, ctx.scale
        by_source = ctx.order.by_source
        cpu.attend_back(*by_source, *inputs, *scales, *saved, *results, threads, work=work)
        grad_dst = torch.empty_like(logit_dst)
        indptr, _ = ctx.order.by_target
        cpu.sum_edges(indptr, results[0], grad_dst.numpy(), work=alpha.numel())
        return back[1], back[2], grad_dst, None, None, None


def attend(
    x: Tensor,
    logit_src: Tensor,
    logit_dst: Tensor,
    *,
    order: EdgeOrder,
    slope: float,
    drop: EdgeDrop | None,
) -> Tensor:
    """Sums the sources of each target, weighted by softmax, head by head.

    ``alpha_e = softmax_i(leaky_relu(logit_src[j] + logit_dst[i]))`` over the edges j -> i, and
    ``out[i] = sum_e dropout(alpha_e) x[j]``.

    Args:
        x: rows of the sources, ``[num_sources, heads * C]``.
        logit_src: ``[num_sources, heads]``.
        logit_dst: ``[num_targets, heads]``.
        order: the edges.
        slope: of leaky_relu below zero.
        drop: dropout of alpha, or None.

    Returns:
        ``[num_targets, heads * C]``.
    """
    if order.backend != "numba":
        return attend_plainly(x, logit_src, logit_dst, order=order, slope=slope, drop=drop)
    rest = (order, slope, drop)
    out: Tensor = _Attend.apply(x, logit_src, logit_dst, *rest)  # type: ignore[no-untyped-call]
    return out


def attend_plainly(
    x: Tensor,
    logit_src: Tensor,
    logit_dst: Tensor,
    *,
    order: EdgeOrder,
    slope: float,
    drop: EdgeDrop | None,
) -> Tensor:
    """The same in plain torch, a message for each edge, for devices without a kernel."""
    source, target = order.edge_index
    logit = torch.nn.functional.leaky_relu(logit_src[source] + logit_dst[target], slope)
    shape = (logit_dst.shape[0], logit.shape[1])
    index = target.unsqueeze(1).expand_as(logit)
    top = logit.new_zeros(shape)
    top = top.scatter_reduce(0, index, logit.detach(), "amax", include_self=False)
    weight = (logit - top[target]).exp()
    alpha = weight / logit.new_zeros(shape).index_add(0, target, weight)[target]
    if drop is not None:
        alpha = dropout_edges(alpha, drop.source_id, drop.target_id, p=drop.p, key=drop.key)
    messages = alpha.unsqueeze(2) * x.view(x.shape[0], shape[1], -1)[source]
    return x.new_zeros((shape[0], x.shape[1])).index_add(0, target, messages.flatten(1))


def _drop_arguments(drop: EdgeDrop | None, number: Any) -> tuple[tuple[Any, ...], Any]:
    """What the kernel wants to know of a dropout, and the factor of what is kept."""
    if drop is None:
        nobody = np.empty(0, np.int64)
        return (nobody, nobody, np.uint64(0), np.uint32(0), number(1)), number(1)
    scale = number(1.0 / (1.0 - drop.p))
    threshold = np.uint32(min(round(drop.p * 2**32), 2**32 - 1))
    ids = drop.source_id.numpy(), drop.target_id.numpy()
    return (*ids, np.uint64(drop.key), threshold, scale), scale


def _offsets(rows: Array, num_rows: int) -> Array:
    return np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=num_rows))))
