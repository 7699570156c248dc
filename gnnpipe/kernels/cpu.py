"""numba kernels for the CPU: rows are independent, so any number of threads gives the same bits.

Each function is compiled twice, alone and in parallel, because a parallel region costs more
than a small chunk. Compiled code is cached on disk beside this file.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit, prange

Array = np.ndarray[Any, Any]

PARALLEL_MIN_WORK = 1 << 18
"""Numbers touched below which one thread is quicker than several."""

_U = np.uint64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Kernel(NamedTuple):
    """One function, compiled for one thread and for several."""

    serial: Callable[..., None]
    parallel: Callable[..., None]

    def __call__(self, *args: Any, work: int) -> None:  # Any: numba dispatches on the arguments
        """Runs the variant that fits ``work``, the count of numbers touched."""
        is_large = work >= PARALLEL_MIN_WORK and numba.get_num_threads() > 1
        (self.parallel if is_large else self.serial)(*args)


def _compile(function: Callable[..., None]) -> Kernel:
    return Kernel(
        njit(cache=True, nogil=True, fastmath={"contract"})(function),
        njit(cache=True, nogil=True, fastmath={"contract"}, parallel=True)(function),
    )


@njit(cache=True, nogil=True, inline="always")
def _mix(value):  # type: ignore[no-untyped-def]
    value = (value ^ (value >> _U(30))) * _MIX_1
    value = (value ^ (value >> _U(27))) * _MIX_2
    return value ^ (value >> _U(31))


@njit(cache=True, nogil=True, inline="always")
def _draw(row_key, column):  # type: ignore[no-untyped-def]
    """32 random bits for one column of a row."""
    z = np.uint32(row_key) ^ np.uint32(np.uint32(column) * np.uint32(0x9E3779B9))
    z = np.uint32(z + np.uint32(row_key >> _U(32)))
    z = np.uint32(z ^ (z >> np.uint32(16)))
    z = np.uint32(z * np.uint32(0x7FEB352D))
    z = np.uint32(z ^ (z >> np.uint32(15)))
    z = np.uint32(z * np.uint32(0x846CA68B))
    return np.uint32(z ^ (z >> np.uint32(16)))


@njit(cache=True, nogil=True, inline="always")
def _factor(e, indices, weight, col_scale, one):  # type: ignore[no-untyped-def]
    factor = one
    if weight is not None:
        factor *= weight[e]
    if col_scale is not None:
        factor *= col_scale[indices[e]]
    return factor


def _aggregate(  # type: ignore[no-untyped-def]
    indptr, indices, weight, row_scale, col_scale, rows, table, out
):
    """``out[i] = row_scale[i] * sum_e weight[e] * col_scale[j_e] * table[j_e]`` for i in rows."""
    num_columns = table.shape[1]
    one = table.dtype.type(1)
    num_rows = out.shape[0] if rows is None else rows.shape[0]
    for k in prange(num_rows):
        i = k if rows is None else rows[k]
        row = out[i]
        row[:] = 0
        e = indptr[i]
        end = indptr[i + 1]
        # Four edges at a time: each row of `out` is loaded and stored once per four sources.
        while e + 4 <= end:
            a = _factor(e, indices, weight, col_scale, one)
            b = _factor(e + 1, indices, weight, col_scale, one)
            c = _factor(e + 2, indices, weight, col_scale, one)
            d = _factor(e + 3, indices, weight, col_scale, one)
            x, y = table[indices[e]], table[indices[e + 1]]
            z, w = table[indices[e + 2]], table[indices[e + 3]]
            for column in range(num_columns):
                row[column] += (a * x[column] + b * y[column]) + (c * z[column] + d * w[column])
            e += 4
        while e < end:
            a = _factor(e, indices, weight, col_scale, one)
            x = table[indices[e]]
            for column in range(num_columns):
                row[column] += a * x[column]
            e += 1
        if row_scale is not None:
            for column in range(num_columns):
                row[column] *= row_scale[i]


def _dropout_rows(x, node_id, key, threshold, scale, out):  # type: ignore[no-untyped-def]
    for i in prange(x.shape[0]):
        row_key = _mix((np.uint64(node_id[i]) * _GOLDEN) ^ key)
        for column in range(x.shape[1]):
            keep = _draw(row_key, column) >= threshold
            out[i, column] = x[i, column] * scale if keep else x.dtype.type(0)


def _dropout_entries(  # type: ignore[no-untyped-def]
    indptr, indices, values, node_id, key, threshold, scale, out
):
    """The rule of ``_dropout_rows`` on the stored entries of sparse rows."""
    for i in prange(indptr.shape[0] - 1):
        row_key = _mix((np.uint64(node_id[i]) * _GOLDEN) ^ key)
        for e in range(indptr[i], indptr[i + 1]):
            keep = _draw(row_key, indices[e]) >= threshold
            out[e] = values[e] * scale if keep else values.dtype.type(0)


def _dropout_edges(  # type: ignore[no-untyped-def]
    x, source_id, target_id, key, threshold, scale, out
):
    for e in prange(x.shape[0]):
        edge_key = _mix((np.uint64(source_id[e]) * _GOLDEN) ^ key)
        edge_key = _mix((np.uint64(target_id[e]) * _GOLDEN) ^ edge_key)
        for head in range(x.shape[1]):
            keep = _draw(edge_key, head) >= threshold
            out[e, head] = x[e, head] * scale if keep else x.dtype.type(0)


aggregate = _compile(_aggregate)
dropout_rows = _compile(_dropout_rows)
dropout_entries = _compile(_dropout_entries)
dropout_edges = _compile(_dropout_edges)
