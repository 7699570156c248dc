"""All ranks' records of an epoch on one clock: where waiting went, and a picture of it.

A wait for a message falls into two parts. Before the other end has sent it, this rank waits for
work; from then on the message is on its way, and the wait is a transfer that nothing hides::

    sender     |== computes ==|send
    receiver   |....... wait .|~~ transfer ~~|== computes ==|

All settings are booked alike, halo exchanges and weight sums too; those start when the last way
has joined.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gnnpipe.mesh import Mesh
from gnnpipe.recorder import (
    ACTION,
    ACTION_KINDS,
    EXACT,
    MESSAGE_KINDS,
    SEND,
    STEP,
    WAIT,
    Array,
    is_backward_tag,
)
from gnnpipe.timeline import Timeline, save_timeline

KEPT_EPOCHS = 3
"""The last ones, which ``trace.json`` shows."""

_WHAT, _KIND, _PLACE, _KEY, _BYTES, _START_S, _END_S = range(7)
_TRACKS = ("compute", "forward messages", "backward messages", "halo", "weight sums")


class Trace:
    """What rank 0 knows of the last epochs.

    Args:
        mesh: all ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._epochs: deque[list[Array]] = deque(maxlen=KEPT_EPOCHS)

    def add(self, records: Sequence[Array]) -> None:
        """Takes the next epoch: each rank's events in rank 0's time, ``[events, 7]``."""
        self._epochs.append(list(records))

    def transfer_s(self) -> list[float]:
        """How long each rank waited for messages on their way in the last epoch, ``[ranks]``."""
        if not self._epochs:
            return [0.0] * self._mesh.world_size
        return transfer_s(self._epochs[-1], self._mesh)

    def write_timeline(self, path: str | Path, epoch: int) -> None:
        """Writes the last epoch for who draws it."""
        if self._epochs:
            save_timeline(path, Timeline(epoch, self._epochs[-1]))

    def write(self, path: str | Path) -> None:
        """Writes the last epochs as a Chrome trace, which Perfetto opens."""
        events = [*self._names()]
        for number, records in enumerate(self._epochs):
            events += chrome_events(records, self._mesh, flow_prefix=f"{number}.")
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
        Path(path).write_text(text, encoding="utf-8")

    def _names(self) -> Iterator[dict[str, Any]]:
        for rank in range(self._mesh.world_size):
            place = f"stage rank {self._mesh.stage_rank(rank)}, way {self._mesh.way(rank)}"
            yield _name("process_name", rank, 0, f"rank {rank} ({place})")
            for track, title in enumerate(_TRACKS):
                yield _name("thread_name", rank, track, title)


def transfer_s(records: Sequence[Array], mesh: Mesh) -> list[float]:
    """Seconds that each rank waited for messages that were on their way, ``[ranks]``.

    Args:
        records: each rank's events in one time.
        mesh: all ranks.
    """
    sent_id, sent_s = _sent(records, mesh)
    result = []
    for rank, events in enumerate(records):
        waits = events[events[:, _WHAT] == WAIT]
        awaited = _ids(waits, rank, mesh, is_send=False)
        # The latest of equal ids: a sum starts when the last way has joined.
        place = np.searchsorted(sent_id, awaited, side="right") - 1
        is_known = np.isin(awaited, sent_id)
        left_s = sent_s[place[is_known]]
        start_s, end_s = waits[is_known, _START_S], waits[is_known, _END_S]
        result.append(float((end_s - np.clip(left_s, start_s, end_s)).sum()))
    return result


def _sent(records: Sequence[Array], mesh: Mesh) -> tuple[Array, Array]:
    """Ids of all messages and when they were on their way, sorted by both."""
    ids, left_s = [], []
    for rank, events in enumerate(records):
        sends = events[events[:, _WHAT] == SEND]
        ids.append(_ids(sends, rank, mesh, is_send=True))
        left_s.append(sends[:, _START_S])
    sent_id, sent_s = np.concatenate(ids), np.concatenate(left_s)
    order = np.lexsort((sent_s, sent_id))
    return sent_id[order], sent_s[order]


