"""One measured epoch of all ranks on disk: what the timeline's picture is drawn from."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from gnnpipe.recorder import NUM_FIELDS, Array


class Timeline(NamedTuple):
    """All ranks' events of one epoch in one time."""

    epoch: int
    ranks: list[Array]
    """Each rank's events, ``[events, NUM_FIELDS]`` (see ``recorder.Event``)."""


def save_timeline(path: str | Path, timeline: Timeline) -> None:
    """Writes a timeline, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    sizes = [len(events) for events in timeline.ranks]
    rows = np.concatenate([*timeline.ranks, np.empty((0, NUM_FIELDS))])
    try:
        with temporary.open("wb") as file:
            np.savez(file, epoch=timeline.epoch, sizes=sizes, rows=rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_timeline(path: str | Path) -> Timeline | None:
    """Reads a timeline; None where there is none, or none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            bounds = np.cumsum(file["sizes"])[:-1]
            return Timeline(int(file["epoch"]), np.split(file["rows"], bounds))
    except (OSError, ValueError, KeyError, EOFError):
        return None
