"""Hosts that are taken away: told before, as a scheduler does, or lost for good."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from resuming import EPOCHS, losses, ring_run, train_on, wait_for_epochs, write_undisturbed

pytestmark = pytest.mark.timeout(280)

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 240
GRACE_S = 60.0
"""Between a scheduler's SIGTERM and its SIGKILL; on a busy machine processes end slowly."""
MARK = "GNNPIPE_TEST_HOST"
"""A variable in the environment of every process of one host."""
LOCAL = ["launch", "local", "--nproc", "2"]
TORCHRUN = [
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
    "-m",
    "gnnpipe",
    "train",
]


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("ring")
    write_undisturbed(folder)
    return folder


def long_run(ring: Path, directory: Path, *more: str) -> list[str]:
    """More epochs than a test waits for before it disturbs the run."""
    return ring_run(ring, directory, f"training.epochs={20 * EPOCHS}", *more)


@contextmanager
def host(name: str, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """A launcher and its ranks, which end with the block; torchrun gives each rank a session."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: name},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        signal_all(name, signal.SIGKILL)
        process.communicate()


def signal_all(name: str, number: int) -> int:
    """Sends a signal to every process of a host that has not ended; 0 only counts them."""
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            is_one = f"{MARK}={name}".encode() in (path / "environ").read_bytes().split(b"\0")
            if is_one and state != "Z":
                os.kill(int(path.name), number)
                count += 1
        except OSError:
            continue
    return count


def preempt(name: str, grace_s: float) -> int:
    """What a scheduler does: SIGTERM to all, later SIGKILL to those that are left, counted."""
    assert signal_all(name, signal.SIGTERM) >= 3
    deadline_s = time.monotonic() + grace_s
    while signal_all(name, 0) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return signal_all(name, signal.SIGKILL)


@pytest.mark.parametrize("launcher", [LOCAL, TORCHRUN], ids=["local", "torchrun"])
def test_a_preempted_run_stops_with_a_checkpoint_within_the_grace(
    launcher: list[str], ring: Path, tmp_path: Path
) -> None:
    run = long_run(ring, tmp_path, "parallel.num_stages=2", "checkpoint.every=100000")
    with host(str(tmp_path), *launcher, *run) as process:
        wait_for_epochs(tmp_path, 3, limit_s=TIMEOUT_S)
        assert preempt(str(tmp_path), GRACE_S) == 0
        _, error = process.communicate(timeout=TIMEOUT_S)
    done = len(losses(tmp_path))
    assert f"stopped by SIGTERM after epoch {done}; the same command goes on from there" in error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"epoch-{done:06d}"]
    train_on([*run, "parallel.num_stages=1"])
    assert losses(tmp_path) == losses(ring / "whole")


def test_a_grace_that_is_too_short_costs_the_epochs_since_the_last_checkpoint(
    ring: Path, tmp_path: Path
) -> None:
    run = long_run(ring, tmp_path, "parallel.num_stages=2", "checkpoint.every=5")
    with host(str(tmp_path), *LOCAL, *run):
        wait_for_epochs(tmp_path, 12, limit_s=TIMEOUT_S)
        assert preempt(str(tmp_path), grace_s=0.0) >= 1  # Of three; a rank may be quicker.
    assert len(losses(tmp_path)) < 20 * EPOCHS
    train_on([*run, "parallel.num_stages=1"])
    assert losses(tmp_path) == losses(ring / "whole")


def test_torchrun_goes_on_with_the_hosts_that_are_left(ring: Path, tmp_path: Path) -> None:
    """Of two agents with a rank each one is killed; its rank ends with it, and none comes back."""
    run = long_run(ring, tmp_path, "parallel.num_stages=2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quick = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
    agent = ["torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"]
    agent += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
    agent += ["--local_addr", "127.0.0.1", "--max-restarts", "1", "-m", "gnnpipe", "train"]
    start = [*agent[:9], "--rdzv_conf"]
    with (
        host(f"{tmp_path}/a", *start, f"is_host=1,{quick}", *agent[9:], *run) as stays,
        host(f"{tmp_path}/b", *start, f"is_host=0,{quick}", *agent[9:], *run) as goes,
    ):
        wait_for_epochs(tmp_path, 7, limit_s=TIMEOUT_S)
        assert signal_all(f"{tmp_path}/b", 0) == 2
        goes.kill()
        _, error = stays.communicate(timeout=TIMEOUT_S)
        assert stays.returncode == 0, error
        assert signal_all(f"{tmp_path}/b", 0) == 0
    assert "going on after epoch " in error
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["world_size"] == 1
    assert losses(tmp_path) == losses(ring / "whole")
