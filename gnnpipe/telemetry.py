"""RunLog: everything that rank 0 writes and shows while a run goes on.

Each epoch is on disk before anything else sees it, so a run that is killed leaves a readable
record of all it did.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from rich.console import Console

from gnnpipe import environment
from gnnpipe.console import open_display
from gnnpipe.errors import UserError
from gnnpipe.metrics import (
    Best,
    EpochRecord,
    Tally,
    json_text,
    metrics_line,
    read_metrics,
    record_from,
)
from gnnpipe.preflight import THREAD_VARIABLES
from gnnpipe.run_directory import (
    CONFIG_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    TENSORBOARD_DIR,
    prepare_run_directory,
    summary_text,
    write_whole,
)

__all__ = [
    "Best",
    "Done",
    "EpochRecord",
    "RunLog",
    "prepare_run_directory",
    "read_metrics",
    "summary_text",
]

logger = logging.getLogger("gnnpipe")

FOLLOWER_WAIT_S = 60.0
"""Longest wait, at the end of a run, for TensorBoard's files."""
FOLLOWER_NICENESS = 10
"""What the process that writes them leaves to ranks that want its core."""


class Done(NamedTuple):
    """What a run that goes on has behind it."""

    epoch: int
    """The last epoch that counts; later ones come again."""
    wall_s: float
    """Seconds they took."""


class RunLog:
    """Writes a run directory's files, has TensorBoard's written, and shows the epochs.

    A context manager: leaving it closes every file, after an error too; only a run that called
    :meth:`finish` has a ``summary.json``::

        with RunLog("runs/demo", config_text=text, epochs=200, log_every=10) as log:
            for record in train():
                log.epoch(record)
            summary = log.finish({"num_parameters": 1234})
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        config_text: str,
        epochs: int,
        log_every: int,
        tensorboard: bool = False,
        console: Console | None = None,
        done: Done | None = None,
        partition: str | None = None,
    ) -> None:
        """Opens the files of a new run, or of one that goes on.

        Args:
            directory: The run directory (see :func:`prepare_run_directory`).
            config_text: The resolved configuration, saved as it is.
            epochs: Number of epochs the run is to have.
            log_every: Epochs from one log line to the next.
            tensorboard: Whether to write TensorBoard's files.
            console: Where a person may be watching; by default standard error.
            done: What the run has behind it; None for a new one.
            partition: Directory of the cut graph, for pictures of its chunks.
        """
        self._directory = Path(directory)
        self._started_s = time.perf_counter() - (done.wall_s if done else 0.0)
        self._tally = Tally()
        self._directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._metrics = stack.enter_context(self._open_metrics(done))
            write_whole(self._directory / CONFIG_FILE, config_text)
            self._follower = None
            if tensorboard:
                (self._directory / TENSORBOARD_DIR).mkdir(exist_ok=True)
                self._follower = _Follower(
                    self._directory, partition=partition, num_done=done.epoch if done else 0
                )
                stack.callback(self._follower.close)
            self._display = open_display(
                console or Console(stderr=True), epochs=epochs, log_every=log_every
            )
            stack.callback(self._display.close)
            self._stack = stack.pop_all()

    def _open_metrics(self, done: Done | None) -> TextIO:
        """The file of figures, cut back to the epochs that count."""
        path = self._directory / METRICS_FILE
        if done is None:
            # "x": a run never writes over another one's figures.
            return path.open("x", encoding="utf-8")
        (self._directory / SUMMARY_FILE).unlink(missing_ok=True)
        records = read_metrics(path)[: done.epoch] if done.epoch else []
        if [record.get("epoch") for record in records] != list(range(1, done.epoch + 1)):
            raise UserError(
                f"`run.dir` (={self._directory}) must hold the figures of the {done.epoch} epochs"
                f" before the checkpoint in {METRICS_FILE}; restore the file or set"
                " checkpoint.resume to an earlier one"
            )
        for record in records:
            self._tally.add(record_from(record))
        write_whole(path, "".join(json_text(record) + "\n" for record in records))
        return path.open("a", encoding="utf-8")

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, without those between its parts."""
        return time.perf_counter() - self._started_s

    def sync(self) -> None:
        """Forces the figures to disk, before a checkpoint relies on them."""
        os.fsync(self._metrics.fileno())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def best(self) -> Best | None:
        """The best evaluation so far; ``best.epoch`` is the record's when it just became so."""
        return self._tally.best

    def epoch(self, record: EpochRecord) -> None:
        """Writes and shows one epoch."""
        self._tally.add(record)
        self._metrics.write(metrics_line(record))
        self._metrics.flush()
        self._display.show(record)

    def evaluating(self) -> None:
        """Says that the current epoch is being evaluated."""
        self._display.evaluating()

    def finish(self, extras: Mapping[str, Any]) -> dict[str, Any]:
        """Ends the run well: writes ``summary.json``.

        Args:
            extras: What only the caller knows: ``num_parameters``, ``world_size``, ``threads``,
                ``versions``.

        Returns:
            The summary: the figures of all epochs, ``wall_s`` since the log was opened, extras.
        """
        self._display.close()
        summary = {**self._tally.figures(), "wall_s": self.wall_s, **extras}
        write_whole(self._directory / SUMMARY_FILE, json_text(summary, indent=2) + "\n")
        if self._follower:
            self._follower.is_finished = True
        return summary


class _Follower:
    """The process that writes TensorBoard's files out of what the run directory holds."""

    def __init__(self, directory: Path, *, partition: str | None, num_done: int) -> None:
        self._directory = directory
        command = [sys.executable, "-P", "-m", "gnnpipe.follower", str(directory.resolve())]
        command += ["--done", str(num_done)]
        if partition is not None:
            command += ["--partition", str(Path(partition).resolve())]
        # One thread: the libraries it loads would take the ranks' cores otherwise.
        env = environment.child_environment(dict.fromkeys(THREAD_VARIABLES, "1"))
        self._complaint = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._complaint,
            env=env,
        )
        # From here, not by itself: loading what it needs is most of its work.
        niceness = min(19, os.getpriority(os.PRIO_PROCESS, 0) + FOLLOWER_NICENESS)
        os.setpriority(os.PRIO_PROCESS, self._child.pid, niceness)
        self.is_finished = False

    def close(self) -> None:
        """Lets it write what is left; a run does not fail for its pictures."""
        # After a failure other ranks wait for word of it.
        wait_s = FOLLOWER_WAIT_S if self.is_finished else FOLLOWER_WAIT_S / 10
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._child.communicate(b"finished" if self.is_finished else b"", wait_s)
        why = None
        if self._child.poll() is None:
            why = f"the process that writes them was not ready after {wait_s:g} s"
            self._child.kill()
            self._child.wait()
        with self._complaint as file:
            file.seek(0)
            words = file.read().decode(errors="replace").split("\n")
        if self._child.returncode:
            why = why or next((line for line in reversed(words) if line.strip()), None)
            why = why or f"the process that writes them ended with {self._child.returncode}"
            logger.warning(
                "TensorBoard files are incomplete: %s; nothing else is missing,"
                " `python -m gnnpipe report %s` draws the whole run",
                why,
                self._directory,
            )
