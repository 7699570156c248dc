"""Brings every rank's figures and record of an epoch to rank 0, without making anybody wait.

Rank 0 holds the first stage, whose backward ends last: it finds the others' reports there. The
others send theirs and go on.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnnpipe.clocks import clock_offset_s
from gnnpipe.comm import Comm
from gnnpipe.recorder import NUM_FIELDS, Array
from gnnpipe.trace import Trace


class Reports:
    """One rank's end of the reports.

    Args:
        comm: its messages.
    """

    def __init__(self, comm: Comm) -> None:
        self.trace = Trace(comm.mesh)
        self._comm = comm
        self._events: Array = np.empty((0, NUM_FIELDS))
        self._offset_s = 0.0
        self._num_rows: int | None = None
        self._sending: Callable[[], Any] | None = None

    def take(self, events: Array) -> None:
        """This rank's events of an epoch, ``[events, NUM_FIELDS]``, in its own time."""
        self._events = events

    def send(self, values: Tensor) -> list[Tensor]:
        """Every rank -> rank 0: the epoch's figures and events.

        Args:
            values: figures, as many on every rank, float64.

        Returns:
            Every rank's figures on rank 0; nothing elsewhere.
        """
        if self._num_rows is None:  # Every epoch has the same messages.
            self._num_rows = self._comm.largest_over_ranks(len(self._events))
            self._offset_s = clock_offset_s(self._comm)
        self.flush()
        self._sending = self._comm.gather_at_first(torch.cat((values, self._padded())))
        if self._comm.rank != 0:
            return []
        parts = self._sending()
        self._sending = None
        self.trace.add([_events(part[values.numel() :]) for part in parts])
        return [part[: values.numel()] for part in parts]

    def flush(self) -> None:
        """Waits until the last report has left."""
        if self._sending is not None:
            self._sending()
        self._sending = None

    def _padded(self) -> Tensor:
        assert self._num_rows is not None
        rows = np.full((self._num_rows, NUM_FIELDS), -1.0)
        events = self._events[: self._num_rows]
        rows[: len(events)] = events
        rows[: len(events), -2:] += self._offset_s
        return torch.from_numpy(rows).flatten()


def _events(flat: Tensor) -> Array:
    rows: Array = flat.numpy().reshape(-1, NUM_FIELDS)
    return rows[rows[:, 0] >= 0]
