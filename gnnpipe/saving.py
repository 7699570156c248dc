"""Writes checkpoints: every rank its shard, rank 0 the manifest; all of it or an error for all."""

import errno
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gnnpipe import checkpoint
from gnnpipe.checkpoint import BEST_FILE, FileFacts
from gnnpipe.errors import UserError
from gnnpipe.run_directory import CHECKPOINTS_DIR, WEIGHTS_DIR
from gnnpipe.runs import Run

logger = logging.getLogger("gnnpipe")


class Saver:
    """Saves one rank's part of a run; all ranks call it together.

    Args:
        run: this rank's part.
        directory: the run directory, which all ranks see.
        keep: newest checkpoints to keep, besides the best.
        histories: whether to save the historical tables.
    """

    def __init__(self, run: Run, directory: str | Path, *, keep: int, histories: bool) -> None:
        self._run = run
        self._directory = Path(directory)
        self._keep = keep
        self._histories = histories
        self._folder = self._directory / CHECKPOINTS_DIR

    def save(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Writes the checkpoint of an epoch that has just ended.

        Args:
            epoch: counted from 1.
            state: everything that is no tensor; rank 0's counts.

        Raises:
            UserError: the disk refused, on every rank; earlier checkpoints are untouched.
        """
        run, draft = self._run, checkpoint.draft_path(self._folder, epoch)
        code, facts = 0, FileFacts(0, "0" * 64)
        try:
            tensors = run.state(histories=self._histories)
            facts = checkpoint.write_shard(draft / checkpoint.shard_name(run.rank), tensors)
        except OSError as error:
            code = error.errno or errno.EIO
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
