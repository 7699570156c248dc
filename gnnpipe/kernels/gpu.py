"""Triton kernels for GPUs: rows of a sparse matrix times a table, a program for each row.

No two programs add to one row, so sums are deterministic. Sums are float32 whatever the table
holds. Rows are binned by their number of entries: a program takes as many at a time as fit its
bin, so that short rows do not wait beside long ones. Imported only where Triton is wanted.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gnnpipe.kernels.sparse import RowBlock

BINS = ((0, 4, 4), (4, 32, 16), (32, 1 << 62, 64))
"""Rows of more entries than the first number and at most the second take the third at a time."""
COLUMNS = 128
"""Columns of one program, at most."""


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(  # type: ignore[no-untyped-def]
    rows, indptr, indices, weight, row_scale, col_scale, gate, table, out, width,
    HAS_WEIGHT: tl.constexpr, HAS_ROW: tl.constexpr, HAS_COL: tl.constexpr,
    HAS_GATE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out[i] = row_scale[i] * sum_e weight[e] * col_scale[j_e] * gate[j_e] * table[j_e]``."""
    i = tl.load(rows + tl.program_id(0))
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(indptr + i), tl.load(indptr + i + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(start, end, ENTRIES):
        e = first + tl.arange(0, ENTRIES)
        inside = e < end
        j = tl.load(indices + e, mask=inside, other=0).to(tl.int64)
        factor = tl.where(inside, 1.0, 0.0)
        if HAS_WEIGHT:
            factor = factor * tl.load(weight + e, mask=inside, other=0.0)
        if HAS_COL:
            factor = factor * tl.load(col_scale + j, mask=inside, other=0.0)
        if HAS_GATE:
            factor = factor * tl.load(gate + j, mask=inside, other=0.0)
        # Rows behind a closed gate may hold anything: they are not read.
        wanted = (inside & (factor != 0.0))[:, None] & (columns < width)[None, :]
        part = tl.load(table + j[:, None] * width + columns[None, :], mask=wanted, other=0.0)
        total += tl.sum(part.to(tl.float32) * factor[:, None], axis=0)
    if HAS_ROW:
        total = total * tl.load(row_scale + i)
    tl.store(out + i * width + columns, total, mask=columns < width)


def prepare(
    block: RowBlock, table: Tensor, rows: Tensor | None, gate: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """:func:`gnnpipe.kernels.sparse.prepare` for float32, bfloat16 and float16 tables.

    Counting the bins asks the device and waits for it, so it is done here, once.
    """
    width = table.shape[1]
    columns = min(COLUMNS, triton.next_power_of_2(width))
    factors = (block.weight, block.row_scale, block.col_scale, gate)
    uses = [part is not None for part in factors]
    bins = _bins(block, rows)

    def run(out: Tensor) -> Tensor:
        arrays = [out if part is None else part for part in factors]
        for chosen, entries in bins:
            grid = (chosen.numel(), triton.cdiv(width, columns))
            _sum_rows[grid](
                chosen, block.indptr, block.indices, *arrays, table, out, width,
                *uses, entries, columns,
            )  # fmt: skip
        return out

    return run


def _bins(block: RowBlock, rows: Tensor | None) -> list[tuple[Tensor, int]]:
    """Rows of about the same number of entries, and how many entries to take at a time."""
    counts = block.indptr.diff() if rows is None else block.indptr.diff()[rows]
    found = []
    for low, high, entries in BINS:
        is_here = (counts <= high) & ((counts > low) | (low == 0))
        here = torch.nonzero(is_here).squeeze(1)
        if here.numel():
            found.append((here if rows is None else rows[here], entries))
    return found
