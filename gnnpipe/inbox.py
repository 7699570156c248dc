"""A known sequence of messages to receive, some always posted ahead of need."""

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from gnnpipe.comm import Comm, Pending
from gnnpipe.messages import Message

RECEIVE_AHEAD = 6
"""Receives posted before their messages are needed."""


class Inbox:
    """A known sequence of receives; :meth:`take` hands them out in that order."""

    def __init__(self, comm: Comm, messages: Sequence[Message]) -> None:
        self._comm = comm
        self._coming = iter(messages)
        self._posted: deque[Pending] = deque()
        for _ in range(RECEIVE_AHEAD):
            self._post()

    def take(self) -> Tensor:
        """The next tensor of the sequence."""
        pending = self._posted.popleft()
        tensor = pending.take()
        self._post()
        return tensor

    def _post(self) -> None:
        message = next(self._coming, None)
        if message is not None:
            self._posted.append(self._comm.receive(message))
