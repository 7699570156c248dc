"""Tables of fresh and historical values: drawn numbers, the method's calendar, several ways."""

import pytest
import torch
from drawn import cut, graph_of, woven
from one_table import Alone, Way, look
from torch import Tensor

from gnnpipe.reader import Reader


def leaf(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1).requires_grad_()


# --- drawn numbers

#   0 --- 1 --- 2    every node its own chunk; `sum` adds the neighbours up
CHAIN = [(0, 1), (1, 0), (1, 2), (2, 1)]


def chain() -> Way:
    return Way(cut(graph_of(3, CHAIN), [0, 1, 2]), "sum")


def test_a_row_is_fresh_from_its_chunk_on() -> None:
    way = chain()
    table = way.table()
    table.values.copy_(torch.tensor([[100.0], [200.0], [300.0]]))
    table.start_epoch(1)
    read = {}
    for chunk, value in ((1, 2.0), (2, 3.0), (0, 1.0)):
        reader = Reader(table, way.cells.chunks[chunk], Alone(), factor=1.0)
        read[chunk] = reader.aggregate(leaf([value])).item()
    # chunk 1 came first and read two old rows; chunks 2 and 0 read the new row 1
    assert read == {1: 100.0 + 300.0, 2: 2.0, 0: 2.0}
    assert table.values.flatten().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_gradients_come_from_later_chunks_times_the_factor(factor: float) -> None:
    way = chain()
    table = way.table()
    table.start_epoch(1)
    inputs, outputs = {}, {}
    for chunk in (1, 2, 0):
        reader = Reader(table, way.cells.chunks[chunk], Alone(), factor=factor)
        inputs[chunk] = leaf([1.0])
        outputs[chunk] = reader.aggregate(inputs[chunk])
    for chunk, gradient in ((0, 10.0), (2, 30.0), (1, 20.0)):
        torch.autograd.backward(outputs[chunk], torch.tensor([[gradient]], dtype=torch.float64))
    grads = {chunk: float(x.grad) for chunk, x in inputs.items() if x.grad is not None}
    # 0 and 2 read the fresh row 1; row 1 itself read what was historical
    assert grads == {0: 0.0, 2: 0.0, 1: factor * (10.0 + 30.0)}


def test_edges_inside_a_chunk_have_factor_one() -> None:
    way = Way(cut(graph_of(3, [*CHAIN, (2, 2)]), [0, 0, 0]), "sum")
    table, x = way.table(), leaf([1.0, 1.0, 1.0])
    table.start_epoch(1)
    out = Reader(table, way.cells.chunks[0], Alone(), factor=2.0).aggregate(x)
    torch.autograd.backward(out, torch.tensor([[10.0], [20.0], [30.0]], dtype=torch.float64))
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [20.0, 40.0, 50.0]


def test_gradients_of_an_epoch_do_not_reach_the_next() -> None:
    way = chain()
    table = way.table()
    for epoch in (1, 2):
        table.start_epoch(epoch)
        assert not table.gate.any()
        cell, x = way.cells.chunks[1], leaf([1.0])
        out = Reader(table, cell, Alone(), factor=2.0).aggregate(x)
        torch.autograd.backward(out, torch.ones_like(out))
        assert x.grad is not None
        assert x.grad.item() == 0.0
        assert table.gradients.any()


def test_gathered_rows_are_own_rows_then_the_halo() -> None:
    way = Way(cut(graph_of(3, CHAIN), [0, 1, 1]), "edges")
    table = way.table()
    table.values.copy_(torch.tensor([[100.0], [200.0], [300.0]]))
    table.start_epoch(1)
    reader = Reader(table, way.cells.chunks[1], Alone(), factor=1.0)
    assert reader.gather(leaf([2.0, 3.0])).flatten().tolist() == [2.0, 3.0, 100.0]
    assert table.values.flatten().tolist() == [100.0, 2.0, 3.0]


# --- the calendar


def calendar(period: int, *, epochs: int, warm: float | None = None) -> list[float]:
    """What each epoch finds in a row that epoch e overwrites with e."""
    table = chain().table(period=period)
    if warm is not None:
        table.values.fill_(warm)
        table.warm()
    found = []
    for epoch in range(1, epochs + 1):
        table.start_epoch(epoch)
        found.append(table.values[0].item())
        table.values.fill_(epoch)
        table.end_epoch(epoch)
    return found


def test_a_period_of_one_finds_last_epochs_values() -> None:
    assert calendar(1, epochs=4) == [0, 1, 2, 3]
    assert calendar(1, epochs=4, warm=-1.0) == [-1, 1, 2, 3]


def test_a_period_of_three_freezes_every_third_epochs_values() -> None:
    assert calendar(3, epochs=7) == [0, 0, 0, 3, 3, 3, 6]
    assert calendar(3, epochs=7, warm=-1.0) == [-1, -1, -1, 3, 3, 3, 6]


@pytest.mark.parametrize("period", [1, 2, 3, 23])
def test_calendar_equals_the_published_loop(period: int) -> None:
    # Its epochs e count from 0: A := H unless e mod P = 0; H := A when (e + 1) mod P = 0.
    A, H, expected = 0.0, 0.0, []
    for e in range(50):
        if e % period != 0:
            A = H
        expected.append(A)
        A = float(e + 1)
        if (e + 1) % period == 0:
            H = A
    assert calendar(period, epochs=50) == expected


def test_only_a_period_needs_a_snapshot() -> None:
    way = chain()
    assert way.table(4).num_bytes == 2 * 3 * 4 * 8
    assert way.table(4, period=2).num_bytes == 3 * 3 * 4 * 8


# --- drift


def test_drift_is_the_change_from_historical_to_fresh() -> None:
    way = chain()
    table = way.table()
    table.values.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
    table.start_epoch(1, is_measured=True)
    for chunk, value in ((0, 1.0), (2, 5.0), (1, 0.0)):
        Reader(table, way.cells.chunks[chunk], Alone(), factor=1.0).aggregate(leaf([value]))
    assert table.drift is not None
    assert table.drift.tolist() == [0.0 + 4.0 + 4.0, 1.0 + 25.0 + 0.0]
    table.end_epoch(1)
    Reader(table, way.cells.chunks[0], Alone(), factor=1.0).aggregate(leaf([9.0]))
    assert table.measured is not None
    assert table.measured.tolist() == [8.0, 26.0]
    table.start_epoch(2)
    assert table.measured is None


# --- gradients


@pytest.mark.parametrize("operator", ["sum", "mean", "gcn", "edges", "edges_self"])
def test_one_chunk_passes_gradcheck(operator: str) -> None:
    graph = woven(9, is_directed=True, is_weighted=True)
    way = Way(cut(graph, [0] * 9), operator)
    table, cell = way.table(2), way.cells.chunks[0]

    def read(x: Tensor) -> Tensor:
        table.start_epoch(1)
        return look(Reader(table, cell, Alone(), factor=2.0), x)

    x = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(read, (x,), nondet_tol=0.0)
