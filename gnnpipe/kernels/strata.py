"""Sums over strata of rows, and their way back to the rows, for :mod:`gnnpipe.compensation`.

With n rows of H numbers, G strata, and shares ``[n, G]`` most of which are 0. What is asked for
chunk by chunk is prepared once, as looking at tensors as numpy arrays takes as long as the rows of
a small chunk do. On CPUs each call reads its rows once; elsewhere torch multiplies.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from gnnpipe.kernels import cpu
from gnnpipe.kernels.sparse import RowBlock, aggregate

Call = Callable[[], object]
RowsCall = Callable[[Tensor], object]
"""Reads or changes some rows, ``[n, H]``."""


def stale_shares(block: RowBlock, stale: Tensor, *, out: Tensor) -> Tensor:
    """``out[i, g] = sum of the entries of row i in the columns j with stale[j] = g``.

    Args:
        block: some rows of a sparse matrix.
        stale: stratum of each column, -1 for none, ``[num_columns]``, int32.
        out: where to write, ``[n, G]``.
    """
    if block.backend != "numba":
        return aggregate(block, indicator(stale, like=out), out=out)
    _stale_shares(*block.numpy, stale.numpy(), out.numpy(), work=block.num_entries)
    return out


def indicator(stratum: Tensor, *, like: Tensor) -> Tensor:
    """1 where a row belongs to a stratum, ``[n, G]``; ``like`` has G columns."""
    strata = torch.arange(like.shape[1], device=stratum.device)
    return (stratum[:, None] == strata).to(like.dtype)


def prepare_sum(rows: Tensor, stratum: Tensor, *, out: Tensor) -> Call:
    """``out[g] = sum of rows[i] over the i with stratum[i] = g``.

    Args:
        rows: ``[n, H]``.
        stratum: of each row, ``[n]``, int32.
        out: where to write, ``[G, H]``.
    """
    if not cpu.owns(rows):
        members = indicator(stratum, like=out.t()).t()
        return lambda: torch.mm(members, rows.to(out.dtype), out=out)
    kernel, arrays = _sum.chosen(rows.numel()), (stratum.numpy(), out.numpy())
    num_parts = numba.get_num_threads()
    if rows.dtype != out.dtype:
        return lambda: kernel(rows.to(out.dtype).numpy(), *arrays, num_parts)
    numbers = rows.numpy()
    return lambda: kernel(numbers, *arrays, num_parts)


def prepare_move(
    fresh: Tensor, known: Tensor, drift: Tensor, *, means: Tensor, shares: Tensor
) -> RowsCall:
    """``drift += fresh - known``, ``known = fresh``, and then ``out += shares @ means @ drift``.

    Args:
        fresh: ``[G, H]``.
        known: ``[G, H]``.
        drift: ``[G, H]``.
        means: ``[G, G]``.
        shares: ``[n, G]``.

    Returns:
        Does it to ``out``, ``[n, H]``.
    """
    if not cpu.owns(drift):

        def run(out: Tensor) -> Tensor:
            drift.add_(fresh).sub_(known)
            known.copy_(fresh)
            return out.addmm_(shares, means @ drift)

        return run
    kernel = _move.chosen(shares.shape[0] * drift.shape[1])
    arrays = [part.numpy() for part in (fresh, known, drift, means, shares)]
    return lambda out: kernel(*arrays, out.numpy())


def prepare_collect(shares: Tensor, *, out: Tensor) -> RowsCall:
    """``out = shares.T @ rows``.

    Args:
        shares: ``[n, G]``.
        out: where to write, ``[G, H]``.
    """
    if not cpu.owns(out):
        return lambda rows: torch.mm(shares.t(), rows, out=out)
    kernel = _collect.chosen(shares.shape[0] * out.shape[1])
    arrays, num_parts = (shares.numpy(), out.numpy()), numba.get_num_threads()
    return lambda rows: kernel(*arrays, rows.numpy(), num_parts)


def prepare_pay(
    part: Tensor, owed: Tensor, *, means: Tensor, stratum: Tensor, factor: float
) -> RowsCall:
    """``out[i] += (owed + due)[stratum[i]]`` and ``owed += factor due``, ``due = means.T @ part``.

    Args:
        part: ``[G, H]``.
        owed: ``[G, H]``.
        means: ``[G, G]``.
        stratum: of each row, ``[n]``, int32.
        factor: of what is owed to others.

    Returns:
        Does it to ``out``, ``[n, H]``.
    """
    if not cpu.owns(owed):
        members = indicator(stratum, like=means)

        def run(out: Tensor) -> Tensor:
            due = means.t() @ part
            out.addmm_(members, owed + due)
            return owed.add_(due, alpha=factor)

        return run
    kernel = _pay.chosen(stratum.shape[0] * owed.shape[1])
    arrays = [rows.numpy() for rows in (part, owed, means, stratum)]
    scale = arrays[1].dtype.type(factor)
    return lambda out: kernel(*arrays, scale, out.numpy())


# Where all rows add up, threads share the columns: each sums in the order of the rows.


@njit(cache=True, nogil=True)
def _sum_columns(rows, stratum, out, first, last):  # type: ignore[no-untyped-def]
    out[:, first:last] = 0
    for i in range(rows.shape[0]):
        g = stratum[i]
        for column in range(first, last):
            out[g, column] += rows[i, column]


def _sum_in_parts(rows, stratum, out, num_parts):  # type: ignore[no-untyped-def]
    width = rows.shape[1]
    for part in prange(num_parts):
        first, last = width * part // num_parts, width * (part + 1) // num_parts
        _sum_columns(rows, stratum, out, first, last)


def _sum_alone(rows, stratum, out, num_parts):  # type: ignore[no-untyped-def]
    _sum_columns(rows, stratum, out, 0, rows.shape[1])


@njit(cache=True, nogil=True)
def _collect_columns(shares, out, rows, first, last):  # type: ignore[no-untyped-def]
    out[:, first:last] = 0
    for i in range(rows.shape[0]):
        for g in range(shares.shape[1]):
            share = shares[i, g]
            if share != 0:
                for column in range(first, last):
                    out[g, column] += share * rows[i, column]


def _collect_in_parts(shares, out, rows, num_parts):  # type: ignore[no-untyped-def]
    width = rows.shape[1]
    for part in prange(num_parts):
        first, last = width * part // num_parts, width * (part + 1) // num_parts
        _collect_columns(shares, out, rows, first, last)


def _collect_alone(shares, out, rows, num_parts):  # type: ignore[no-untyped-def]
    _collect_columns(shares, out, rows, 0, rows.shape[1])


@njit(cache=True, nogil=True)
def _product(a, b):  # type: ignore[no-untyped-def]
    """``a @ b`` of small matrices."""
    out = np.zeros((a.shape[0], b.shape[1]), b.dtype)
    for i in range(a.shape[0]):
        for k in range(a.shape[1]):
            for column in range(b.shape[1]):
                out[i, column] += a[i, k] * b[k, column]
    return out


def _move_rows(fresh, known, drift, means, shares, out):  # type: ignore[no-untyped-def]
    for g in range(drift.shape[0]):
        for column in range(drift.shape[1]):
            drift[g, column] += fresh[g, column] - known[g, column]
            known[g, column] = fresh[g, column]
    shift = _product(means, drift)
    for i in prange(out.shape[0]):
        for g in range(shares.shape[1]):
            share = shares[i, g]
            if share != 0:
                for column in range(out.shape[1]):
                    out[i, column] += share * shift[g, column]


def _pay_rows(part, owed, means, stratum, factor, out):  # type: ignore[no-untyped-def]
    due = _product(means.T, part)
    total = owed + due
    for g in range(owed.shape[0]):
        for column in range(owed.shape[1]):
            owed[g, column] += factor * due[g, column]
    for i in prange(out.shape[0]):
        g = stratum[i]
        for column in range(out.shape[1]):
            out[i, column] += total[g, column]


def _shares(  # type: ignore[no-untyped-def]
    indptr, indices, weight, row_scale, col_scale, stale, out
):
    for i in prange(out.shape[0]):
        out[i] = 0
        for e in range(indptr[i], indptr[i + 1]):
            g = stale[indices[e]]
            if g >= 0:
                value = out.dtype.type(1)
                if weight is not None:
                    value *= weight[e]
                if col_scale is not None:
                    value *= col_scale[indices[e]]
                out[i, g] += value
        if row_scale is not None:
            for g in range(out.shape[1]):
                out[i, g] *= row_scale[i]


_sum = cpu.compiled(_sum_in_parts, _sum_alone)
_collect = cpu.compiled(_collect_in_parts, _collect_alone)
_move = cpu.compiled(_move_rows)
_pay = cpu.compiled(_pay_rows)
_stale_shares = cpu.compiled(_shares)
