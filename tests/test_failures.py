"""What goes wrong on one rank ends all of them, soon, and says which rank and why."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import failing_rank
import numpy as np
import pytest
from combinations import write_npz

from gnnpipe.metrics import read_metrics
from gnnpipe.preflight import thread_variables
from launch.local import run_local

pytestmark = [pytest.mark.timeout(200), pytest.mark.usefixtures("_compiled_kernels")]

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 120
END_TIMEOUT_S = 20
"""From the discovery of the trouble to the end of all ranks; an idle machine needs five."""


@pytest.fixture
def graph_file(tmp_path: Path) -> Path:
    write_npz(tmp_path / "graph.npz", [(i, (i + 1) % 16) for i in range(16)], num_nodes=16)
    return tmp_path / "graph.npz"


@pytest.fixture(scope="module")
def _compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fills the cache, so that no rank compiles while another waits for it."""
    folder = tmp_path_factory.mktemp("compile")
    write_npz(folder / "graph.npz", [(i, i + 1) for i in range(5)], num_nodes=6)
    with pytest.raises(RuntimeError, match="the layer broke"):
        failing_rank.train("raise", "5", folder, num_stages=1)


def run_into_trouble(
    how: str, directory: Path, capfd: pytest.CaptureFixture[str], *, unnoticed_s: int = 0
) -> list[str]:
    """Runs three ranks of which rank 1 gets into trouble; returns the lines on stderr."""
    capfd.readouterr()
    arguments = [how, str(unnoticed_s or 60), str(directory)]
    command = [sys.executable, "-W", "error", str(failing_rank.__file__), *arguments]
    variables = thread_variables(1)
    # The others of a killed rank find out by themselves; on a busy host that takes a while.
    grace_s = 15.0 if how == "kill" else 5.0
    assert run_local(command, 3, variables=variables, grace_s=grace_s, kill_after_s=1) == 1
    trouble_s = (directory / failing_rank.TROUBLE).stat().st_mtime
    assert time.time() - trouble_s < unnoticed_s + END_TIMEOUT_S
    assert [record["epoch"] for record in read_metrics(directory / "run/metrics.jsonl")] == [1]
    assert not (directory / "run/summary.json").exists()
    captured = capfd.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def of_rank(rank: int, lines: list[str]) -> list[str]:
    start = f"[rank {rank}] "
    return [line.removeprefix(start) for line in lines if line.startswith(start)]


def test_exception_on_one_rank_ends_all_and_shows_its_traceback(
    graph_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = run_into_trouble("raise", graph_file.parent, capfd)
    trace = of_rank(1, lines)
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-2:] == ["RuntimeError: the layer broke", "in two lines"]
    assert sum("failing_rank.py" in line for line in trace) > 1
    for rank in (0, 2):
        told = of_rank(rank, lines)
        assert told == ["stopped: rank 1 failed: RuntimeError: the layer broke"]
    assert lines[-1] == "launch: rank 1 failed with status 1"


def test_killed_rank_ends_all_and_is_named(
    graph_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = run_into_trouble("kill", graph_file.parent, capfd)
    assert lines[-1] == "launch: rank 1 was killed by SIGKILL"
    for rank in (0, 2):
        (told,) = of_rank(rank, lines)
        assert re.match(r"stopped: (rank \d stopped: )?rank 1 never (sent|took) .* rows", told)


def test_rank_that_hangs_is_found_within_the_time_limit(
    graph_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = run_into_trouble("stop", graph_file.parent, capfd, unnoticed_s=5)
    for rank in (0, 2):
        (told,) = of_rank(rank, lines)
        assert re.match(
            r"stopped: (rank \d stopped: )?rank 1 never sent boundary rows for \d[FB]\d, "
            r"waited [5-9]\.\d s \(limit 5 s\) in \d[FB]\d: ",
            told,
        )
    assert re.match(r"launch: rank [02] failed with status 1", lines[-1])


def launch_local(directory: Path, *overrides: str) -> "subprocess.Popen[str]":
    """Starts ``python -m launch local`` with two stages on the graph in a directory."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "launch", "local", "--nproc", "2"),
            f"data.name={directory / 'graph.npz'}",
            "partition.num_chunks=2",
            "partition.method=contiguous",
            "parallel.num_stages=2",
            "model.num_layers=2",
            "model.hidden_channels=4",
            f"run.dir={directory / 'run'}",
            "run.tensorboard=false",
            *overrides,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_loss_that_is_no_number_ends_the_run_with_one_message(graph_file: Path) -> None:
    with launch_local(graph_file.parent, "training.lr=1e30") as process:
        out, err = process.communicate(timeout=START_TIMEOUT_S)
    assert (process.returncode, out) == (1, "")
    message = r"ArithmeticError: the loss became (nan|inf) in epoch \d; try a smaller training.lr"
    lines = err.splitlines()
    assert re.fullmatch(message, of_rank(1, lines)[-1])
    (told,) = of_rank(0, lines)
    assert re.fullmatch(f"stopped: rank 1 failed: {message}", told)
    assert lines[-1] == "launch: rank 1 failed with status 1"


def test_mistake_in_the_data_is_one_line_from_all_ranks(graph_file: Path) -> None:
    with np.load(graph_file) as arrays:
        changed = {**arrays, "x": np.full_like(arrays["x"], np.nan)}
    np.savez(graph_file, **changed)
    with launch_local(graph_file.parent) as process:
        out, err = process.communicate(timeout=START_TIMEOUT_S)
    assert (process.returncode, out) == (2, "")
    mistakes = [line for line in err.splitlines() if not line.startswith("loading ")]
    (line,) = mistakes
    assert line.startswith("error: ")
    assert "NaN" in line
    assert [path.name for path in graph_file.parent.iterdir()] == ["graph.npz"]


def children_of(pid: int) -> list[int]:
    """Process ids of the children that all threads of a process have started."""
    paths = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in paths for child in path.read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that waits to be collected does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it took too long"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells who is whose child")
def test_ranks_end_with_a_killed_launcher_and_leave_readable_files(graph_file: Path) -> None:
    metrics = graph_file.parent / "run/metrics.jsonl"
    with launch_local(graph_file.parent, "training.epochs=1000000") as process:
        try:
            wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, START_TIMEOUT_S)
            ranks = children_of(process.pid)
        finally:
            process.kill()
    assert len(ranks) == 2
    wait_until(lambda: not any(is_alive(rank) for rank in ranks), END_TIMEOUT_S)
    records = read_metrics(metrics)
    assert [record["epoch"] for record in records] == list(range(1, len(records) + 1))
