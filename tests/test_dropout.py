"""The counter-based dropout against its rule in Python's integers and in plain torch."""

from itertools import product

import pytest
import torch
from sparse_features import sparse_rows, to_dense

from gnnpipe.counter import GOLDEN_64, MASK_64, mix, stream_key
from gnnpipe.kernels import (
    SparseRows,
    dropout_edges,
    dropout_rows,
    fallback,
)

DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
MASK_32 = (1 << 32) - 1
NUM_COLUMNS = 7

# --- dropout


def scalar_factor(key: int, ids: tuple[int, ...], column: int, p: float) -> float:
    """The rule, number by number, in Python's integers."""
    row = key
    for part in ids:
        row = mix(((part * GOLDEN_64) & MASK_64) ^ row)
    z = (row & MASK_32) ^ ((column * 0x9E3779B9) & MASK_32)
    z = (z + (row >> 32)) & MASK_32
    z ^= z >> 16
    z = (z * 0x7FEB352D) & MASK_32
    z ^= z >> 15
    z = (z * 0x846CA68B) & MASK_32
    z ^= z >> 16
    return 1.0 / (1.0 - p) if z >= round(p * 2**32) else 0.0


KEYS = [0, 1, 2**63 - 1, 2**63, MASK_64, stream_key(3, 1, 4, 1)]
IDS = [0, 1, 2, 2**31 - 1, 2**31, 2**40 + 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_row_dropout_equals_the_scalar_rule(p: float, dtype: torch.dtype) -> None:
    x = torch.rand(len(IDS), 17, dtype=dtype) + 1.0
    for key in KEYS:
        out = dropout_rows(x, torch.tensor(IDS), p=p, key=key)
        factors = [[scalar_factor(key, (i,), c, p) for c in range(17)] for i in IDS]
        expected = torch.tensor(factors, dtype=torch.float64).to(dtype) * x
        assert torch.equal(out == 0, expected == 0)
        torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_edge_dropout_equals_the_scalar_rule(p: float) -> None:
    sources, targets = IDS, [5, 0, 2**35, 1, 1, 7]
    for key in KEYS:
        alpha = torch.ones(len(IDS), 4, dtype=torch.float64)
        out = dropout_edges(alpha, torch.tensor(sources), torch.tensor(targets), p=p, key=key)
        factors = [
            [scalar_factor(key, ends, head, p) for head in range(4)]
            for ends in zip(sources, targets, strict=True)
        ]
        assert out.tolist() == factors


def test_both_ends_of_an_edge_matter() -> None:
    ones, a, b = torch.ones(1, 64), torch.tensor([3]), torch.tensor([8])
    there, back = dropout_edges(ones, a, b, p=0.5, key=1), dropout_edges(ones, b, a, p=0.5, key=1)
    assert not torch.equal(there, back)
    assert not torch.equal(there, dropout_rows(ones, a, p=0.5, key=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_of_sparse_rows_equals_that_of_dense_ones(dtype: torch.dtype) -> None:
    dense = torch.rand(len(IDS), 13, dtype=dtype)
    dense[dense < 0.5] = 0
    dense[2] = 0  # a row without entries
    rows = sparse_rows(dense)
    assert torch.equal(to_dense(rows), dense)
    out = dropout_rows(rows, torch.tensor(IDS), p=0.3, key=11)
    expected = dropout_rows(dense, torch.tensor(IDS), p=0.3, key=11)
    assert torch.equal(to_dense(out), expected)
    assert out.indices is rows.indices
    assert torch.equal(to_dense(rows), dense)  # the features themselves stay


def test_dropout_equals_plain_torch() -> None:
    ids, others = torch.tensor(IDS), torch.tensor(IDS[::-1])
    ones = torch.ones(len(IDS), 33)
    for key, p in product(KEYS, (0.2, 0.5)):
        keep = fallback.keep_mask(fallback.keys((ids,), key), 33, round(p * 2**32))
        assert torch.equal(dropout_rows(ones, ids, p=p, key=key) != 0, keep)
        keep = fallback.keep_mask(fallback.keys((ids, others), key), 33, round(p * 2**32))
        assert torch.equal(dropout_edges(ones, ids, others, p=p, key=key) != 0, keep)
        columns = torch.arange(len(IDS), dtype=torch.int32) * 5
        entries = fallback.keep_entries(fallback.keys((ids,), key), columns, round(p * 2**32))
        rows = SparseRows.from_csr(torch.arange(len(IDS) + 1), columns, torch.ones(len(IDS)), 26)
        dropped = dropout_rows(rows, ids, p=p, key=key)
        assert torch.equal(dropped.values != 0, entries)


def test_dropout_of_some_rows_is_theirs_in_any_order() -> None:
    x, ids = torch.randn(50, 8), torch.arange(50)
    some = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20]
    everything = dropout_rows(x, ids, p=0.5, key=5)
    assert torch.equal(dropout_rows(x[some], ids[some], p=0.5, key=5), everything[some])


def test_dropout_near_one_keeps_next_to_nothing() -> None:
    x = torch.ones(100, 100)
    assert (dropout_rows(x, torch.arange(100), p=1 - 2**-40, key=5) != 0).sum() <= 1


def test_dropout_takes_rows_that_are_not_contiguous() -> None:
    x, ids = torch.randn(6, 9).t(), torch.arange(9)
    out = dropout_rows(x, ids, p=0.5, key=2)
    assert torch.equal(out, dropout_rows(x.contiguous(), ids, p=0.5, key=2))


def test_dropout_has_the_gradient_of_its_mask() -> None:
    x = torch.randn(len(IDS), 5, dtype=torch.float64, requires_grad=True)
    ids, others = torch.tensor(IDS), torch.tensor(IDS[::-1])
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda x: dropout_rows(x, ids, p=0.5, key=8), (x,))
    assert gradcheck(lambda x: dropout_edges(x, ids, others, p=0.5, key=8), (x,))
