"""Checkpoints written beside the next epoch: what they hold, when they count, what they report."""

import os
import threading
from pathlib import Path

import pytest
from resuming import losses, ring_run, train_on, write_ring

from gnnpipe import checkpoint
from gnnpipe.checkpoint import FileFacts
from gnnpipe.config import load_config
from gnnpipe.metrics import EpochRecord
from gnnpipe.runs import PipelineRun
from gnnpipe.trainer import Trainer

WAIT_S = 20.0


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("ring")
    write_ring(folder)
    train_on(ring_run(folder, folder / "whole"))
    return folder


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory / "checkpoints"))


def after_epoch(number: int, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Is set when an epoch has been trained, before its figures are told."""
    event, train_epoch = threading.Event(), PipelineRun.train_epoch

    def watched(self: PipelineRun, epoch: int, *, is_measured: bool = False) -> float:
        loss = train_epoch(self, epoch, is_measured=is_measured)
        if epoch == number:
            event.set()
        return loss

    monkeypatch.setattr(PipelineRun, "train_epoch", watched)
    return event


def test_the_next_epoch_runs_meanwhile_and_changes_nothing(
    ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard, seen = checkpoint.write_shard, {}
    is_trained = after_epoch(4, monkeypatch)

    def late(path: Path, tensors: object) -> FileFacts:
        assert is_trained.wait(WAIT_S), "the run waited for its checkpoint"
        return write_shard(path, tensors)  # type: ignore[arg-type]

    def look(record: EpochRecord) -> None:
        seen[record.epoch] = names(tmp_path / "run") if record.epoch > 3 else []

    monkeypatch.setattr(checkpoint, "write_shard", late)
    run = ring_run(ring, tmp_path / "run", "checkpoint.keep=9")
    Trainer(load_config(None, run), on_epoch_end=[look]).fit()
    # Complete before the next epoch is told, so that a kill repeats one interval at most.
    assert seen[4] == ["epoch-000003"]
    monkeypatch.undo()
    there = tmp_path / "run" / "checkpoints" / "epoch-000003"
    again = ring_run(ring, tmp_path / "again", f"checkpoint.resume={there}")
    train_on(again)
    assert losses(tmp_path / "again") == losses(ring / "whole")


def test_a_run_may_wait_for_the_disk(
    ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, train_epoch = {}, PipelineRun.train_epoch

    def watched(self: PipelineRun, epoch: int, *, is_measured: bool = False) -> float:
        seen[epoch] = names(tmp_path) if epoch > 3 else []
        return train_epoch(self, epoch, is_measured=is_measured)

    monkeypatch.setattr(PipelineRun, "train_epoch", watched)
    train_on(ring_run(ring, tmp_path, "checkpoint.asynchronous=false"))
    assert seen[4] == ["epoch-000003"]


def test_a_checkpoint_that_was_not_completed_leaves_the_older_one(
    ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_epoch = PipelineRun.train_epoch

    def breaks(self: PipelineRun, epoch: int, *, is_measured: bool = False) -> float:
        if epoch == 7:
            raise RuntimeError("killed beside the checkpoint of epoch 6")
        return train_epoch(self, epoch, is_measured=is_measured)

    with monkeypatch.context() as patch:
        patch.setattr(PipelineRun, "train_epoch", breaks)
        with pytest.raises(RuntimeError, match="killed beside the checkpoint of epoch 6"):
            train_on(ring_run(ring, tmp_path))
    assert names(tmp_path) == [".epoch-000006.tmp", "epoch-000003"]
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]
    train_on(ring_run(ring, tmp_path))
    assert losses(tmp_path) == losses(ring / "whole")


def test_what_breaks_in_the_thread_ends_the_run(
    ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> FileFacts:
        raise AssertionError("two tensors share memory")

    monkeypatch.setattr(checkpoint, "write_shard", breaks)
    with pytest.raises(AssertionError, match="two tensors share memory"):
        train_on(ring_run(ring, tmp_path))
    assert len(losses(tmp_path)) == 3
