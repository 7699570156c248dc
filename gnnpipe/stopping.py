"""Turns a request to stop into a flag that the epoch loop looks at.

SIGTERM is how clusters announce that a host is taken away, Ctrl-C how a person ends a run: both
leave time to finish the epoch and to write a checkpoint.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_S = 2.0
"""A terminal and a launcher may both pass on one Ctrl-C: a second one counts after this time."""


class StopRequest:
    """Whether somebody has asked this process to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._asked_s = 0.0

    def note(self, number: int, _frame: FrameType | None) -> None:
        """A signal handler: the first request is kept, a later Ctrl-C ends at once."""
        if self.signal is None:
            self.signal = signal.Signals(number)
            self._asked_s = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._asked_s > AGAIN_S:
            raise KeyboardInterrupt


@contextmanager
def stop_requests(
    *, is_on: bool = True, request: StopRequest | None = None
) -> Iterator[StopRequest]:
    """Notes SIGTERM and SIGINT instead of dying of them, in the main thread.

    Args:
        is_on: False leaves the signals what they are.
        request: where to note them, if somebody else may ask as well; None makes one.
    """
    request = request or StopRequest()
    if not is_on or threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    previous = {number: signal.signal(number, request.note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
