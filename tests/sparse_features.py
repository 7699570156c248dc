"""Sparse feature rows and the dense matrix that they stand for."""

import torch
from torch import Tensor

from gnnpipe.kernels import SparseRows


def sparse_rows(dense: Tensor) -> SparseRows:
    row, column = dense.nonzero(as_tuple=True)
    indptr = torch.bincount(row, minlength=dense.shape[0]).cumsum(0)
    indptr = torch.cat((indptr.new_zeros(1), indptr))
    return SparseRows.from_csr(indptr, column.int(), dense[row, column], dense.shape[1])


def to_dense(rows: SparseRows) -> Tensor:
    dense = torch.zeros(rows.shape, dtype=rows.values.dtype)
    row = torch.arange(rows.shape[0]).repeat_interleave(rows.indptr.diff())
    return dense.index_put((row, rows.indices.long()), rows.values, accumulate=True)
