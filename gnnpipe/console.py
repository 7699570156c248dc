"""What a person watching a run sees: a live display on a terminal, log lines elsewhere."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from gnnpipe.metrics import EpochRecord

MOST_RANKS = 16
"""Ranks that get a bar; a terminal has few lines."""
BAR_CELLS = 30
REFRESH_PER_S = 1
"""Each takes a few milliseconds, in which the rank that shows it cannot start a kernel."""

logger = logging.getLogger("gnnpipe")


class Display(Protocol):
    """Shows epochs as they end."""

    def show(self, record: EpochRecord) -> None:
        """Takes the next epoch."""

    def evaluating(self) -> None:
        """An evaluation begins; the epoch it belongs to is shown after it."""

    def close(self) -> None:
        """Leaves the last epoch visible; a second call does nothing."""


def open_display(console: Console, *, epochs: int, log_every: int) -> Display:
    """The display that fits where the output goes."""
    if console.is_interactive and not is_quiet():
        return LiveDisplay(console, epochs=epochs)
    return LogDisplay(epochs=epochs, log_every=log_every)


def be_quiet() -> None:
    """Shows no progress in this process from now on, only warnings."""
    logger.setLevel(logging.WARNING)


def is_quiet() -> bool:
    """Whether :func:`be_quiet` was called."""
    return logger.level >= logging.WARNING


@contextmanager
def working(what: str, console: Console | None = None) -> Iterator[None]:
    """Shows what takes so long, and for how long already; a line in the log off a terminal.

    Args:
        what: such as ``loading cora``.
        console: where a person may be watching; by default standard error.
    """
    console = console or Console(stderr=True)
    if not console.is_interactive or is_quiet():
        logger.info("%s", what)
        yield
        return
    columns = (SpinnerColumn(finished_text=" "), TextColumn(what), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)
        yield
        progress.update(task, total=1, completed=1)


def show_table(table: str, verdict: str, console: Console | None = None) -> None:
    """Shows a report whole on a terminal, its verdict alone elsewhere.

    Args:
        table: the lines of the report.
        verdict: its last word.
        console: where a person may be watching; by default standard error.
    """
    console = console or Console(stderr=True)
    if console.is_interactive and not is_quiet():
        console.print(Text(table))
    else:
        logger.info("%s", verdict)


class LogDisplay:
    """One line every ``log_every`` epochs, and for the last one, through ``logging``::

    epoch 010 | loss 0.412 | val 0.731 | 182 ms | bubble 0.19
    """

    def __init__(self, *, epochs: int, log_every: int) -> None:
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

    def evaluating(self) -> None:
        """The epoch's line comes when it is over."""

    def close(self) -> None:
        """Logs the last epoch if that has not happened."""
        self._log_pending()

    def _log_pending(self) -> None:
        if self._pending is not None:
            logger.info("%s", self._pending)
        self._pending = None


class LiveDisplay:
    """Progress with the time left, the latest figures, and how busy each rank is::

    100/200 ========----- 0:00:18  loss 0.412  val 0.731  182 ms/epoch  bubble 0.19
    sent 12.3 MB/s  evaluation 0.31 s
    rank 0 ########################......  busy  81%   1.20 GB
    rank 1 ######################........  busy  75%   1.10 GB
    """

    def __init__(self, console: Console, *, epochs: int) -> None:
        self._accuracy: Mapping[str, float | None] | None = None
        self._evaluation_s: float | None = None
        self._sent, self._bars = "", list[Text]()
        # Fits 80 columns.
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._progress.add_task("starting ...", total=epochs)
        self._live = Live(self._progress, console=console, refresh_per_second=REFRESH_PER_S)
        self._live.start()

    def show(self, record: EpochRecord) -> None:
        """Moves the bar and shows the epoch's figures."""
        self._accuracy = record.accuracy or self._accuracy
        self._evaluation_s = record.evaluation_s or self._evaluation_s
        loss, val, milliseconds, bubble = _figures(record, self._accuracy)
        self._progress.update(
            self._task,
            completed=record.epoch,
            description=f"{loss}  {val}  {milliseconds}/epoch  {bubble}",
        )
        evaluation = (
            "" if self._evaluation_s is None else f"  evaluation {self._evaluation_s:.2f} s"
        )
        self._sent, self._bars = f"sent {_rate(record)}", rank_bars(record)
        self._draw(Text(self._sent + evaluation))

    def evaluating(self) -> None:
        """Counts the seconds of an evaluation, beside those of the one before."""
        last = "" if self._evaluation_s is None else f" (last time {self._evaluation_s:.2f} s)"
        self._draw(_Waiting(f"{self._sent}  evaluating".lstrip(), last))

    def _draw(self, line: "Text | _Waiting") -> None:
        self._live.update(Group(self._progress, line, *self._bars))

    def close(self) -> None:
        """Draws the last state and hands the terminal back."""
        self._live.stop()


class _Waiting:
    """A line that says for how long already, whenever it is drawn."""

    def __init__(self, what: str, rest: str) -> None:
        self._what, self._rest, self._start_s = what, rest, time.monotonic()

    def __rich__(self) -> Text:
        return Text(f"{self._what} {time.monotonic() - self._start_s:.0f} s{self._rest}")


def rank_bars(record: EpochRecord) -> list[Text]:
    """How much of the epoch each rank computed, and the most memory it has held."""
    lines = []
    ranks = range(len(record.compute_s))
    for rank in ranks[:MOST_RANKS]:
        share = min(max(record.compute_s[rank] / max(record.epoch_s, 1e-9), 0.0), 1.0)
        busy = round(share * BAR_CELLS)
        bar = Text(f"rank {rank:<3d} ")
        bar.append("#" * busy, style="green").append("." * (BAR_CELLS - busy), style="dim")
        memory = record.peak_memory_bytes[rank] / 1e9
        lines.append(bar.append(f"  busy {share:4.0%}  {memory:6.2f} GB"))
    if len(ranks) > MOST_RANKS:
        lines.append(Text(f"... {len(ranks) - MOST_RANKS} more ranks"))
    return lines


def _rate(record: EpochRecord) -> str:
    """Bytes that all ranks send in a second of training."""
    sent = sum(n for kind, n in record.comm_bytes.items() if kind != "evaluation")
    return f"{sent / max(record.epoch_s, 1e-9) / 1e6:.1f} MB/s"


def _figures(record: EpochRecord, accuracy: Mapping[str, float | None] | None) -> tuple[str, ...]:
    """Loss, validation figure of the latest evaluation, time and bubble, in fixed width."""
    val = (accuracy or {}).get("val")  # None where nobody validates
    return (
        f"loss {record.loss:5.3f}",
        "val   -  " if val is None else f"val {val:5.3f}",
        f"{record.epoch_s * 1e3:3.0f} ms",
        f"bubble {record.bubble_fraction:4.2f}",
    )
