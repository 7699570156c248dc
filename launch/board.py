"""What one rank of a Ray job does, and the board on which it leaves word for the driver."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import ray

from gnnpipe.config import from_dict
from gnnpipe.environment import RESTARTS_VARIABLE
from gnnpipe.errors import UserError
from gnnpipe.preflight import replanned
from gnnpipe.run_directory import summary_text


class Board:
    """Lines for the driver; runs as an actor beside the ranks."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []
        self._mistake: str | None = None
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
    if os.environ.get("RANK") == "0":
        os.environ[RESTARTS_VARIABLE] = str(ray.get(board.start.remote()))
        logger = logging.getLogger("gnnpipe")
        logger.setLevel(logging.WARNING if job["is_quiet"] else logging.INFO)
        logger.addHandler(BoardHandler(board))
        logger.propagate = False
    try:
        summary = Trainer(config).fit()
    except UserError as error:
        ray.get(board.refuse.remote(str(error)))
        return
    if summary and not job["is_quiet"]:
        ray.get(board.put.remote("out", summary_text(summary, config.run.dir)))
