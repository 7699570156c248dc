"""Rows of a sparse matrix, and their products with dense tables."""

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numba
import torch
from torch import Tensor

from gnnpipe.kernels import cpu

HALVES = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""As what the kernels read the bits of tables that numba has no arithmetic for."""


class RowBlock:
    """Some rows of a sparse matrix whose columns are the rows of a table.

    The matrix is ``diag(row_scale) @ (weight at indices) @ diag(col_scale)``; a missing factor
    is one. ``indptr`` holds absolute offsets, so blocks of one matrix share their arrays.

    Args:
        indptr: ``[num_rows + 1]``, int64, offsets into ``indices`` and ``weight``.
        indices: column of each entry, int32.
        weight: value of each entry, or None for ones.
        row_scale: factor of each row of the block, ``[num_rows]``, or None.
        col_scale: factor of each column, ``[num_columns]``, or None.
        backend: what multiplies it, ``numba``, ``torch`` or ``triton`` (float32 results; others
            are torch's); None chooses by the device.
    """

    def __init__(
        self,
        indptr: Tensor,
        indices: Tensor,
        *,
        weight: Tensor | None = None,
        row_scale: Tensor | None = None,
        col_scale: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        self.backend = backend_for(indices.device, backend)
        self.indptr = indptr
        self.indices = indices
        self.weight = weight
        self.row_scale = row_scale
        self.col_scale = col_scale
        self.num_rows = indptr.numel() - 1
        self.num_entries = int(indptr[-1] - indptr[0])

    def rows(self, start: int, end: int) -> "RowBlock":
        """The block of rows ``start:end``; nothing is copied."""
        return RowBlock(
            self.indptr[start : end + 1],
            self.indices,
            weight=self.weight,
            row_scale=None if self.row_scale is None else self.row_scale[start:end],
            col_scale=self.col_scale,
            backend=self.backend,
        )

    def empty_product(self, table: Tensor) -> Tensor:
        """Memory for the product with a table, whose sums are float32 at least."""
        dtype = torch.promote_types(table.dtype, torch.float32)
        return table.new_empty((self.num_rows, table.shape[1]), dtype=dtype)

    @cached_property
    def numpy(self) -> tuple[Any, ...]:  # Any: numpy arrays of several dtypes, or None
        """The five arrays as numpy sees them, without a copy."""
        parts = (self.indptr, self.indices, self.weight, self.row_scale, self.col_scale)
        return tuple(None if part is None else part.numpy() for part in parts)

    def matrix(self, num_columns: int, dtype: torch.dtype) -> Tensor:
        """The block as a torch CSR tensor ``[num_rows, num_columns]``, built on first use."""
        if self._matrix is None:
            self._matrix = self._build_matrix(num_columns, dtype)
        return self._matrix

    _matrix: Tensor | None = None

    def _build_matrix(self, num_columns: int, dtype: torch.dtype) -> Tensor:
        start, end = int(self.indptr[0]), int(self.indptr[-1])
        indices = self.indices[start:end].long()
        values = torch.ones(end - start, dtype=dtype, device=indices.device)
        if self.weight is not None:
            values = values * self.weight[start:end]
        if self.col_scale is not None:
            values = values * self.col_scale[indices]
        if self.row_scale is not None:
            values = values * self.row_scale.repeat_interleave(self.indptr.diff())
        size = (self.num_rows, num_columns)
        with warnings.catch_warnings():  # Once per process torch says that CSR is young.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            # Checks by name: left to the default, torch warns that it does not check.
            return torch.sparse_csr_tensor(
                self.indptr - start, indices, values, size, check_invariants=False
            )


def backend_for(device: torch.device, wanted: str | None) -> str:
    """What multiplies on a device: numba on CPUs, torch elsewhere, unless something is wanted."""
    if wanted is not None:
        return wanted
    return "numba" if device.type == "cpu" else "torch"


def aggregate(
    block: RowBlock,
    table: Tensor,
    *,
    out: Tensor | None = None,
    rows: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Multiplies a row block with a table.

    ``out[i] = row_scale[i] * sum_e weight[e] * col_scale[j_e] * gate[j_e] * table[j_e]`` over
    the entries ``e`` of row ``i``.

    Args:
        block: the rows.
        table: ``[num_columns, F]``, contiguous, float32 or float64; or bfloat16 or float16,
            whose sums are float32.
        out: where to write, ``[block.num_rows, F]``; None allocates.
        rows: rows of the block to compute, int64, ascending; None is all of them.
        gate: factor of each table row, ``[num_columns]``, of the result's dtype; None is one. A
            row whose factor is zero is not read, so it may hold anything.

    Returns:
        ``[block.num_rows, F]``.
    """
    out = block.empty_product(table) if out is None else out
    return prepare(block, table, rows=rows, gate=gate)(out)


def prepare(
    block: RowBlock, table: Tensor, *, rows: Tensor | None, gate: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """:func:`aggregate` of whatever the table and the gate hold when the result is called.

    Why: looking at tensors as numpy arrays takes as long as the rows of a small chunk do.
    """
    if block.backend == "triton" and table.dtype != torch.float64:
        from gnnpipe.kernels import gpu  # Triton is optional, and heavy

        return gpu.prepare(block, table, rows, gate)
    if block.backend != "numba":
        return lambda out: _in_torch(block, table, out, rows, gate)
    kernel = cpu.aggregate.chosen(block.num_entries * table.shape[1])
    chosen = None if rows is None else rows.numpy()
    gates = None if gate is None else gate.numpy()
    bits = HALVES.get(table.dtype)
    numbers = (table if bits is None else table.view(bits)).numpy()
    arrays = (*block.numpy, gates, chosen, numbers)
    num_parts = numba.get_num_threads()

    def run(out: Tensor) -> Tensor:
        kernel(*arrays, out.numpy(), num_parts)
        return out

    return run


def _in_torch(
    block: RowBlock, table: Tensor, out: Tensor, rows: Tensor | None, gate: Tensor | None
) -> Tensor:
    table = table.to(out.dtype)
    if gate is not None:
        table = torch.where(gate[:, None] != 0, table * gate[:, None], 0.0)
    product = block.matrix(table.shape[0], table.dtype) @ table
    return out.copy_(product) if rows is None else out.index_copy_(0, rows, product[rows])


class SparseRows(NamedTuple):
    """Some rows of a sparse feature matrix, in CSR.

    The transposed order is kept beside it for the gradient of a weight that it multiplies.
    """

    indptr: Tensor
    """``[num_rows + 1]``, int64, from 0."""
    indices: Tensor
    """Column of each entry, int32."""
    values: Tensor
    """Value of each entry."""
    transposed_indptr: Tensor
    """``[num_columns + 1]``, int64."""
    transposed_indices: Tensor
    """Row of each entry in column order, int32."""
    transposed_order: Tensor
    """Position in ``values`` of each entry in column order, int64."""

    @staticmethod
    def from_csr(
        indptr: Tensor, indices: Tensor, values: Tensor, num_columns: int
    ) -> "SparseRows":
        """Builds the transposed order of CSR arrays whose ``indptr`` starts at 0."""
        order = torch.argsort(indices, stable=True)
        row = torch.arange(indptr.numel() - 1, device=indptr.device)
        row = row.repeat_interleave(indptr.diff()).int()
        count = torch.bincount(indices.long(), minlength=num_columns)
        transposed = torch.zeros(num_columns + 1, dtype=torch.int64, device=indptr.device)
        torch.cumsum(count, 0, out=transposed[1:])
        return SparseRows(indptr, indices, values, transposed, row[order], order)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.indptr.numel() - 1, self.transposed_indptr.numel() - 1

    def product(self, weight: Tensor) -> Tensor:
        """``self @ weight``."""
        return aggregate(RowBlock(self.indptr, self.indices, weight=self.values), weight)

    def transposed_product(self, y: Tensor) -> Tensor:
        """``self.T @ y``."""
        values = self.values[self.transposed_order]
        block = RowBlock(self.transposed_indptr, self.transposed_indices, weight=values)
        return aggregate(block, y)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: SparseRows) -> Tensor:  # Any: torch's context
        ctx.x = x
        return x.product(weight.detach().t().contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.x.transposed_product(grads[0].contiguous()).t(), None


def linear(x: Tensor | SparseRows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for dense or sparse rows.

    Args:
        x: ``[num_rows, in_channels]``.
        weight: ``[out_channels, in_channels]``.
        bias: ``[out_channels]`` or None.

    Returns:
        ``[num_rows, out_channels]``.
    """
    if isinstance(x, Tensor):
        return torch.nn.functional.linear(x, weight, bias)
    out: Tensor = _SparseLinear.apply(weight, x)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias
