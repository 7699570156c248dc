"""Kernels on several threads: the same bits as on one, and only where the work is worth it."""

from typing import Any

import numba
import pytest
import torch
from sparse_features import sparse_rows

from gnnpipe.kernels import RowBlock, aggregate, cpu, dropout_edges, dropout_rows


class Spy:
    """Counts the calls of a compiled function."""

    def __init__(self, function: Any) -> None:  # Any: numba's dispatcher
        self.function = function
        self.num_calls = 0

    def __call__(self, *arguments: Any) -> None:  # Any: as above
        self.num_calls += 1
        self.function(*arguments)


def spied(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Spy, Spy]:
    kernel = getattr(cpu, name)
    serial, parallel = Spy(kernel.serial), Spy(kernel.parallel)
    monkeypatch.setattr(cpu, name, cpu.Kernel(serial, parallel))
    return serial, parallel


@pytest.mark.usefixtures("two_threads")
def test_parallel_aggregate_is_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = torch.tensor([(i * 7) % 13 for i in range(400)])
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    num_entries = int(counts.sum())
    block = RowBlock(
        indptr,
        torch.randint(50, (num_entries,)).int(),
        weight=torch.rand(num_entries),
        row_scale=torch.rand(400),
        col_scale=torch.rand(50),
    )
    table = torch.randn(50, 5)
    serial, parallel = spied("aggregate", monkeypatch)
    one = aggregate(block, table)
    assert (serial.num_calls, parallel.num_calls) == (1, 0)
    monkeypatch.setattr(cpu, "PARALLEL_MIN_WORK", block.num_entries * 5)
    several = aggregate(block, table)
    assert (serial.num_calls, parallel.num_calls) == (1, 1)
    assert torch.equal(one, several)
    monkeypatch.setattr(cpu, "PARALLEL_MIN_WORK", block.num_entries * 5 + 1)
    aggregate(block, table)
    assert (serial.num_calls, parallel.num_calls) == (2, 1)


@pytest.mark.usefixtures("two_threads")
def test_parallel_dropout_is_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    x, node_id = torch.randn(301, 7), torch.arange(301) * 5
    features = sparse_rows(x)
    edges = (node_id, node_id.flip(0))
    one = dropout_rows(x, node_id, p=0.4, key=9)
    one_edge = dropout_edges(x, *edges, p=0.4, key=9)
    one_sparse = dropout_rows(features, node_id, p=0.4, key=9)
    spies = [spied(f"dropout_{kind}", monkeypatch) for kind in ("rows", "edges", "entries")]
    monkeypatch.setattr(cpu, "PARALLEL_MIN_WORK", 1)
    assert torch.equal(dropout_rows(x, node_id, p=0.4, key=9), one)
    assert torch.equal(dropout_edges(x, *edges, p=0.4, key=9), one_edge)
    several = dropout_rows(features, node_id, p=0.4, key=9)
    assert torch.equal(several.values, one_sparse.values)
    assert [(serial.num_calls, parallel.num_calls) for serial, parallel in spies] == [(0, 1)] * 3


def test_one_thread_never_takes_the_parallel_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    serial, parallel = spied("dropout_rows", monkeypatch)
    monkeypatch.setattr(cpu, "PARALLEL_MIN_WORK", 1)
    dropout_rows(torch.ones(9, 9), torch.arange(9), p=0.5, key=1)
    numba.set_num_threads(before)
    assert (serial.num_calls, parallel.num_calls) == (1, 0)
