"""Ctrl-C: once finishes the epoch and leaves a checkpoint, twice ends at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from resuming import wait_for_epochs

from gnnpipe.metrics import read_metrics
from gnnpipe.stopping import AGAIN_S

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 90.0
SMALL = (
    "model.num_layers=2",
    "model.hidden_channels=8",
    "partition.num_chunks=4",
    "partition.method=contiguous",
    "training.epochs=100000",
    "training.eval_every=100000",
    "run.threads=1",
)
# An epoch that nobody waits for.
ENDLESS = """
import time
from gnnpipe.runs import PipelineRun
train_epoch = PipelineRun.train_epoch
def slow(run, epoch, *, is_measured=False):
    if epoch == 3:
        time.sleep(600)
    return train_epoch(run, epoch, is_measured=is_measured)
PipelineRun.train_epoch = slow
"""


@contextmanager
def training(directory: Path, patch: str = "") -> Iterator["subprocess.Popen[str]"]:
    """A run in a process group of its own, as in a terminal."""
    code = f"{patch}\nimport sys; from gnnpipe.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", *SMALL, f"run.dir={directory}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def assert_nobody_is_left(group: int) -> None:
    """The process that writes TensorBoard's files is the last to go."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a process is left")


def test_once_finishes_the_epoch_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    with training(tmp_path) as process:
        wait_for_epochs(tmp_path, 3, limit_s=WAIT_S)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=WAIT_S)
    done = len(read_metrics(tmp_path / "metrics.jsonl"))
    assert process.returncode == 130
    assert f"stopped by SIGINT after epoch {done}; the same command goes on from there" in error
    assert "Traceback" not in error
    assert out == ""
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"epoch-{done:06d}"]
    assert_nobody_is_left(process.pid)


def test_twice_ends_at_once(tmp_path: Path) -> None:
    with training(tmp_path, ENDLESS) as process:
        wait_for_epochs(tmp_path, 2, limit_s=WAIT_S)
        time.sleep(0.5)  # Into the third.
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(AGAIN_S + 0.5)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "interrupted"
    assert "Traceback" not in error
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert_nobody_is_left(process.pid)
