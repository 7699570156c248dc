"""numba kernels for the CPU: rows are independent, so any number of threads gives the same bits.

Each function is compiled twice, alone and in parallel, because a parallel region costs more
than a small chunk. Compiled code is cached on disk beside this file, and made anew when this file
changes; after a change of vector.py alone empty ``__pycache__``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit, prange
from torch import Tensor

from gnnpipe.kernels.vector import VECTOR_BYTES, draw, keep_eight, rectify_eight, sum_row

Array = np.ndarray[Any, Any]

PARALLEL_MIN_WORK = 1 << 18
"""Numbers touched below which one thread is quicker than several."""

_U = np.uint64
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Kernel(NamedTuple):
    """One function, compiled for one thread and for several."""

    serial: Callable[..., None]
    parallel: Callable[..., None]

    def __call__(self, *args: Any, work: int) -> None:  # Any: numba dispatches on the arguments
        """Runs the variant that fits ``work``, the count of numbers touched."""
        self.chosen(work)(*args)

    def chosen(self, work: int) -> Callable[..., None]:
        """The variant that fits ``work``."""
        is_large = work >= PARALLEL_MIN_WORK and numba.get_num_threads() > 1
        return self.parallel if is_large else self.serial


def owns(x: Tensor) -> bool:
    """Whether these kernels are for a tensor; others take plain torch."""
    return x.device.type == "cpu"


def compiled(function: Callable[..., None], alone: Callable[..., None] | None = None) -> Kernel:
    return Kernel(
        njit(cache=True, nogil=True, fastmath={"contract"})(alone or function),
        njit(cache=True, nogil=True, fastmath={"contract"}, parallel=True)(function),
    )


@njit(cache=True, nogil=True, inline="always")
def mix(value):  # type: ignore[no-untyped-def]
    value = (value ^ (value >> _U(30))) * _MIX_1
    value = (value ^ (value >> _U(27))) * _MIX_2
    return value ^ (value >> _U(31))


@njit(cache=True, nogil=True)
def sum_columns(  # type: ignore[no-untyped-def]
    table, out, indices, weight, col_scale, gate, entries, row, columns, head
):
    """Some columns of one row of a product; literals pick the vectors that their end needs."""
    c, stop = columns
    lanes = VECTOR_BYTES // out.itemsize
    while stop - c > 7 * lanes:
        sum_row(8, table, out, indices, weight, col_scale, gate, entries, row, (c, stop), head)
        c += 8 * lanes
    left = (stop - c + lanes - 1) // lanes
    if left == 1:
        sum_row(1, table, out, indices, weight, col_scale, gate, entries, row, (c, stop), head)
    elif left == 2:
        sum_row(2, table, out, indices, weight, col_scale, gate, entries, row, (c, stop), head)
    elif left == 3:
        sum_row(3, table, out, indices, weight, col_scale, gate, entries, row, (c, stop), head)
    elif left == 4:
        sum_row(4, table, out, indices, weight, col_scale, gate, entries, row, (c, stop), head)
    elif left == 5:
        sum_row(5, table, out, indices, weight, col_scale, gate, entries, row, (c, stop), head)
    elif left == 6:
        sum_row(6, table, out, indices, weight, col_scale, gate, entries, row, (c, stop), head)
    elif left == 7:
        sum_row(7, table, out, indices, weight, col_scale, gate, entries, row, (c, stop), head)


@njit(cache=True, nogil=True)
def _sum_rows(  # type: ignore[no-untyped-def]
    indptr, indices, weight, row_scale, col_scale, gate, rows, table, out, first, last
):
    for k in range(first, last):
        i = k if rows is None else rows[k]
        entries, columns = (indptr[i], indptr[i + 1]), (0, out.shape[1])
        sum_columns(table, out, indices, weight, col_scale, gate, entries, i, columns, (0, 1))
        if row_scale is not None:
            for column in range(out.shape[1]):
                out[i, column] *= row_scale[i]


@njit(cache=True, nogil=True)
def row_at(indptr, share):  # type: ignore[no-untyped-def]
    """The row at a share of the work, where a row costs as much as four entries."""
    low, high = 0, indptr.shape[0] - 1
    wanted = share * (indptr[high] - indptr[0] + 4 * high)
    while low < high:
        middle = (low + high) // 2
        if indptr[middle] - indptr[0] + 4 * middle < wanted:
            low = middle + 1
        else:
            high = middle
    return low


def _aggregate(  # type: ignore[no-untyped-def]
    indptr, indices, weight, row_scale, col_scale, gate, rows, table, out, num_parts
):
    """``out[i] = row_scale[i] * sum_e weight[e] * col_scale[j_e] * gate[j_e] * table[j_e]``.

    Threads get parts with equal numbers of entries; which one computes a row changes no bit.
    """
    for part in prange(num_parts):
        if rows is None:
            first = row_at(indptr, part / num_parts)
            last = row_at(indptr, (part + 1) / num_parts)
        else:
            first = rows.shape[0] * part // num_parts
            last = rows.shape[0] * (part + 1) // num_parts
        _sum_rows(
            indptr, indices, weight, row_scale, col_scale, gate, rows, table, out, first, last
        )


def _aggregate_alone(  # type: ignore[no-untyped-def]
    indptr, indices, weight, row_scale, col_scale, gate, rows, table, out, num_parts
):
    num_rows = indptr.shape[0] - 1 if rows is None else rows.shape[0]
    _sum_rows(indptr, indices, weight, row_scale, col_scale, gate, rows, table, out, 0, num_rows)


def _dropout_rows(x, node_id, key, threshold, scale, out):  # type: ignore[no-untyped-def]
    for i in prange(x.shape[0]):
        row_key = mix((np.uint64(node_id[i]) * GOLDEN) ^ key)
        for column in range(x.shape[1]):
            keep = draw(row_key, column) >= threshold
            out[i, column] = x[i, column] * scale if keep else x.dtype.type(0)


def _dropout_in_place(x, node_id, key, threshold, scale):  # type: ignore[no-untyped-def]
    """``_dropout_rows`` into ``x`` itself: its loop is not vectorised where both are the same."""
    for i in prange(x.shape[0]):
        row_key = mix((np.uint64(node_id[i]) * GOLDEN) ^ key)
        for column in range(x.shape[1]):
            keep = draw(row_key, column) >= threshold
            x[i, column] = x[i, column] * scale if keep else x.dtype.type(0)


def _dropout_entries(  # type: ignore[no-untyped-def]
    indptr, indices, values, node_id, key, threshold, scale, out
):
    """The rule of ``_dropout_rows`` on the stored entries of sparse rows."""
    for i in prange(indptr.shape[0] - 1):
        row_key = mix((np.uint64(node_id[i]) * GOLDEN) ^ key)
        for e in range(indptr[i], indptr[i + 1]):
            keep = draw(row_key, indices[e]) >= threshold
            out[e] = values[e] * scale if keep else values.dtype.type(0)


def _dropout_edges(  # type: ignore[no-untyped-def]
    x, source_id, target_id, key, threshold, scale, out
):
    for e in prange(x.shape[0]):
        edge_key = mix((np.uint64(source_id[e]) * GOLDEN) ^ key)
        edge_key = mix((np.uint64(target_id[e]) * GOLDEN) ^ edge_key)
        for head in range(x.shape[1]):
            keep = draw(edge_key, head) >= threshold
            out[e, head] = x[e, head] * scale if keep else x.dtype.type(0)


def _rectify(x, mask):  # type: ignore[no-untyped-def]
    """``x = max(x, 0)`` in place for a flat ``x``; bit k of ``mask`` tells whether x[k] stays."""
    whole = x.shape[0] // 8
    for group in prange(whole):
        rectify_eight(x, mask, group)
    for k in range(8 * whole, x.shape[0]):
        if k % 8 == 0:
            mask[k // 8] = 0
        if x[k] <= 0:
            x[k] = 0
        else:
            mask[k // 8] |= np.uint8(1 << (k % 8))


def _keep(x, mask, out):  # type: ignore[no-untyped-def]
    whole = x.shape[0] // 8
    for group in prange(whole):
        keep_eight(x, mask, group, out)
    for k in range(8 * whole, x.shape[0]):
        out[k] = x[k] if (mask[k // 8] >> (k % 8)) & 1 else x.dtype.type(0)


rectify = compiled(_rectify)
keep = compiled(_keep)
aggregate = compiled(_aggregate, _aggregate_alone)
dropout_rows = compiled(_dropout_rows)
dropout_in_place = compiled(_dropout_in_place)
dropout_entries = compiled(_dropout_entries)
dropout_edges = compiled(_dropout_edges)
