"""Sparse products against dense matrices and plain torch."""

from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_features import sparse_rows
from torch import Tensor

from gnnpipe.kernels import (
    RowBlock,
    aggregate,
    dropout_rows,
    linear,
)

DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
MASK_32 = (1 << 32) - 1
NUM_COLUMNS = 7

# --- aggregation


class Matrix(NamedTuple):
    """A row block and the same matrix, dense."""

    block: RowBlock
    dense: Tensor


def matrix(
    counts: list[int], *, weight: bool, row_scale: bool, col_scale: bool, dtype: torch.dtype
) -> Matrix:
    """Rows with the given numbers of entries, columns at random, some of them twice."""
    generator = torch.Generator().manual_seed(sum(counts))
    indptr = torch.tensor([0, *counts]).cumsum(0)
    indices = torch.randint(NUM_COLUMNS, (sum(counts),), generator=generator)
    ws, rs, cs = (
        torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
        for size in (sum(counts), len(counts), NUM_COLUMNS)
    )
    dense = torch.zeros(len(counts), NUM_COLUMNS, dtype=torch.float64)
    for i in range(len(counts)):
        for e in range(int(indptr[i]), int(indptr[i + 1])):
            factor = float(ws[e]) if weight else 1.0
            factor *= float(rs[i]) if row_scale else 1.0
            factor *= float(cs[indices[e]]) if col_scale else 1.0
            dense[i, indices[e]] += factor
    block = RowBlock(
        indptr,
        indices.int(),
        weight=ws.to(dtype) if weight else None,
        row_scale=rs.to(dtype) if row_scale else None,
        col_scale=cs.to(dtype) if col_scale else None,
    )
    return Matrix(block, dense)


def table_of(num_channels: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(num_channels)
    values = torch.randn(NUM_COLUMNS, num_channels, generator=generator, dtype=torch.float64)
    return values.to(dtype)


# Four entries go at a time: rows on either side of one and two rounds, and empty ones.
COUNTS = [0, 1, 4, 0, 5, 3, 8, 9, 2, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weight", "row_scale", "col_scale"), list(product([False, True], repeat=3))
)
def test_aggregate_equals_the_dense_product(
    weight: bool, row_scale: bool, col_scale: bool, dtype: torch.dtype
) -> None:
    block, dense = matrix(
        COUNTS, weight=weight, row_scale=row_scale, col_scale=col_scale, dtype=dtype
    )
    table = table_of(6, dtype)
    close = partial(torch.testing.assert_close, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    expected = (dense @ table.double()).to(dtype)
    out = aggregate(block, table)
    assert out.dtype == dtype
    close(out, expected)
    close(block.matrix(NUM_COLUMNS, dtype) @ table, expected)
    for start, end in ((0, 10), (2, 5), (4, 4), (3, 4), (9, 10)):
        part = block.rows(start, end)
        assert part.num_rows == end - start
        assert part.num_entries == sum(COUNTS[start:end])
        assert torch.equal(aggregate(part, table), out[start:end])
        close(part.matrix(NUM_COLUMNS, dtype) @ table, expected[start:end])


# Widths on either side of a vector, and of eight of them, in both precisions.
@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 11), min_size=1, max_size=6),
    st.integers(1, 140),
    st.sampled_from(DTYPES),
)
def test_aggregate_of_any_shape_equals_the_dense_product(
    counts: list[int], num_channels: int, dtype: torch.dtype
) -> None:
    block, dense = matrix(counts, weight=True, row_scale=True, col_scale=True, dtype=dtype)
    table = table_of(num_channels, dtype)
    expected = (dense @ table.double()).to(dtype)
    close = {torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(aggregate(block, table), expected, rtol=close, atol=close)


def test_chosen_rows_alone_are_written() -> None:
    block, dense = matrix(
        COUNTS, weight=True, row_scale=True, col_scale=False, dtype=torch.float64
    )
    table, out = table_of(3, torch.float64), torch.full((10, 3), -1.0, dtype=torch.float64)
    rows = torch.tensor([0, 4, 7])
    assert aggregate(block, table, out=out, rows=rows) is out
    torch.testing.assert_close(out[rows], (dense @ table)[rows], rtol=1e-12, atol=1e-12)
    others = torch.tensor([1, 2, 3, 5, 6, 8, 9])
    assert (out[others] == -1.0).all()
    aggregate(block, table, out=out, rows=others)
    assert torch.equal(out, aggregate(block, table))
    assert torch.equal(out, aggregate(block, table, rows=torch.arange(10)))


def test_slices_share_the_arrays_of_their_matrix() -> None:
    block, _ = matrix(COUNTS, weight=True, row_scale=True, col_scale=True, dtype=torch.float32)
    part = block.rows(2, 8)
    assert part.weight is block.weight
    assert part.indices.data_ptr() == block.indices.data_ptr()
    assert part.numpy[0].base is not None


# --- sparse rows times a weight


def some_features() -> Tensor:
    dense = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    dense[dense.abs() < 0.6] = 0
    dense[4] = 0
    dense[:, 7] = 0  # a feature that no row has
    return dense


def test_transposed_order_is_that_of_columns() -> None:
    rows = sparse_rows(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0], [4.0, 0.0, 0.0]]))
    assert rows.shape == (3, 3)
    assert rows.transposed_indptr.tolist() == [0, 2, 2, 4]
    assert rows.transposed_indices.tolist() == [0, 2, 0, 1]
    assert rows.values[rows.transposed_order].tolist() == [1.0, 4.0, 2.0, 3.0]
    assert rows.indices.dtype == rows.transposed_indices.dtype == torch.int32


def test_products_equal_dense_ones() -> None:
    dense = some_features()
    rows = sparse_rows(dense)
    weight, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(rows.product(weight), dense @ weight)
    torch.testing.assert_close(rows.transposed_product(y), dense.T @ y)


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_of_sparse_rows_equals_that_of_dense_ones(has_bias: bool) -> None:
    dense = some_features()
    weight = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True) if has_bias else None
    inputs = [weight] if bias is None else [weight, bias]
    y = torch.randn(6, 4, dtype=torch.float64)
    results = []
    for x in (dense, sparse_rows(dense)):
        out = linear(x, weight, bias)
        results.append((out, *torch.autograd.grad((out * y).sum(), inputs)))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *a: linear(sparse_rows(dense), *a), inputs)


def test_dropped_out_sparse_rows_have_the_gradient_of_dropped_out_dense_ones() -> None:
    dense, ids = some_features(), torch.arange(6)
    weight = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(
            linear(dropout_rows(x, ids, p=0.4, key=3), weight).square().sum(), weight
        )
        for x in (dense, sparse_rows(dense))
    ]
    assert not torch.equal(grads[0][0], torch.zeros_like(weight))
    torch.testing.assert_close(grads[1], grads[0])


def test_numpy_sees_the_arrays_without_a_copy() -> None:
    block, _ = matrix(COUNTS, weight=True, row_scale=False, col_scale=False, dtype=torch.float64)
    indptr, indices, weight, row_scale, col_scale = block.numpy
    assert row_scale is None
    assert col_scale is None
    assert block.weight is not None
    weight[0] = 42.0
    assert block.weight[0] == 42.0
    assert (indptr.dtype, indices.dtype) == (np.int64, np.int32)
