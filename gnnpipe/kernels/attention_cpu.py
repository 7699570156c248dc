"""Attention over the edges of a block, row by row: nothing as wide as edges times channels.

A thread owns a target in the forward and a source in the backward, so nothing is added up by
two of them. A dropped-out coefficient is kept with its sign turned: one number says both.
"""

from typing import Any

import numpy as np
from numba import njit, prange

from gnnpipe.kernels.cpu import GOLDEN, compiled, mix, row_at, sum_columns
from gnnpipe.kernels.vector import draw

Array = np.ndarray[Any, Any]


@njit(cache=True, nogil=True)
def _softmax_row(entries, source, logit_src, logit_dst, i, slope, alpha):  # type: ignore[no-untyped-def]
    """``alpha[e] = softmax_e(leaky_relu(logit_src[j_e] + logit_dst[i]))`` for one target."""
    start, end = entries
    for head in range(logit_src.shape[1]):
        top = -np.inf
        for e in range(start, end):
            logit = logit_src[source[e], head] + logit_dst[i, head]
            logit = logit if logit > 0 else logit * slope
            alpha[e, head] = logit
            top = max(top, logit)
        total = 0.0
        for e in range(start, end):
            alpha[e, head] = np.exp(alpha[e, head] - alpha.dtype.type(top))
            total += alpha[e, head]
        for e in range(start, end):
            alpha[e, head] /= alpha.dtype.type(total)


@njit(cache=True, nogil=True)
def _drop_row(entries, source_id, target_id, key, threshold, alpha):  # type: ignore[no-untyped-def]
    for e in range(entries[0], entries[1]):
        edge_key = mix((np.uint64(source_id[e]) * GOLDEN) ^ key)
        edge_key = mix((np.uint64(target_id[e]) * GOLDEN) ^ edge_key)
        for head in range(alpha.shape[1]):
            if draw(edge_key, head) < threshold:
                alpha[e, head] = -alpha[e, head]


def _attend(  # type: ignore[no-untyped-def]
    indptr, source, x, logit_src, logit_dst, slope, drop, alpha, weight, out, num_parts
):
    """``out[i] = sum_e dropout(alpha_e) x[j_e]``, head by head; ``weight`` is dropout(alpha)."""
    heads = alpha.shape[1]
    size = x.shape[1] // heads
    source_id, target_id, key, threshold, scale = drop
    flat = weight.reshape(-1)
    for part in prange(num_parts):
        first, last = row_at(indptr, part / num_parts), row_at(indptr, (part + 1) / num_parts)
        for i in range(first, last):
            entries = (indptr[i], indptr[i + 1])
            _softmax_row(entries, source, logit_src, logit_dst, i, slope, alpha)
            if threshold > 0:
                _drop_row(entries, source_id, target_id, key, threshold, alpha)
            for e in range(entries[0], entries[1]):
                for h in range(heads):
                    weight[e, h] = max(alpha[e, h], 0) * scale
            for h in range(heads):
                columns = (h * size, (h + 1) * size)
                sum_columns(x, out, source, flat, None, None, entries, i, columns, (h, heads))


@njit(cache=True, nogil=True, fastmath=True)
def _dot(a, b, first, last):  # type: ignore[no-untyped-def]
    total = a.dtype.type(0)
    for c in range(first, last):
        total += a[c] * b[c]
    return total


def _attend_back(  # type: ignore[no-untyped-def]
    indptr, target, edge, x, logit_src, logit_dst, slope, scale, alpha, grad, mean, weight,
    grad_logit, grad_x, grad_src, num_parts
):  # fmt: skip
    """Source by source: gradients of its row, of its logits, and of each edge's logit.

    ``mean[i]`` is ``sum_e alpha_e dalpha_e`` of target i, which equals ``grad[i] . out[i]``;
    ``weight`` is scratch in the order of sources.
    """
    heads = alpha.shape[1]
    size = x.shape[1] // heads
    flat = weight.reshape(-1)
    for part in prange(num_parts):
        first, last = row_at(indptr, part / num_parts), row_at(indptr, (part + 1) / num_parts)
        for j in range(first, last):
            entries = (indptr[j], indptr[j + 1])
            for h in range(heads):
                grad_src[j, h] = 0
            for e in range(entries[0], entries[1]):
                i, place = target[e], edge[e]
                for h in range(heads):
                    a = alpha[place, h]
                    kept = max(a, 0) * scale
                    weight[e, h] = kept
                    back = -abs(a) * mean[i, h]
                    if kept > 0:
                        back += kept * _dot(grad[i], x[j], h * size, (h + 1) * size)
                    if logit_src[j, h] + logit_dst[i, h] <= 0:
                        back *= slope
                    grad_logit[place, h] = back
                    grad_src[j, h] += back
            for h in range(heads):
                columns = (h * size, (h + 1) * size)
                sum_columns(
                    grad, grad_x, target, flat, None, None, entries, j, columns, (h, heads)
                )


def _sum_edges(indptr, values, out):  # type: ignore[no-untyped-def]
    """``out[i] = sum_e values[e]`` over the edges of target i."""
    for i in prange(out.shape[0]):
        for h in range(out.shape[1]):
            out[i, h] = 0
        for e in range(indptr[i], indptr[i + 1]):
            for h in range(out.shape[1]):
                out[i, h] += values[e, h]


attend = compiled(_attend)
attend_back = compiled(_attend_back)
sum_edges = compiled(_sum_edges)
