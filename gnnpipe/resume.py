"""Decides on rank 0 where a run starts: anew, from a checkpoint, or not at all."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gnnpipe import checkpoint, environment
from gnnpipe.checkpoint import BEST_FILE, Checkpoint, CheckpointError
from gnnpipe.config import Config, to_dict, to_yaml
from gnnpipe.errors import UserError
from gnnpipe.run_directory import (
    CHECKPOINTS_DIR,
    FREE_FIELDS,
    METRICS_FILE,
    PARTITION_DIR,
    SUMMARY_FILE,
    WEIGHTS_DIR,
    differing_fields,
    flatten,
    prepare_run_directory,
)

# A run that branches off from a named checkpoint may be trained otherwise.
BRANCH_FREE_FIELDS = (*FREE_FIELDS, "training.", "history.")
STATE_FIELDS = ("graph_fingerprint", "chunk_id_sha256")

logger = logging.getLogger("gnnpipe")


class Start(NamedTuple):
    """Where a run starts; plain values, so that rank 0 can tell the others."""

    summary: dict[str, Any] | None = None
    """Of a run that is done already."""
    is_begun: bool = False
    """Whether the run directory holds an earlier part of this run."""
    path: str | None = None
    """The checkpoint to start from."""
    epoch: int = 0
    """The last epoch that it holds."""
    state: Mapping[str, Any] = {}
    """What it holds that is no tensor."""
    partition: str | None = None
    """The partition that the run has used so far, if it was its own."""

    def to_json(self) -> str:
        """As text."""
        return json.dumps(self._asdict())


def find_start(config: Config) -> Start:
    """Looks into the run directory and verifies the checkpoint to start from.

    Raises:
        UserError: another run's directory, no sound checkpoint, or one of another run.
    """
    wish, directory = config.checkpoint.resume, Path(config.run.dir)
    found = prepare_run_directory(directory, to_yaml(config), is_resumable=wish != "none")
    if found.state == "finished":
        logger.info("%s holds this very run, finished", directory)
        return Start(summary=found.summary)
    folder = directory / CHECKPOINTS_DIR
    checkpoint.clean(folder)
    chosen, is_begun = None, found.state == "unfinished"
    if wish not in ("auto", "none") and not (is_begun and environment.is_restart()):
        chosen = _named(Path(wish))
        _adopt(chosen, config, is_begun=is_begun)
        is_begun = True
    elif is_begun:
        chosen = _newest(folder)
    if chosen is None:
        _check_restartable(directory, found.summary)
        partition = directory / PARTITION_DIR
        return Start(is_begun=is_begun, partition=_existing(partition) if is_begun else None)
    if chosen.epoch > config.training.epochs:
        raise UserError(
            f"`training.epochs` (={config.training.epochs}) must be at least the {chosen.epoch} of"
            f" the checkpoint {chosen.path}; train for more, or choose an earlier one"
        )
    _restore_best(chosen, directory)
    logger.info("going on after epoch %d with %s", chosen.epoch, chosen.path)
    partition = directory / PARTITION_DIR
    return Start(
        None, is_begun, str(chosen.path), chosen.epoch, chosen.state, _existing(partition)
    )


def check_same(state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Checks that a checkpoint is of this graph and these chunks.

    Args:
        state: of the checkpoint.
        facts: of the run.

    Raises:
        UserError: naming the fields that differ.
    """
    differing = [name for name in STATE_FIELDS if state.get(name) != facts[name]]
    if differing:
        raise UserError(
            f"the checkpoint must be of this graph and partition, {', '.join(differing)} differ;"
            " use the partition that it was trained on (partition.path) or another run.dir"
        )


def checked_threads(state: Mapping[str, Any], config: Config, threads: int) -> int:
    """The number of CPU threads to go on with: sums depend on it in their last bits."""
    before = state.get("threads", threads)
    if before == threads:
        return threads
    if config.run.threads == "auto" and before < threads:
        logger.info("using %d thread(s) for each rank, as before", before)
        return int(before)
    if config.run.threads == "auto":
        raise UserError(
            f"`run.threads` (=auto, {threads} here) must be the {before} that the checkpoint was"
            f" computed with, or the numbers change; set run.threads={before}, or"
            f" run.threads={threads} to accept that"
        )
    logger.warning("run.threads was %d: the last bits of the numbers change", before)
    return threads


def _named(path: Path) -> Checkpoint:
    """The checkpoint that the user names: its own directory, or the newest of a run's."""
    if (path / CHECKPOINTS_DIR).is_dir():
        chosen = _newest(path / CHECKPOINTS_DIR)
        if chosen is not None:
            return chosen
    try:
        return checkpoint.read(path)
    except CheckpointError as error:
        raise UserError(
            f"`checkpoint.resume` (={path}) must be a sound checkpoint or a run directory that"
            f" has one: {error}; choose another or set checkpoint.resume=auto"
        ) from None


def _newest(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint; tells of damaged ones."""
    chosen, complaints = checkpoint.newest(folder)
    for complaint in complaints:
        logger.warning("skipping a damaged checkpoint: %s", complaint)
    if chosen is None and complaints:
        raise checkpoint.damaged(complaints)
    return chosen


def _adopt(chosen: Checkpoint, config: Config, *, is_begun: bool) -> None:
    """Makes the run directory continue a named checkpoint: its figures, its partition."""
    directory, source = Path(config.run.dir), chosen.path.resolve().parents[1]
    here = flatten(to_dict(config))
    differing = differing_fields(chosen.state["config"], here, free=BRANCH_FREE_FIELDS)
    if differing:
        raise UserError(
            f"`checkpoint.resume` (={config.checkpoint.resume}) holds another model or data set: "
            f"{', '.join(differing)}; choose another checkpoint or change these"
        )
    if source == directory.resolve():  # Going back: what came after it no longer counts.
        for name in checkpoint.names(source / CHECKPOINTS_DIR):
            if name > chosen.path.name:
                checkpoint.remove(source / CHECKPOINTS_DIR / name)
        return
    if is_begun:
        raise UserError(
            f"`run.dir` (={directory}) holds a run already; choose another run.dir to branch off"
            f" from {chosen.path}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source / METRICS_FILE, directory / METRICS_FILE)
    except OSError as error:
        raise UserError(
            f"`checkpoint.resume` (={chosen.path}) must lie in a run directory with its"
            f" {METRICS_FILE} ({error.strerror}); name a checkpoint inside its run"
        ) from None
    if config.partition.path is None and (source / PARTITION_DIR).is_dir():
        shutil.copytree(source / PARTITION_DIR, directory / PARTITION_DIR, dirs_exist_ok=True)


def _restore_best(chosen: Checkpoint, directory: Path) -> None:
    """Puts the best weights back as they were at the checkpoint."""
    target = directory / WEIGHTS_DIR / BEST_FILE
    if BEST_FILE not in chosen.manifest["files"]:
        target.unlink(missing_ok=True)
        return
    target.parent.mkdir(exist_ok=True)
    draft = target.with_name(target.name + ".tmp")
    shutil.copyfile(chosen.path / BEST_FILE, draft)
    draft.replace(target)


def _check_restartable(directory: Path, summary: Mapping[str, Any] | None) -> None:
    if summary is not None:
        raise UserError(
            f"`run.dir` (={directory}) holds a finished run without a checkpoint to go on from;"
            f" choose another run.dir, or delete its {SUMMARY_FILE} to start again"
        )


def _existing(path: Path) -> str | None:
    return str(path.resolve()) if path.is_dir() else None
