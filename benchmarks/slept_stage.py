"""A stage that sleeps as long as its layers were measured to take, and sends real messages.

With more ranks than cores, wall time would measure the operating system's scheduler. Each layer's
single-threaded time is measured alone beforehand; here it is slept. Tables, halo exchanges, the
order of actions and every message are the engine's own; only the numbers are zeros.

The emulated time runs K times slower than the clock (time dilation: Gupta et al., "To Infinity
and Beyond: Time-Warped Network Emulation", NSDI 2006). Sleeps are K times as long and links have
a K-th of their speed, so what the ranks really do on the cores they share weighs a K-th. What a
host of their own would spend on a message, they sleep as they do a layer's time.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gnnpipe.cell import Edges
from gnnpipe.comm import Comm, Kind, Pending
from gnnpipe.costs import Line, Profile, role_of
from gnnpipe.kernels import RowBlock
from gnnpipe.messages import Message
from gnnpipe.stage import Flow, LocalLayer, Stage

SHORTEST_S = 5e-4
"""Shorter sleeps are saved up until a message has to wait for them."""


class Sleeper:
    """Lets emulated time pass.

    Args:
        dilation: seconds of the clock for one emulated second.
    """

    def __init__(self, dilation: float) -> None:
        self.dilation = dilation
        self._owed_s = 0.0

    def spend(self, seconds: float) -> None:
        """Passes emulated seconds, now or with the next ones."""
        self._owed_s += seconds * self.dilation
        if self._owed_s > SHORTEST_S:
            self.settle()

    def sleep(self, seconds: float) -> None:
        """Passes emulated seconds now, with what is owed."""
        self.spend(seconds)
        self.settle()

    def stretch(self, seconds: float) -> None:
        """Makes work that takes so long by the clock take as long in emulated time."""
        self.spend(seconds * (1.0 - 1.0 / self.dilation))

    def settle(self) -> None:
        """Sleeps what is owed; what a sleep overshoots is taken off the next."""
        if self._owed_s <= 0:
            return
        start_s = time.perf_counter()
        time.sleep(self._owed_s)
        self._owed_s -= time.perf_counter() - start_s


class SleptComm(Comm):
    """Messages whose work for the sender and the receiver takes emulated time."""

    sleeper: Sleeper
    profile: Profile

    def send(self, tensor: Tensor, message: Message) -> None:
        """A message leaves when the work on it is done."""
        self._work(1, 0)
        super().send(tensor, message)

    def receive(self, message: Message) -> Pending:
        """Posting and taking it is work too."""
        self._work(1, 0)
        return super().receive(message)

    def trade(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        kind: Kind,
    ) -> Callable[[], None]:
        """Rows for other ways are collected first."""
        counts = [payload.nbytes for _, payload in sends] + [0] * len(receives)
        self._work(len(counts), sum(counts))
        return super().trade(sends, receives, kind)

    def _work(self, num_messages: int, packed_bytes: int) -> None:
        self.sleeper.stretch(self.profile.message_s(num_messages, packed_bytes))
        self.sleeper.settle()


class Shape(NamedTuple):
    """What durations depend on."""

    profile: Profile
    num_layers: int


class SleptStage:
    """Stands in for a stage.

    Args:
        stage: the real one, for its layers, tables and exchanges.
        comm: messages.
        shape: durations.
        sleeper: lets them pass.
    """

    def __init__(self, stage: Stage, comm: Comm, shape: Shape, sleeper: Sleeper) -> None:
        self.layers = stage.layers
        self.tables = stage.tables
        self._comm = comm
        self._shape = shape
        self._sleeper = sleeper
        for local in self.layers:
            for parameter in local.layer.parameters():
                parameter.grad = torch.zeros_like(parameter)

    @property
    def parameters(self) -> Any:
        """As a stage's."""
        return (p for local in self.layers for p in local.layer.parameters())

    def start_epoch(self, epoch: int, *, is_measured: bool = False) -> None:
        """Nothing to prepare."""

    def start_step(self) -> None:
        """Nothing to forget."""

    def end_step(self, *, has_backward: bool = True) -> None:
        """Sleeps what is left."""
        assert has_backward
        self._sleeper.settle()

    def end_epoch(self) -> None:
        """Nothing to keep."""

    def enter(self, chunk_index: int) -> None:
        """Sleeps what a stage does once for a chunk."""
        local = next((local for local in self.layers if local.table is not None), None)
        if local is None or local.table.compensation is None:
            return
        cell = local.cells.chunks[chunk_index]
        num_edges = _num_edges(cell.forward, cell.edges)
        self._sleeper.spend(
            self._shape.profile.enter.seconds(cell.rows.stop - cell.rows.start, num_edges)
        )

    def forward(self, chunk_index: int, flow: Flow) -> Flow:
        """Sleeps and trades halos; returns zeros of the right shape."""
        carried = dict(flow.carried)
        num_rows = 0
        for local in self.layers:
            num_rows = self._layer(local, chunk_index, "F")
            for name in local.layer.writes:
                carried[name] = torch.zeros(num_rows, local.layer.carried_channels(name))
        self._sleeper.settle()
        return Flow(torch.zeros(num_rows, self.layers[-1].layer.out_channels), carried)

    def backward(
        self,
        chunk_index: int,
        gradient: Flow,
        *,
        layer_done: Callable[[int], None] | None = None,
        is_split: bool = False,
    ) -> Flow:
        """The same in reverse."""
        carried = dict(gradient.carried)
        num_rows = 0
        for local in reversed(self.layers):
            num_rows = self._layer(local, chunk_index, "I" if is_split else "B")
            for name in local.layer.reads:
                carried.setdefault(name, torch.zeros(num_rows, local.layer.in_channels))
            for name in local.layer.writes:
                carried.pop(name, None)
            if layer_done is not None:
                self._sleeper.settle()
                layer_done(local.layer_index)
        self._sleeper.settle()
        first = self.layers[0]
        width = first.layer.in_channels if first.layer_index else 0
        return Flow(torch.zeros(num_rows, width), carried)

    def finish_backward(
        self, chunk_index: int, *, layer_done: Callable[[int], None] | None = None
    ) -> None:
        """Sleeps the weights' gradients."""
        for local in reversed(self.layers):
            rows = local.cells.chunks[chunk_index].rows
            self._sleeper.spend(self._line(local, "G").seconds(rows.stop - rows.start, 0))
        self._sleeper.settle()
        if layer_done is not None:
            for local in reversed(self.layers):
                layer_done(local.layer_index)

    def _line(self, local: LocalLayer, kind: str) -> Line:
        role = role_of(local.layer_index, self._shape.num_layers)
        return self._shape.profile.lines[f"{role} {kind}"]

    def _layer(self, local: LocalLayer, chunk_index: int, kind: str) -> int:
        """One layer's time and halo; returns the chunk's rows."""
        cell, table, sleeper = local.cells.chunks[chunk_index], local.table, self._sleeper
        num_rows: int = cell.rows.stop - cell.rows.start
        line = self._line(local, kind)
        block = cell.forward if kind == "F" else cell.backward
        num_edges = _num_edges(block, cell.edges)
        total_s = line.seconds(num_rows, num_edges)
        if table is None:
            sleeper.spend(total_s)
            return num_rows
        if kind != "F" and cell.forward is None:  # a gather sends gradients back, unhidden
            sleeper.spend(total_s)
            sleeper.settle()
            self._comm.push(table.gradients, cell.in_exchanges)
            return num_rows
        halves = cell.forward_halves if kind == "F" else cell.backward_halves
        hidden_s = _interior_s(line, block, halves.interior) if block is not None else 0.0
        sleeper.settle()
        values = table.values if kind == "F" else table.gradients
        exchanges = cell.in_exchanges if kind == "F" else cell.out_exchanges
        wait = self._comm.pull(values, exchanges)
        finish = None
        if table.compensation is not None:
            finish = self._comm.start_add_up(torch.zeros_like(table.compensation.arrays[1]))
        if exchanges:
            sleeper.spend(hidden_s)
            sleeper.settle()
            total_s -= hidden_s
        wait()
        if finish is not None:
            finish()
        sleeper.spend(total_s)
        return num_rows


def _interior_s(line: Line, block: RowBlock, interior: Tensor | None) -> float:
    """What the engine has to do while a halo is on its way: the edges of rows that need none."""
    if interior is None:
        return line.per_edge_s * _num_edges(block, None)
    return line.per_edge_s * int(block.indptr.diff()[interior].sum())


def _num_edges(block: RowBlock | None, edges: Edges | None) -> int:
    if block is not None:
        return int(block.indptr[-1] - block.indptr[0])
    return 0 if edges is None else int(edges.edge_index.shape[1])
