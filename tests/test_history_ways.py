"""Tables of several ways, run as threads of one process, against the table of one way."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import permutations
from queue import Queue

import pytest
import torch
from drawn import cut, woven
from one_table import Alone, Way, look
from torch import Tensor

from gnnpipe.cell import Exchange
from gnnpipe.reader import Halo, Reader

TIMEOUT_S = 30


class Mailbox:
    """Trades rows between ways that run as threads of this process."""

    def __init__(self) -> None:
        self._queues: defaultdict[tuple[int, int], Queue[Tensor]] = defaultdict(Queue)

    def of(self, way: int) -> Halo:
        return _Trader(self._queues, way)


class _Trader:
    def __init__(self, queues: defaultdict[tuple[int, int], Queue[Tensor]], way: int) -> None:
        self._queues = queues
        self._way = way

    def pull(self, table: Tensor, exchanges: Sequence[Exchange]) -> Callable[[], None]:
        for exchange in exchanges:
            self._queues[self._way, exchange.peer].put(table[exchange.send].clone())
        # Until somebody waits, whoever reads a mirror of this chunk finds nonsense.
        for exchange in exchanges:
            table[exchange.receive] = torch.nan

        def wait() -> None:
            for exchange in exchanges:
                table[exchange.receive] = self._take(exchange.peer)

        return wait

    def push(self, table: Tensor, exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            self._queues[self._way, exchange.peer].put(table[exchange.receive].clone())
        for exchange in exchanges:
            table.index_add_(0, exchange.send, self._take(exchange.peer))

    def add_up(self, numbers: Tensor) -> Tensor:
        raise AssertionError("no layer with a norm here")

    def start_add_up(self, numbers: Tensor) -> Callable[[], None]:
        raise AssertionError("no row moves here")

    def _take(self, peer: int) -> Tensor:
        return self._queues[peer, self._way].get(timeout=TIMEOUT_S)


def epochs_of_one_way(
    x: Tensor, gradient: Tensor, orders: Sequence[Sequence[int]], *, way: Way, halo: Halo
) -> tuple[Tensor, Tensor]:
    """Outputs and input gradients of the last of some epochs, in the rows' original places."""
    table, out_rows = way.table(x.shape[1]), torch.zeros_like(x)
    grad_rows = torch.zeros_like(x)
    for epoch, order in enumerate(orders, start=1):
        table.start_epoch(epoch)
        graphs = {}
        for chunk in order:
            cell = way.cells.chunks[chunk]
            rows = (x[cell.node_id] * epoch).requires_grad_()
            graphs[chunk] = rows, look(Reader(table, cell, halo, factor=2.0), rows)
            out_rows[cell.node_id] = graphs[chunk][1].detach()
        for chunk in reversed(order):
            cell = way.cells.chunks[chunk]
            rows, out = graphs[chunk]
            torch.autograd.backward(out, gradient[cell.node_id])
            assert rows.grad is not None
            grad_rows[cell.node_id] = rows.grad
        table.end_epoch(epoch)
    return out_rows, grad_rows


@pytest.mark.parametrize("is_directed", [False, True])
@pytest.mark.parametrize("num_ways", [2, 3, 4])
@pytest.mark.parametrize("operator", ["sum", "mean", "gcn", "edges", "edges_self"])
def test_any_number_of_ways_computes_the_same(
    operator: str, num_ways: int, is_directed: bool
) -> None:
    graph = woven(is_directed=is_directed, is_weighted=True)
    draw = torch.Generator().manual_seed(3)
    way_id = torch.randint(4, (24,), generator=draw).tolist()
    way_id[5] = 3  # chunk 2 of three has nobody on way 1
    way_id = [3 if node % 3 == 2 and way == 1 else way for node, way in enumerate(way_id)]
    chunked = cut(graph, [node % 3 for node in range(24)], way_id)
    x, gradient = torch.randn(2, 24, 5, dtype=torch.float64, generator=draw)
    orders = [list(order) for order in list(permutations(range(3)))[1:4]]
    compute = partial(epochs_of_one_way, x, gradient, orders)
    expected = compute(way=Way(chunked, operator), halo=Alone())
    mailbox = Mailbox()
    ways = [Way(chunked, operator, way=way, num_ways=num_ways) for way in range(num_ways)]
    halos = [mailbox.of(way) for way in range(num_ways)]
    with ThreadPoolExecutor(num_ways) as pool:
        jobs = [pool.submit(compute, way=w, halo=h) for w, h in zip(ways, halos, strict=True)]
        parts = [job.result() for job in jobs]
    for found, whole in zip(zip(*parts, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.stack(found).sum(0), whole, rtol=1e-12, atol=1e-12)
