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
        self._has_exact = False
        self._num_rows: dict[bool, int] = {}
        self._sending: Callable[[], Any] | None = None

    def take(self, events: Array, *, has_exact: bool) -> None:
        """This rank's events of an epoch, ``[events, NUM_FIELDS]``, in its own time.

        Args:
            events: in order of their ends.
            has_exact: whether the epoch computed the exact gradient too: it has more messages.
        """
        self._events, self._has_exact = events, has_exact

    def send(self, values: Tensor) -> list[Tensor]:
        """Every rank -> rank 0: the epoch's figures and events.

        Args:
            values: figures, as many on every rank, float64.

        Returns:
            Every rank's figures on rank 0; nothing elsewhere.
        """
        if not self._num_rows:
            self._offset_s = clock_offset_s(self._comm)
        if self._has_exact not in self._num_rows:  # Epochs of a kind have the same messages.
            most = self._comm.largest_over_ranks(len(self._events))
            self._num_rows[self._has_exact] = most
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
        num_rows = self._num_rows[self._has_exact]
        rows = np.full((num_rows, NUM_FIELDS), -1.0)
        events = self._events[:num_rows]
        rows[: len(events)] = events
        rows[: len(events), -2:] += self._offset_s
        return torch.from_numpy(rows).flatten()


def _events(flat: Tensor) -> Array:
    rows: Array = flat.numpy().reshape(-1, NUM_FIELDS)
    return rows[rows[:, 0] >= 0]
