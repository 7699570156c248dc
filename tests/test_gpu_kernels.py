"""Triton's kernels, run by its interpreter on the CPU: the same sums as numba's."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

PROGRAM = """
import torch
from gnnpipe.kernels import RowBlock, aggregate
torch.manual_seed(0)
counts = torch.tensor([0, 1, 3, 40, 5, 70])
indptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
indices = torch.randint(9, (int(indptr[-1]),)).int()
full = {"weight": torch.rand(indices.numel()), "row_scale": torch.rand(6)}
full["col_scale"] = torch.rand(9)
gate = torch.tensor([1.0, 0, 2, 1, 0, 1, 1, 1, 1])
for width, factors in ((5, {}), (150, full)):
    blocks = [
        RowBlock(indptr, indices, backend=each, **factors).rows(1, 6)
        for each in ("numba", "triton")
    ]
    for dtype in (torch.float32, torch.bfloat16):
        table = torch.randn(9, width)
        table[1] = float("nan")  # Behind a closed gate: must not be read.
        table = table.to(dtype)
        one, other = (aggregate(block, table, gate=gate) for block in blocks)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        rows = torch.tensor([0, 3])
        outs = [torch.full((5, width), -1.0) for _ in blocks]
        for block, out in zip(blocks, outs):
            aggregate(block, table, gate=gate, rows=rows, out=out)
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
        assert (outs[1][[1, 2, 4]] == -1).all()
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is optional: no GPU, no Triton")
def test_triton_sums_what_numba_sums() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
