"""RunLog: everything that rank 0 writes and shows while a run goes on.

Each epoch is on disk before anything else sees it, so a run that is killed leaves a readable
record of all it did.
"""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from rich.console import Console

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


class Done(NamedTuple):
    """What a run that goes on has behind it."""

    epoch: int
    """The last epoch that counts; later ones come again."""
    wall_s: float
    """Seconds they took."""


class RunLog:
    """Writes a run directory's files, TensorBoard scalars and the console's lines.

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
    ) -> None:
        """Opens the files of a new run, or of one that goes on.

        Args:
            directory: The run directory (see :func:`prepare_run_directory`).
            config_text: The resolved configuration, saved as it is.
            epochs: Number of epochs the run is to have.
            log_every: Epochs from one log line to the next.
            tensorboard: Whether to write TensorBoard scalars.
            console: Where a person may be watching; by default standard error.
            done: What the run has behind it; None for a new one.
        """
        self._directory = Path(directory)
        self._started_s = time.perf_counter() - (done.wall_s if done else 0.0)
        self._tally = Tally()
        self._directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._metrics = stack.enter_context(self._open_metrics(done))
            write_whole(self._directory / CONFIG_FILE, config_text)
            folder = self._directory / TENSORBOARD_DIR
            self._scalars = _Scalars(folder, done.epoch if done else 0) if tensorboard else None
            if self._scalars:
                stack.callback(self._scalars.close)
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
        if self._scalars:
            self._scalars.add(record)
        self._display.show(record)

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
        return summary


class _Scalars:
    """TensorBoard's event file."""

    def __init__(self, directory: Path, num_done: int) -> None:
        # Costs a second, so only runs that want it pay.
        from torch.utils.tensorboard import SummaryWriter

        # Hides what an earlier part of the run wrote of epochs that come again.
        purge_step = num_done + 1 if num_done else None
        self._writer: Any = SummaryWriter(  # its methods have no types
            str(directory), flush_secs=10, purge_step=purge_step
        )

    def add(self, record: EpochRecord) -> None:
        scalars: dict[str, float | None] = {
            "loss": record.loss,
            "epoch_s": record.epoch_s,
            "evaluation_s": record.evaluation_s,
            "bubble_fraction": record.bubble_fraction,
            "memory/peak_bytes": max(record.peak_memory_bytes, default=None),
            "memory/table_bytes": max(record.table_bytes, default=None),
            **{f"accuracy/{split}": figure for split, figure in (record.accuracy or {}).items()},
            **{f"comm_bytes/{kind}": count for kind, count in record.comm_bytes.items()},
            **{f"time/{name}": share for name, share in (record.time_shares or {}).items()},
        }
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(tag, value, record.epoch)

    def close(self) -> None:
        self._writer.close()
