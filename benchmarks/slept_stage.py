"""A stage that sleeps as long as its layers were measured to take, and sends real messages.

With more ranks than cores, wall time would measure the operating system's scheduler. Each layer's
single-threaded time is measured alone beforehand; here it is slept. Tables, halo exchanges, the
order of actions and every message are the engine's own; only the numbers are zeros.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gnnpipe.comm import Comm
from gnnpipe.costs import Profile, role_of
from gnnpipe.stage import Flow, LocalLayer, Stage

SHORTEST_S = 5e-4
"""Shorter sleeps are saved up until a message has to wait for them."""


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
    """

    def __init__(self, stage: Stage, comm: Comm, shape: Shape) -> None:
        self.layers = stage.layers
        self.tables = stage.tables
        self._comm = comm
        self._shape = shape
        self._owed_s = 0.0
        for local in self.layers:
            for parameter in local.layer.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def start_epoch(self, epoch: int, *, is_measured: bool = False) -> None:
        """Nothing to prepare."""

    def start_step(self) -> None:
        """Nothing to forget."""

    def end_step(self, *, has_backward: bool = True) -> None:
        """Sleeps what is left."""
        assert has_backward
        self._settle()

    def end_epoch(self) -> None:
        """Nothing to keep."""

    def forward(self, chunk_index: int, flow: Flow) -> Flow:
        """Sleeps and trades halos; returns zeros of the right shape."""
        carried = dict(flow.carried)
        num_rows = 0
        for local in self.layers:
            num_rows = self._layer(local, chunk_index, "F")
            for name in local.layer.writes:
                carried[name] = torch.zeros(num_rows, local.layer.carried_channels(name))
        self._settle()
        return Flow(torch.zeros(num_rows, self.layers[-1].layer.out_channels), carried)

    def backward(
        self,
        chunk_index: int,
        gradient: Flow,
        *,
        layer_done: Callable[[LocalLayer], None] | None = None,
    ) -> Flow:
        """The same in reverse."""
        carried = dict(gradient.carried)
        num_rows = 0
        for local in reversed(self.layers):
            num_rows = self._layer(local, chunk_index, "B")
            for name in local.layer.reads:
                carried.setdefault(name, torch.zeros(num_rows, local.layer.in_channels))
            for name in local.layer.writes:
                carried.pop(name, None)
            if layer_done is not None:
                self._settle()
                layer_done(local)
        self._settle()
        first = self.layers[0]
        width = first.layer.in_channels if first.layer_index else 0
        return Flow(torch.zeros(num_rows, width), carried)

    def _layer(self, local: LocalLayer, chunk_index: int, kind: str) -> int:
        """One layer's time and halo; returns the chunk's rows."""
        cell, table = local.cells.chunks[chunk_index], local.table
        num_rows = cell.rows.stop - cell.rows.start
        role = role_of(local.layer_index, self._shape.num_layers)
        line = self._shape.profile.lines[f"{role} {kind}"]
        num_edges = _num_edges(cell.forward, cell.edges)
        total_s = line.seconds(num_rows, num_edges)
        if table is None:
            self._sleep(total_s)
            return num_rows
        halves = cell.forward_halves if kind == "F" else cell.backward_halves
        interior = 1.0 if halves.interior is None else halves.interior.numel() / max(1, num_rows)
        hidden_s = line.per_edge_s * num_edges * interior
        if kind == "B" and cell.forward is None:  # a gather sends gradients back, unhidden
            self._sleep(total_s)
            self._settle()
            self._comm.push(table.gradients, cell.in_exchanges)
            return num_rows
        self._settle()
        values = table.values if kind == "F" else table.gradients
        exchanges = cell.in_exchanges if kind == "F" else cell.out_exchanges
        wait = self._comm.pull(values, exchanges)
        if exchanges:
            self._sleep(hidden_s)
            self._settle()
            total_s -= hidden_s
        wait()
        self._sleep(total_s)
        return num_rows

    def _sleep(self, seconds: float) -> None:
        self._owed_s += seconds
        if self._owed_s > SHORTEST_S:
            self._settle()

    def _settle(self) -> None:
        """Sleeps what is owed; what a sleep overshoots is taken off the next."""
        if self._owed_s <= 0:
            return
        start_s = time.perf_counter()
        time.sleep(self._owed_s)
        self._owed_s -= time.perf_counter() - start_s


def _num_edges(block: object, edges: object) -> int:
    if block is not None:
        indptr: Tensor = block.indptr  # type: ignore[attr-defined]
        return int(indptr[-1] - indptr[0])
    return 0 if edges is None else int(edges.edge_index.shape[1])  # type: ignore[attr-defined]
