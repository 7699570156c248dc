"""Real processes that are killed, stopped and restarted: every run ends, and ends the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from resuming import (
    EPOCHS,
    losses,
    ring_run,
    train_on,
    train_until,
    wait_for_epochs,
    write_undisturbed,
)

from gnnpipe.cli import main
from gnnpipe.config import load_config
from gnnpipe.environment import child_environment
from gnnpipe.preflight import replanned

pytestmark = pytest.mark.timeout(250)

TIMEOUT_S = 200


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("ring")
    write_undisturbed(folder)
    return folder


@contextmanager
def launched(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """``python -m launch local`` with two ranks; ended with the block."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "launch", "local", "--nproc", "2", *arguments],
        env=child_environment({"OMP_NUM_THREADS": "1"}),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def long_run(ring: Path, directory: Path, *more: str) -> list[str]:
    """More epochs than a test waits for before it disturbs the run."""
    epochs = f"training.epochs={20 * EPOCHS}"
    return [*ring_run(ring, directory, "parallel.num_stages=2", epochs, *more)]


def pid_of(rank: int, parent: int) -> int:
    """Process id of a rank that the launcher has started."""
    for path in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        variables = Path(f"/proc/{path}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return int(path)
    raise AssertionError(f"rank {rank} is not there")


def test_a_killed_rank_restarts_the_run_from_its_newest_checkpoint(
    ring: Path, tmp_path: Path
) -> None:
    with launched("--max-restarts", "1", *long_run(ring, tmp_path)) as process:
        wait_for_epochs(tmp_path, 7, limit_s=TIMEOUT_S)
        os.kill(pid_of(1, process.pid), signal.SIGKILL)
        _, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, error
    assert "launch: rank 1 was killed by SIGKILL\nlaunch: restart 1 of 1\n" in error
    assert "going on after epoch " in error
    assert losses(tmp_path) == losses(ring / "whole")


def test_sigterm_leaves_a_checkpoint_and_status_0(ring: Path, tmp_path: Path) -> None:
    run = long_run(ring, tmp_path, "checkpoint.every=100000")
    with launched(*run) as process:
        wait_for_epochs(tmp_path, 3, limit_s=TIMEOUT_S)
        process.terminate()
        _, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, error
    assert "stopped by SIGTERM after epoch " in error
    done = len(losses(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"epoch-{done:06d}"]
    train_on([*run, "parallel.num_stages=1"])
    assert losses(tmp_path) == losses(ring / "whole")


def test_a_rank_that_says_nothing_is_named_within_the_timeout(ring: Path, tmp_path: Path) -> None:
    with launched(*long_run(ring, tmp_path, "run.timeout_s=5")) as process:
        wait_for_epochs(tmp_path, 3, limit_s=TIMEOUT_S)
        victim = pid_of(1, process.pid)
        os.kill(victim, signal.SIGSTOP)
        started_s = time.monotonic()
        _, error = process.communicate(timeout=TIMEOUT_S)
    assert time.monotonic() - started_s < 60
    assert process.returncode == 1
    assert "rank 1 does not answer" in error
    assert "(limit 5 s)" in error
    assert not Path(f"/proc/{victim}").exists()


@pytest.mark.parametrize(
    ("planned", "ranks", "stages", "ways"),
    [
        ((4, 1), 3, 3, 1),
        ((2, 2), 2, 1, 2),
        ((2, 2), 3, 3, 1),
        ((2, 1), 4, 4, 1),
        ((4, 1), 1, 1, 1),
    ],
)
def test_a_restart_with_other_ranks_plans_anew(
    planned: tuple[int, int], ranks: int, stages: int, ways: int
) -> None:
    overrides = [f"parallel.num_stages={planned[0]}", f"parallel.num_ways={planned[1]}"]
    config = load_config(None, [*overrides, "parallel.virtual_stages=2"])
    parallel = replanned(config, ranks).parallel
    assert (parallel.num_stages, parallel.num_ways, parallel.virtual_stages) == (stages, ways, 1)
    assert replanned(config, config.world_size) is config


def test_a_restart_on_one_rank_goes_on_with_what_two_ranks_saved(
    ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = long_run(ring, tmp_path, "training.epochs=6", "parallel.num_stages=1")
    train_until(run, 4)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["train", *run, "parallel.num_stages=2"]) == 0
    assert losses(tmp_path) == losses(ring / "whole")[:6]
