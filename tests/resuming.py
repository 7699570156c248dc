"""Runs that are stopped on the way and go on: jobs of the pool, and small runs in this process."""

import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from combinations import both_ways, save_partition, write_npz

from gnnpipe.config import load_config
from gnnpipe.errors import Stopped
from gnnpipe.metrics import EpochRecord, read_metrics
from gnnpipe.trainer import Trainer

NUM_NODES = 40
EPOCHS = 8


def train_until(overrides: Sequence[str], epoch: int) -> None:
    """Trains; after an epoch rank 0 gets SIGTERM, and all ranks stop with a checkpoint."""

    def end(record: EpochRecord) -> None:
        if record.epoch == epoch:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=rf"stopped by SIGTERM after epoch {epoch}$"):
        Trainer(load_config(None, overrides), on_epoch_end=[end]).fit()


def train_on(overrides: Sequence[str]) -> None:
    """Trains to the end."""
    Trainer(load_config(None, overrides)).fit()


def write_ring(folder: Path) -> None:
    """A ring of 40 nodes with chords to the seventh neighbour, cut into 4 chunks and 2 ways."""
    ring = [(i, (i + step) % NUM_NODES) for i in range(NUM_NODES) for step in (1, 7)]
    graph = write_npz(folder / "ring.npz", both_ways(ring), num_nodes=NUM_NODES)
    save_partition(graph, folder / "ring-4", num_chunks=4, num_ways=2)


def ring_run(folder: Path, directory: Path, *more: str) -> list[str]:
    """Overrides of a small deep run on the ring."""
    return [
        f"data.name={folder / 'ring.npz'}",
        f"partition.path={folder / 'ring-4'}",
        "partition.num_chunks=4",
        "model.name=gcnii",
        "model.num_layers=6",
        "model.hidden_channels=8",
        f"training.epochs={EPOCHS}",
        "training.eval_every=3",
        "checkpoint.every=3",
        "run.tensorboard=false",
        "run.threads=1",
        "run.timeout_s=150",
        "run.log_every=1000",
        *more,
        f"run.dir={directory}",
    ]


def wait_for_epochs(directory: Path, number: int, *, limit_s: float) -> None:
    """Waits until another process has trained so far."""
    deadline_s, path = time.monotonic() + limit_s, directory / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline_s, "the run did not get on"
        time.sleep(0.002)


def write_undisturbed(folder: Path) -> None:
    """The ring, and in ``whole`` what an undisturbed run of many epochs makes of it."""
    write_ring(folder)
    train_on(ring_run(folder, folder / "whole", f"training.epochs={20 * EPOCHS}"))


def losses(directory: Path) -> list[float]:
    """Losses of a run directory; its epochs must count from 1."""
    records = read_metrics(directory / "metrics.jsonl")
    assert [record["epoch"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def forked(source: Path, target: Path) -> Path:
    """A copy of a run directory."""
    shutil.copytree(source, target)
    return target
