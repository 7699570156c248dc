"""What one rank of a Ray job does, and the board on which it leaves word for the driver."""

import logging
import os
import signal
from collections.abc import Mapping
from typing import Any

import ray

from gnnpipe.config import from_dict
from gnnpipe.environment import RESTARTS_VARIABLE
from gnnpipe.errors import Stopped, UserError
from gnnpipe.metrics import EpochRecord
from gnnpipe.preflight import replanned
from gnnpipe.run_directory import summary_text
from gnnpipe.stopping import StopRequest


class Board:
    """Lines for the driver; runs as an actor beside the ranks."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []
        self._mistake: str | None = None
        self._wish: int | None = None
        self._stopped: tuple[str, int] | None = None
        self._num_starts = 0

    def put(self, stream: str, text: str) -> None:
        """Leaves a line.

        Args:
            stream: ``out`` or ``err``.
            text: without its end.
        """
        self._lines.append((stream, text))

    def take(self) -> list[tuple[str, str]]:
        """All lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def start(self) -> int:
        """Rank 0 starts: how often it has done so before."""
        self._num_starts += 1
        return self._num_starts - 1

    def refuse(self, mistake: str) -> None:
        """Notes a user's mistake: starting again would not help."""
        self._mistake = mistake

    def mistake(self) -> str | None:
        """The user's mistake, if one was noted."""
        return self._mistake

    def ask(self, number: int) -> None:
        """The driver got a signal: the ranks shall stop with a checkpoint."""
        self._wish = number

    def wish(self) -> int | None:
        """The signal that the driver got, if it got one."""
        return self._wish

    def stop(self, signal_name: str, epoch: int) -> None:
        """Notes that the ranks have stopped."""
        self._stopped = signal_name, epoch

    def stopped(self) -> tuple[str, int] | None:
        """By which signal and after which epoch the ranks have stopped, if they have."""
        return self._stopped


class Wishes:
    """Called after every epoch: asks the board what the driver was told, without waiting for it.

    Args:
        board: that may have word.
        request: gets the signal.
    """

    def __init__(self, board: Any, request: StopRequest) -> None:  # Any: Ray's handle of an actor
        self._board, self._request = board, request
        self._answer = board.wish.remote()

    def __call__(self, _record: EpochRecord) -> None:
        """Takes the answer if it is there, and asks again."""
        if not ray.wait([self._answer], timeout=0)[0]:
            return
        number = ray.get(self._answer)
        if number is not None:
            self._request.note(signal.Signals(number), None)
        self._answer = self._board.wish.remote()


class BoardHandler(logging.Handler):
    """Logs to the board."""

    def __init__(self, board: Any) -> None:  # Any: Ray's handle of an actor
        super().__init__()
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        """Leaves one line."""
        self._board.put.remote("err", self.format(record))


def train_rank(job: Mapping[str, Any]) -> None:
    """Trains as one rank; Ray has joined it with the others.

    Args:
        job: ``config``, ``board``, ``is_quiet``.
    """
    # Ray ships this function to workers whose threads are settled; torch loads here.
    from gnnpipe.trainer import Trainer

    config, board = from_dict(job["config"]), job["board"]
    config = replanned(config, int(os.environ.get("WORLD_SIZE", config.world_size)))
    request, hooks = StopRequest(), []
    if os.environ.get("RANK") == "0":
        hooks = [Wishes(board, request)]
        os.environ[RESTARTS_VARIABLE] = str(ray.get(board.start.remote()))
        logger = logging.getLogger("gnnpipe")
        logger.setLevel(logging.WARNING if job["is_quiet"] else logging.INFO)
        logger.addHandler(BoardHandler(board))
        logger.propagate = False
    try:
        summary = Trainer(config, on_epoch_end=hooks, request=request).fit()
    except UserError as error:
        ray.get(board.refuse.remote(str(error)))
        return
    except Stopped as stopped:  # Every rank tells the same.
        ray.get(board.stop.remote(stopped.signal_name, stopped.epoch))
        return
    if summary and not job["is_quiet"]:
        ray.get(board.put.remote("out", summary_text(summary, config.run.dir)))
