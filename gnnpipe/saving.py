"""Writes checkpoints: every rank its shard, rank 0 the manifest; all of it or an error for all.

Between two epochs a rank only copies its state. A thread writes the copy while the next epoch
runs, and before that epoch's figures are told, the ranks agree on how it went and rank 0
completes the checkpoint. So a kill at any time repeats one interval at most::

    rank 0   | epoch 50 | copy | epoch 51            | agree, manifest | epoch 52 ...
    thread                     | write, hash, fsync |
"""

import errno
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gnnpipe import checkpoint
from gnnpipe.checkpoint import BEST_FILE, FileFacts
from gnnpipe.errors import UserError
from gnnpipe.run_directory import CHECKPOINTS_DIR, WEIGHTS_DIR
from gnnpipe.runs import Run


class _Written(NamedTuple):
    """How writing a shard went."""

    code: int
    """The operating system's number of the error, 0 if there was none."""
    facts: FileFacts


class _Open(NamedTuple):
    """A checkpoint that is not complete yet."""

    epoch: int
    state: Mapping[str, Any]
    writing: "Future[_Written]"


class Saver:
    """Saves one rank's part of a run; all ranks call it together. A context manager.

    Args:
        run: this rank's part.
        directory: the run directory, which all ranks see.
        keep: newest checkpoints to keep, besides the best.
        histories: whether to save the historical tables.
        asynchronous: whether to write while the next epoch runs.
    """

    def __init__(
        self, run: Run, directory: str | Path, *, keep: int, histories: bool, asynchronous: bool
    ) -> None:
        self._run = run
        self._directory = Path(directory)
        self._keep = keep
        self._histories = histories
        self._is_asynchronous = asynchronous
        self._folder = self._directory / CHECKPOINTS_DIR
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._open: _Open | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Nothing writes after the run; what a failed run was writing stays a draft.
        self._pool.shutdown()

    def save(self, epoch: int, state: Mapping[str, Any], *, is_last: bool) -> None:
        """Starts the checkpoint of an epoch that has just ended.

        Args:
            epoch: counted from 1.
            state: everything that is no tensor; rank 0's counts.
            is_last: whether no epoch follows, so that :meth:`finish` comes at once.

        Raises:
            UserError: as of :meth:`finish`.
        """
        self.finish()
        tensors = checkpoint.host_copies(self._run.state(histories=self._histories))
        path = checkpoint.draft_path(self._folder, epoch) / checkpoint.shard_name(self._run.rank)
        self._open = _Open(epoch, state, self._pool.submit(_write, path, tensors))
        if is_last or not self._is_asynchronous:
            self.finish()

    def finish(self) -> None:
        """Completes the checkpoint that was started last, if there is one.

        Raises:
            UserError: the disk refused, on every rank; earlier checkpoints are untouched.
        """
        if self._open is None:
            return
        run, (epoch, state, writing) = self._run, self._open
        self._open = None
        code, facts = writing.result()
        # Every rank -> all: how it went, and what the manifest has to know.
        parts = torch.zeros((run.world_size, 34), dtype=torch.int64)
        digest = list(bytes.fromhex(facts.sha256))
        parts[run.rank] = torch.tensor([code, facts.num_bytes, *digest])
        parts = run.total(parts)
        code = int(parts[:, 0].max())
        if run.rank == 0 and not code:
            code = self._publish(epoch, parts, state)
        # Rank 0 -> all: the outcome.
        total = run.total(torch.tensor([code if run.rank == 0 else 0], dtype=torch.int64))
        if code := int(total[0]):
            raise self._refused(epoch, code)

    def _publish(self, epoch: int, parts: torch.Tensor, state: Mapping[str, Any]) -> int:
        """Rank 0: completes the checkpoint and deletes old ones; returns an errno or 0."""
        draft = checkpoint.draft_path(self._folder, epoch)
        files = {
            checkpoint.shard_name(rank): FileFacts(int(part[1]), bytes(part[2:].tolist()).hex())
            for rank, part in enumerate(parts)
        }
        best = self._directory / WEIGHTS_DIR / BEST_FILE
        try:
            if best.exists():
                shutil.copyfile(best, draft / BEST_FILE)
                files[BEST_FILE] = checkpoint.sync_file(draft / BEST_FILE)
            checkpoint.publish(draft, epoch=epoch, files=files, state=state)
            checkpoint.prune(self._folder, self._keep)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _refused(self, epoch: int, code: int) -> UserError:
        if self._run.rank == 0:
            shutil.rmtree(checkpoint.draft_path(self._folder, epoch), ignore_errors=True)
        last = next(iter(checkpoint.names(self._folder)), None)
        kept = f"{last} is intact" if last else "there is none before it"
        return UserError(
            f"`run.dir` (={self._directory}) must take the checkpoint of epoch {epoch}:"
            f" {os.strerror(code)}; {kept}; make room or mend the directory and start again"
        )


def _write(path: Path, tensors: Mapping[str, Tensor]) -> _Written:
    """Writes one rank's shard; what the disk refuses is told to all ranks later."""
    try:
        return _Written(0, checkpoint.write_shard(path, tensors))
    except OSError as error:
        return _Written(error.errno or errno.EIO, FileFacts(0, "0" * 64))
