"""``python -m gnnpipe.follower RUN_DIR``: follows a run's files and writes them for TensorBoard.

A process of its own: rank 0 only appends a line to ``metrics.jsonl``, as it does anyway. Curves
and pictures are made here, at a low priority, so that training neither waits for them nor
shares its interpreter with them. The end of standard input is the end of the run.
"""

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gnnpipe import chunk, pictures
from gnnpipe.cut_facts import cut_facts, cut_report
from gnnpipe.event_file import Charts, EventFile
from gnnpipe.run_directory import (
    CONFIG_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    TENSORBOARD_DIR,
    TIMELINE_FILE,
    flatten,
)
from gnnpipe.timeline import load_timeline

POLL_S = 1.0
REDRAW_S = 20.0
DRAWING_SHARE = 0.01
"""Most of the time that drawing may take, of a core that nobody else wants."""

FINISHED = b"finished"
FINAL_FIGURES = ("val_at_best", "test_at_best", "best_epoch", "median_epoch_s", "wall_s")
NOT_COMPARED = ("checkpoint.", "data.root", "device", "run.")
"""Beginnings of the keys that the HParams tab leaves out: they are no reason for a result."""

LAYOUT: Charts = {
    "Learning": {"loss": ["^loss$"], "metric": [r"^metric/.*"]},
    "Time": {
        "epoch, seconds": ["^time/epoch_s$"],
        "shares of all ranks' time": [r"^time_share/.*"],
        "evaluation, seconds": ["^time/evaluation_s$"],
    },
    "Communication": {"bytes per epoch by kind": [r"^bytes/.*"]},
    "Memory": {"peak of each rank, bytes": [r"^memory/.*"], "tables": [r"^tables/.*"]},
    "Staleness": {"relative drift of each layer": [r"^drift/.*"]},
    "Gradients": {"norm of each stage": [r"^gradient_norm/.*"]},
}


class Follower:
    """Turns what lies in a run directory into an event file.

    Args:
        directory: the run directory.
        partition: directory of the cut graph, if there is one.
        num_done: epochs before this part of the run.
    """

    def __init__(self, directory: Path, *, partition: Path | None, num_done: int) -> None:
        self._directory = directory
        self._partition = partition
        self._file = EventFile(directory / TENSORBOARD_DIR, num_done=num_done)
        self._lines = _Lines(directory / METRICS_FILE, num_done)
        self._drift: dict[int, Sequence[float | None]] = {}
        self._drawn_epoch = 0
        self._next_s = 0.0

    def begin(self) -> None:
        """What is known before the first epoch: layout, configuration, chunks."""
        text = (self._directory / CONFIG_FILE).read_text(encoding="utf-8")
        self._file.layout(LAYOUT)
        self._file.text("configuration", text)
        settings = {
            key: value
            for key, value in flatten(yaml.safe_load(text)).items()
            if value is not None and not key.startswith(NOT_COMPARED)
        }
        self._file.start_session(settings, [f"final/{name}" for name in FINAL_FIGURES])
        self._file.flush()
        self.step()
        if self._partition is not None:
            cut = chunk.load(self._partition)
            facts = cut_facts(cut)
            self._draw("pictures/chunk_dependencies", pictures.dependency_figure(facts.reads), 0)
            edges = facts.reads.sum(axis=1)
            self._draw("pictures/chunk_sizes", pictures.sizes_figure(facts.nodes, edges), 0)
            self._file.text("partition", cut_report(cut))
            self._file.flush()

    def step(self) -> None:
        """Takes in the epochs since the last call, and draws when it is time to."""
        for record in self._lines.new():
            self._file.scalars(curves(record), record["epoch"])
            if record.get("staleness"):
                self._drift[record["epoch"]] = record["staleness"]
        start_s = time.monotonic()
        if start_s >= self._next_s and self.draw():
            spent_s = time.monotonic() - start_s
            self._next_s = start_s + max(REDRAW_S, spent_s / DRAWING_SHARE)
        self._file.flush()

    def draw(self) -> bool:
        """Draws the measured timeline and the drift, if there is a newer epoch to show."""
        timeline = load_timeline(self._directory / TIMELINE_FILE)
        if timeline is None or timeline.epoch <= self._drawn_epoch:
            return False
        self._drawn_epoch = timeline.epoch
        self._draw("pictures/timeline", pictures.timeline_figure(timeline), timeline.epoch)
        if self._drift:
            drift = np.array(list(self._drift.values()), dtype=np.float64)
            figure = pictures.drift_figure(list(self._drift), drift)
            self._draw("pictures/drift", figure, timeline.epoch)
        return True

    def end(self, *, is_finished: bool) -> None:
        """The run is over: what is left, and its final figures if it came to an end."""
        if is_finished:
            self._next_s = 0.0
        else:
            self._next_s = float("inf")  # Nobody waits for pictures of a run that was killed.
        self.step()
        summary = self._directory / SUMMARY_FILE
        if is_finished and summary.exists():
            figures = json.loads(summary.read_text(encoding="utf-8"))
            final = {f"final/{name}": figures.get(name) for name in FINAL_FIGURES}
            self._file.scalars(final, figures["epochs"])
            self._file.end_session()
        self._file.close()

    def _draw(self, tag: str, figure: Any, step: int) -> None:  # matplotlib's figure
        content, size = pictures.png(figure)
        self._file.picture(tag, content, step, size=size)


def curves(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The points that one line of ``metrics.jsonl`` adds to the curves."""
    parts = {
        "metric/{}": record.get("accuracy"),
        "bytes/{}": {k: n for k, n in (record.get("comm_bytes") or {}).items() if n},
        "time_share/{}": record.get("time_shares"),
        "memory/rank_{}": _numbered(record.get("peak_memory_bytes")),
        "tables/rank_{}": _numbered(record.get("table_bytes")),
        "drift/layer_{}": _numbered(record.get("staleness")),
        "gradient_norm/stage_{}": _numbered(record.get("gradient_norm")),
    }
    single = {
        "loss": record.get("loss"),
        "time/epoch_s": record.get("epoch_s"),
        "time/evaluation_s": record.get("evaluation_s"),
        "time_share/bubble": record.get("bubble_fraction"),
        "correction/persistence": record.get("persistence"),
    }
    grouped = {
        tag.format(name): value
        for tag, part in parts.items()
        for name, value in (part or {}).items()
    }
    return single | grouped


def _numbered(values: Sequence[float] | None) -> dict[str, float]:
    """Values by their place, padded so that they sort."""
    width = len(str(len(values or ()) - 1))
    return {f"{place:0{width}d}": value for place, value in enumerate(values or ())}


class _Lines:
    """The whole lines that a file has got since one last looked."""

    def __init__(self, path: Path, num_done: int) -> None:
        self._path = path
        self._num_done = num_done
        self._position = 0

    def new(self) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            if record["epoch"] > self._num_done:
                yield record


def main(argv: Sequence[str] | None = None) -> int:
    """Follows a run until standard input ends; ``finished`` on it asks for the final figures."""
    parser = argparse.ArgumentParser(prog="python -m gnnpipe.follower")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--partition", type=Path)
    parser.add_argument("--done", type=int, default=0)
    options = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # Meant for the run, which ends us.
        signal.signal(number, signal.SIG_IGN)
    follower = Follower(options.directory, partition=options.partition, num_done=options.done)
    follower.begin()
    word = b""
    while True:
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            received = os.read(sys.stdin.fileno(), 64)
            word += received
            if not received:
                break
        follower.step()
    follower.end(is_finished=word == FINISHED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
