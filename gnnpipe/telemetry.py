"""RunLog: everything that rank 0 writes and shows while a run goes on.

Each epoch is on disk before anything else sees it, so a run that is killed leaves a readable
record of all it did.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from gnnpipe.console import open_display
from gnnpipe.metrics import Best, EpochRecord, Tally, json_text, metrics_line, read_metrics
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
    "EpochRecord",
    "RunLog",
    "prepare_run_directory",
    "read_metrics",
    "summary_text",
]


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
    ) -> None:
        """Opens the files of a new run.

        Args:
            directory: The run directory (see :func:`prepare_run_directory`).
            config_text: The resolved configuration, saved as it is.
            epochs: Number of epochs the run is to have.
            log_every: Epochs from one log line to the next.
            tensorboard: Whether to write TensorBoard scalars.
            console: Where a person may be watching; by default standard error.
        """
        self._directory = Path(directory)
        self._started_s = time.perf_counter()
        self._tally = Tally()
        self._directory.mkdir(parents=True, exist_ok=True)
        write_whole(self._directory / CONFIG_FILE, config_text)
        with ExitStack() as stack:
            # "x": a run never writes over another one's figures.
            self._metrics = stack.enter_context(
                (self._directory / METRICS_FILE).open("x", encoding="utf-8")
            )
            self._scalars = _Scalars(self._directory / TENSORBOARD_DIR) if tensorboard else None
            if self._scalars:
                stack.callback(self._scalars.close)
            self._display = open_display(
                console or Console(stderr=True), epochs=epochs, log_every=log_every
            )
            stack.callback(self._display.close)
            self._stack = stack.pop_all()

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
        wall_s = time.perf_counter() - self._started_s
        summary = {**self._tally.figures(), "wall_s": wall_s, **extras}
        write_whole(self._directory / SUMMARY_FILE, json_text(summary, indent=2) + "\n")
        return summary


class _Scalars:
    """TensorBoard's event file."""

    def __init__(self, directory: Path) -> None:
        # Costs a second, so only runs that want it pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(directory), flush_secs=10
        )  # its methods have no types

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
        }
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(tag, value, record.epoch)

    def close(self) -> None:
        self._writer.close()