def _ids(events: Array, rank: int, mesh: Mesh, *, is_send: bool) -> Array:
    """One number for each message; the ways of one sum share one."""
    peer, kind, key = (events[:, column].astype(np.int64) for column in (_PLACE, _KIND, _KEY))
    source, target = (np.full_like(peer, rank), peer) if is_send else (peer, rank)
    size, group = mesh.world_size, mesh.stage_rank(rank)
    pair = np.where(peer >= 0, source * size + target, size * size + group)
    return ((pair * len(MESSAGE_KINDS) + kind) << 36) + key


def chrome_events(
    records: Sequence[Array], mesh: Mesh, *, flow_prefix: str = ""
) -> list[dict[str, Any]]:
    """The events of a trace: a process for each rank, microseconds.

    Actions, exact passes, steps and the waits inside them are slices of the compute track; sends
    and receives are slices of their direction's track, joined by flow arrows.

    Args:
        records: each rank's events in one time.
        mesh: all ranks.
        flow_prefix: tells arrows of several epochs in one file apart.
    """
    result: list[dict[str, Any]] = []
    sent_id = set(_sent(records, mesh)[0].tolist())
    for rank, events in enumerate(records):
        for is_send, what in ((True, SEND), (False, WAIT)):
            chosen = events[events[:, _WHAT] == what]
            for event, number in zip(
                chosen, _ids(chosen, rank, mesh, is_send=is_send).tolist(), strict=True
            ):
                result += _message(event, rank, is_send=is_send)
                if event[_PLACE] >= 0 and number in sent_id:
                    result.append(_flow(event, rank, f"{flow_prefix}{number}", is_send=is_send))
        for event in events[np.isin(events[:, _WHAT], (ACTION, EXACT, STEP))]:
            result.append(_slice(_action_name(event), rank, 0, event, category="compute"))
    return result


def _action_name(event: Array) -> str:
    if event[_WHAT] == STEP:
        return "step"
    stage_and_kind = f"{int(event[_PLACE])}{ACTION_KINDS[int(event[_KIND])]}"
    return (
        f"{stage_and_kind} exact"
        if event[_WHAT] == EXACT
        else f"{stage_and_kind}{event[_KEY]:.0f}"
    )


def _message(event: Array, rank: int, *, is_send: bool) -> Iterator[dict[str, Any]]:
    kind, peer = MESSAGE_KINDS[int(event[_KIND])], int(event[_PLACE])
    other = "all ways" if peer < 0 else f"rank {peer}"
    title = f"{kind} to {other}" if is_send else f"{kind} from {other}"
    details = {"bytes": int(event[_BYTES])} if is_send else {}
    yield _slice(title, rank, _track(event), event, category=kind) | {"args": details}
    if not is_send:
        yield _slice(f"wait: {kind}", rank, 0, event, category="wait")


def _flow(event: Array, rank: int, number: str, *, is_send: bool) -> dict[str, Any]:
    flow = {"cat": "message", "id": number, "pid": rank, "tid": _track(event)}
    at_s = event[_START_S] if is_send else event[_END_S]
    ends = {"ph": "s"} if is_send else {"ph": "f", "bp": "e"}
    return flow | ends | {"name": MESSAGE_KINDS[int(event[_KIND])], "ts": at_s * 1e6}


def _track(event: Array) -> int:
    kind = MESSAGE_KINDS[int(event[_KIND])]
    if kind in ("halo", "gradient"):
        return 3 if kind == "halo" else 4
    return 2 if is_backward_tag(int(event[_KEY])) else 1


def _slice(name: str, rank: int, track: int, event: Array, *, category: str) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": rank,
        "tid": track,
        "ts": event[_START_S] * 1e6,
        "dur": (event[_END_S] - event[_START_S]) * 1e6,
    }


def _name(what: str, rank: int, track: int, title: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": track, "args": {"name": title}}
