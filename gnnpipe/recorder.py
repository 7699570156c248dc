"""What one rank did when in an epoch: actions, waits and messages, kept as plain numbers.

Recording costs one tuple per event. All clocks are ``time.perf_counter``; who compares ranks
adds each rank's offset first.
"""

import time
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

ACTION, STEP, WAIT, SEND, EXACT = range(5)
"""What an event is: an action of the schedule, the optimizer's step, a wait, a send, a stage's
share of an exact gradient."""

ACTION_KINDS = "FBIG"
MESSAGE_KINDS = ("boundary", "carried", "halo", "gradient", "ranks")

NUM_FIELDS = 7

Array = np.ndarray[Any, Any]


class Event(NamedTuple):
    """One row of a record; the fields that do not apply are 0."""

    what: int
    """ACTION, STEP, WAIT, SEND or EXACT."""
    kind: int
    """Index in :data:`ACTION_KINDS` or :data:`MESSAGE_KINDS`."""
    place: int
    """Stage index of an action or an exact pass, the peer's rank of a message, -1 of a
    collective."""
    key: int
    """Chunk position of an action; of a message, what both ends call it."""
    num_bytes: int
    start_s: float
    end_s: float


class Recorder:
    """Collects the events of one epoch; outside epochs it forgets what it is told."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._numbers: Counter[tuple[int, int, int]] = Counter()
        self._is_on = False

    def start(self) -> None:
        """An epoch starts."""
        self._events.clear()
        self._numbers.clear()
        self._is_on = True

    def stop(self) -> Array:
        """The epoch has ended: its events, ``[events, NUM_FIELDS]``, float64."""
        self._is_on = False
        return np.array(self._events, dtype=np.float64).reshape(-1, NUM_FIELDS)

    def action(self, kind: str, stage: int, chunk: int, *, start_s: float, end_s: float) -> None:
        """An action ran, the waits for its messages included."""
        self._add(Event(ACTION, ACTION_KINDS.index(kind), stage, chunk, 0, start_s, end_s))

    def step(self, *, start_s: float, end_s: float) -> None:
        """The optimizer took its step."""
        self._add(Event(STEP, 0, 0, 0, 0, start_s, end_s))

    def exact(self, kind: str, stage: int, *, start_s: float, end_s: float) -> None:
        """A forward or backward of all chunks at once ran, the waits for its messages included."""
        self._add(Event(EXACT, ACTION_KINDS.index(kind), stage, 0, 0, start_s, end_s))

    def send(self, kind: str, peer: int, key: int, *, num_bytes: int, start_s: float) -> None:
        """A message has just been handed over; that began at ``start_s``."""
        number, end_s = MESSAGE_KINDS.index(kind), time.perf_counter()
        self._add(Event(SEND, number, peer, key, num_bytes, start_s, end_s))

    def wait(self, kind: str, peer: int, key: int, *, start_s: float, end_s: float) -> None:
        """This rank waited for a message, perhaps for no time at all."""
        self._add(Event(WAIT, MESSAGE_KINDS.index(kind), peer, key, 0, start_s, end_s))

    def number(self, what: int, kind: str, peer: int) -> int:
        """Counts messages that have no tag of their own, the same at both ends."""
        place = (what, MESSAGE_KINDS.index(kind), peer)
        self._numbers[place] += 1
        return self._numbers[place]

    def _add(self, event: Event) -> None:
        if self._is_on:
            self._events.append(event)


def message_tag(position: int, item: int, *, is_backward: bool) -> int:
    """The tag of one tensor of one action's input, unlike any other of the step.

    Args:
        position: a number of the action among those of its direction.
        item: the activation, 0, or one of at most seven carried tensors.
        is_backward: the direction.
    """
    assert item < 8, item
    return (position * 2 + is_backward) * 8 + item


def is_backward_tag(tag: int) -> bool:
    """Whether a tag is one of the backward direction."""
    return (tag // 8) % 2 == 1
