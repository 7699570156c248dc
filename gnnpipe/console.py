"""What a person watching a run sees: a live display on a terminal, log lines elsewhere."""

import logging
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gnnpipe.metrics import EpochRecord


class Display(Protocol):
    """Shows epochs as they end."""

    def show(self, record: EpochRecord) -> None:
        """Takes the next epoch."""

    def close(self) -> None:
        """Leaves the last epoch visible; a second call does nothing."""


def open_display(console: Console, *, epochs: int, log_every: int) -> Display:
    """The display that fits where the output goes."""
    if console.is_interactive:
        return LiveDisplay(console, epochs=epochs)
    return LogDisplay(epochs=epochs, log_every=log_every)


class LogDisplay:
    """One line every ``log_every`` epochs, and for the last one, through ``logging``::

    epoch 010 | loss 0.412 | val 0.731 | 182 ms | bubble 0.19
    """

    def __init__(self, *, epochs: int, log_every: int) -> None:
        self._logger = logging.getLogger("gnnpipe")
        self._log_every = log_every
        self._epoch_width = max(3, len(str(epochs)))
        self._accuracy: Mapping[str, float | None] | None = None
        self._pending: str | None = None

    def show(self, record: EpochRecord) -> None:
        """Logs the epoch when its turn has come, else keeps it in case it is the last."""
        self._accuracy = record.accuracy or self._accuracy
        figures = " | ".join(_figures(record, self._accuracy))
        self._pending = f"epoch {record.epoch:0{self._epoch_width}d} | {figures}"
        if record.epoch % self._log_every == 0:
            self._log_pending()

    def close(self) -> None:
        """Logs the last epoch if that has not happened."""
        self._log_pending()

    def _log_pending(self) -> None:
        if self._pending is not None:
            self._logger.info("%s", self._pending)
        self._pending = None


class LiveDisplay:
    """A progress bar with the time left and the latest figures."""

    def __init__(self, console: Console, *, epochs: int) -> None:
        self._accuracy: Mapping[str, float | None] | None = None
        # Fits 80 columns.
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=epochs)
        self._progress.start()

    def show(self, record: EpochRecord) -> None:
        """Moves the bar and shows the epoch's figures."""
        self._accuracy = record.accuracy or self._accuracy
        loss, val, milliseconds, bubble = _figures(record, self._accuracy)
        self._progress.update(
            self._task,
            completed=record.epoch,
            description=f"{loss}  {val}  {milliseconds}/epoch  {bubble}",
        )

    def close(self) -> None:
        """Draws the last state and hands the terminal back."""
        self._progress.stop()


def _figures(record: EpochRecord, accuracy: Mapping[str, float | None] | None) -> tuple[str, ...]:
    """Loss, validation figure of the latest evaluation, time and bubble, in fixed width."""
    val = (accuracy or {}).get("val")  # None where nobody validates
    return (
        f"loss {record.loss:5.3f}",
        "val   -  " if val is None else f"val {val:5.3f}",
        f"{record.epoch_s * 1e3:3.0f} ms",
        f"bubble {record.bubble_fraction:4.2f}",
    )
