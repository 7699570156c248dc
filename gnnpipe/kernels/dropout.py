"""Dropout whose mask is a function of what it is for: no state to keep, store or replay.

Entry (row, column) stays when a 32-bit hash of (key, row id, column) is at least ``p * 2^32``;
the key folds (seed, epoch, layer, site). The mask is drawn again in the backward.
"""

from collections.abc import Callable
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from gnnpipe.kernels import cpu, fallback
from gnnpipe.kernels.sparse import SparseRows

Drop = Callable[[Tensor, int | Tensor, Tensor | None], Tensor]
"""Drops entries of rows by a key, into a place."""


def _threshold(p: float) -> int:
    return min(round(p * 2**32), 2**32 - 1)


class _Ids(tuple[Tensor, ...]):
    """Ids of the rows: ``(node_id,)``, or ``(source_id, target_id)`` of edges."""

    __slots__ = ()


def _apply(x: Tensor, ids: _Ids, p: float, key: int | Tensor, out: Tensor | None = None) -> Tensor:
    threshold, scale = _threshold(p), 1.0 / (1.0 - p)
    if not cpu.owns(x):
        keys = fallback.keys(ids, key)
        factor = (fallback.keep_mask(keys, x.shape[1], threshold) * scale).to(x.dtype)
        return torch.mul(x, factor, out=out)
    arrays = [part.numpy() for part in (x, *ids)]
    arguments = (np.uint64(int(key)), np.uint32(threshold), arrays[0].dtype.type(scale))
    out = torch.empty_like(x) if out is None else out
    kernel = cpu.dropout_rows if len(ids) == 1 else cpu.dropout_edges
    kernel(*arrays, *arguments, out.numpy(), work=x.numel())
    return out


def prepare_drop(node_id: Tensor, *, p: float, like: Tensor) -> Drop:
    """:func:`dropout_rows` of dense rows outside autograd, for the same nodes again and again.

    Why: looking at tensors as numpy arrays takes as long as the rows of a small chunk do.

    Args:
        node_id: original id of each row's node.
        p: probability of a zero.
        like: rows such as will be dropped out, ``[num_rows, F]``.

    Returns:
        Drops entries of rows by a key into the third argument, which may be the rows, or into a
        new tensor. The key is unsigned; or the int64 with its bits on the rows' device, read when
        the kernel runs.
    """
    ids = _Ids((node_id,))
    if not cpu.owns(node_id):
        return lambda x, key, out: _apply(x, ids, p, key, out)
    places, threshold = node_id.numpy(), np.uint32(_threshold(p))
    scale = like.numpy().dtype.type(1.0 / (1.0 - p))
    copying, in_place = (
        kernel.chosen(like.numel()) for kernel in (cpu.dropout_rows, cpu.dropout_in_place)
    )

    def run(x: Tensor, key: int | Tensor, out: Tensor | None) -> Tensor:
        arguments = x.numpy(), places, np.uint64(int(key)), threshold, scale
        if out is x:
            in_place(*arguments)
            return x
        out = torch.empty_like(x) if out is None else out
        copying(*arguments, out.numpy())
        return out

    return run


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(  # Any: torch's context
        ctx: Any, x: Tensor, ids: _Ids, p: float, key: int, out: Tensor | None
    ) -> Tensor:
        ctx.arguments = ids, p, key
        return _apply(x.detach().contiguous(), ids, p, key, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(grads[0].contiguous(), *ctx.arguments), None, None, None, None


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(  # Any: torch's context
        ctx: Any, x: Tensor, ids: _Ids, p: float, key: int
    ) -> Tensor:
        ctx.arguments = ids, p, key
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(grads[0].contiguous(), *ctx.arguments), None, None, None


def dropped_rows(x: Tensor, node_id: Tensor, *, p: float, key: int) -> Tensor:
    """The result of an earlier :func:`dropout_rows` of the same rows, as if made again.

    Args:
        x: what it gave, ``[num_rows, F]``.
        node_id: as then.
        p: as then.
        key: as then.
    """
    rows: Tensor = _Dropped.apply(x, _Ids((node_id,)), p, key)  # type: ignore[no-untyped-call]
    return rows


@overload
def dropout_rows(
    x: Tensor, node_id: Tensor, *, p: float, key: int, out: Tensor | None = None
) -> Tensor: ...


@overload
def dropout_rows(x: SparseRows, node_id: Tensor, *, p: float, key: int) -> SparseRows: ...


def dropout_rows(
    x: Tensor | SparseRows, node_id: Tensor, *, p: float, key: int, out: Tensor | None = None
) -> Tensor | SparseRows:
    """Drops entries of rows, keyed by node id and column.

    Args:
        x: ``[num_rows, F]``, dense or sparse; of sparse rows the stored entries are dropped by
            the same rule, which equals dropping the dense matrix.
        node_id: original id of each row's node, ``[num_rows]``, int64.
        p: probability of a zero, in [0, 1).
        key: unsigned 64-bit key of the stream.
        out: where to write the dense result; None allocates.

    Returns:
        The kept entries times ``1 / (1 - p)``, zeros elsewhere.
    """
    if isinstance(x, Tensor):
        ids = _Ids((node_id,))
        dropped: Tensor = _Dropout.apply(x, ids, p, key, out)  # type: ignore[no-untyped-call]
        return dropped
    return x._replace(values=_apply_entries(x, node_id, p, key))


def _apply_entries(x: SparseRows, node_id: Tensor, p: float, key: int) -> Tensor:
    threshold, scale = _threshold(p), 1.0 / (1.0 - p)
    if not cpu.owns(x.values):
        keys = fallback.keys((node_id,), key).repeat_interleave(x.indptr.diff())
        mask = fallback.keep_entries(keys, x.indices, threshold)
        return x.values * (mask * scale).to(x.values.dtype)
    out = torch.empty_like(x.values)
    number = x.values.numpy().dtype.type
    arrays = (x.indptr.numpy(), x.indices.numpy(), x.values.numpy(), node_id.numpy())
    arguments = (np.uint64(key), np.uint32(threshold), number(scale), out.numpy())
    cpu.dropout_entries(*arrays, *arguments, work=out.numel())
    return out


def dropout_edges(
    x: Tensor, source_id: Tensor, target_id: Tensor, *, p: float, key: int
) -> Tensor:
    """Drops values on edges, keyed by source id, target id and head.

    Args:
        x: ``[E, heads]``.
        source_id: original id of each edge's source, ``[E]``, int64.
        target_id: original id of each edge's target, ``[E]``, int64.
        p: probability of a zero, in [0, 1).
        key: unsigned 64-bit key of the stream.
    """
    ids = _Ids((source_id, target_id))
    out: Tensor = _Dropout.apply(x, ids, p, key, None)  # type: ignore[no-untyped-call]
    return out
