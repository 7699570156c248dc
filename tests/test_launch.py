"""The local launcher: environment of the ranks, statuses, and that no child is left behind."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gnnpipe.config import Config, load_config, to_dict
from gnnpipe.environment import RESTARTS_VARIABLE, child_environment
from launch.__main__ import main
from launch.local import run_local

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 60
LONG_S = 50

pytestmark = pytest.mark.timeout(120)


def child(body: str) -> list[str]:
    """A rank that runs ``body`` with ``rank``, os, sys, time and signal at hand."""
    head = "import os, sys, time, signal; rank = int(os.environ['RANK'])\n"
    return [sys.executable, "-c", head + body]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that waits to be collected does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_for(paths: list[Path]) -> list[int]:
    """Process ids that the ranks wrote into these files."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not all(path.exists() and path.read_text().endswith("\n") for path in paths):
        assert time.monotonic() < deadline_s, "the ranks did not start"
        time.sleep(0.02)
    return [int(path.read_text()) for path in paths]


def ends(pids: list[int]) -> bool:
    deadline_s = time.monotonic() + TIMEOUT_S
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return not any(is_alive(pid) for pid in pids)


def test_every_rank_gets_its_place_and_output_passes_through(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    body = """
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE OMP_NUM_THREADS".split()
path = os.environ["GNNPIPE_RENDEZVOUS"]
assert os.path.isdir(os.path.dirname(path)) and not os.path.exists(path)
open(path + str(rank), "w").close()
print(*[os.environ[name] for name in names], path)
"""
    assert run_local(child(body), 3, variables={"OMP_NUM_THREADS": "5"}) == 0
    captured = capfd.readouterr()
    lines = sorted(line.split() for line in captured.out.splitlines())
    assert [line[:5] for line in lines] == [[str(r), str(r), "3", "3", "5"] for r in range(3)]
    assert len({line[5] for line in lines}) == 1
    assert captured.err == ""
    assert list(tmp_path.iterdir()) == []  # The rendezvous directory is gone.


def test_failed_rank_ends_the_others_and_is_named(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    body = f"""
if rank == 2:
    time.sleep(0.3)
    sys.exit(3)
with open({str(tmp_path)!r} + f"/{{rank}}", "w") as file: print(os.getpid(), file=file)
time.sleep({LONG_S})
"""
    started_s = time.monotonic()
    assert run_local(child(body), 3, grace_s=0.5) == 1
    assert time.monotonic() - started_s < LONG_S / 2
    assert capfd.readouterr().err == "launch: rank 2 failed with status 3\n"
    assert ends([int(path.read_text()) for path in tmp_path.iterdir()])


def test_others_may_end_by_themselves_within_the_grace(capfd: pytest.CaptureFixture[str]) -> None:
    body = """
if rank == 1: sys.exit(1)
time.sleep(1)
print("ended in peace", flush=True)
"""
    assert run_local(child(body), 2, grace_s=LONG_S) == 1
    captured = capfd.readouterr()
    assert captured.out == "ended in peace\n"
    assert captured.err == "launch: rank 1 failed with status 1\n"


def test_rank_that_ignores_sigterm_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    body = f"""
if rank == 1: time.sleep(1); sys.exit(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep({LONG_S})
"""
    started_s = time.monotonic()
    assert run_local(child(body), 2, grace_s=0.2, kill_after_s=0.2) == 1
    assert time.monotonic() - started_s < LONG_S / 2
    assert capfd.readouterr().err == "launch: rank 1 failed with status 1\n"


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (11, "SIGSEGV"), (40, "signal 40")])
def test_rank_that_a_signal_killed_is_named(
    number: int, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    body = f"""
if rank == 1: os.kill(os.getpid(), {number})
time.sleep({LONG_S})
"""
    assert run_local(child(body), 2, grace_s=0) == 1
    assert capfd.readouterr().err == f"launch: rank 1 was killed by {name}\n"


def test_mistake_of_the_user_keeps_status_2_and_adds_no_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    body = """
if rank == 0: print("error: `x` (=1) must be 2", file=sys.stderr)
sys.exit(2)
"""
    assert run_local(child(body), 3) == 2
    assert capfd.readouterr().err == "error: `x` (=1) must be 2\n"


def test_mistake_that_rank_0_did_not_see_is_still_told(capfd: pytest.CaptureFixture[str]) -> None:
    body = f"""
if rank == 1: sys.exit(2)
time.sleep({LONG_S})
"""
    assert run_local(child(body), 2, grace_s=0) == 2
    assert capfd.readouterr().err == "launch: rank 1 failed with status 2\n"


def test_first_failure_is_named_not_the_ones_it_caused(capfd: pytest.CaptureFixture[str]) -> None:
    body = """
time.sleep(1.5 - rank * 0.5)
sys.exit(10 + rank)
"""
    assert run_local(child(body), 3) == 1
    assert capfd.readouterr().err == "launch: rank 2 failed with status 12\n"


def test_program_that_does_not_start_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        run_local(["no-such-program"], 2)
    assert signal.getsignal(signal.SIGTERM) == before
    assert list(tmp_path.iterdir()) == []


def start_launcher(directory: Path, body: str) -> "subprocess.Popen[str]":
    """A launcher of two ranks in a process of its own; each rank notes its process id."""
    note = f"""
from gnnpipe.environment import end_with_parent
end_with_parent()
with open({str(directory)!r} + f"/{{rank}}", "w") as file: print(os.getpid(), file=file)
{body}
time.sleep({LONG_S})
"""
    code = f"""
import sys
from launch.local import run_local
sys.exit(run_local({child(note)!r}, 2, grace_s=1, kill_after_s=1))
"""
    environment = child_environment({"TMPDIR": str(directory)})
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_stops_every_rank(number: signal.Signals, tmp_path: Path) -> None:
    with start_launcher(tmp_path, "") as process:
        pids = wait_for([tmp_path / "0", tmp_path / "1"])
        process.send_signal(number)
        _, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + number
    assert error.splitlines()[-1] == f"launch: stopped by {number.name}"
    assert ends(pids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_signal_kills_even_a_rank_that_ignores_it(tmp_path: Path) -> None:
    with start_launcher(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)") as process:
        pids = wait_for([tmp_path / "0", tmp_path / "1"])
        process.terminate()
        _, error = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, error) == (143, "launch: stopped by SIGTERM\n")
    assert ends(pids)


def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    with start_launcher(tmp_path, "") as process:
        pids = wait_for([tmp_path / "0", tmp_path / "1"])
        process.kill()
        process.wait(TIMEOUT_S)
        assert ends(pids)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "c.yaml").write_text("parallel: {num_stages: 2}\n")
    return tmp_path


MISTAKES = [
    ("", "arguments are required: COMMAND; see `python -m launch --help`"),
    ("spark c.yaml", "invalid choice: 'spark'"),
    ("local c.yaml", "arguments are required: --nproc; see `python -m launch local --help`"),
    ("local --nproc 2", "arguments are required: CONFIG.yaml"),
    ("local --nproc two c.yaml", "invalid int value: 'two'"),
    ("local --nproc 0 c.yaml", "`--nproc` (=0) must be at least 1"),
    ("local --nproc 2 --timeout-grace -1 c.yaml", "`--timeout-grace` (=-1.0) at least 0"),
    ("local --nproc 3 c.yaml", "`--nproc` (=3) must equal `parallel.num_stages` x"),
    ("local --nproc 2 c.yaml parallel.num_stages=4", "(=4); give --nproc 4"),
    ("local --nproc 2 nope.yaml", "cannot read the configuration file `nope.yaml`"),
    ("local --nproc 2 c.yaml model.depth=3", "`model.depth` is not a known key"),
    ("local --nproc 2 c.yaml --colour", "unrecognized arguments: --colour"),
    ("local --nproc 2 c.yaml run.dir=c.yaml", "`run.dir` (=c.yaml) must be a directory"),
    ("local --nproc 2 c.yaml data.name=x.npz", "`data.name` (=x.npz) must be a file"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistake_is_one_error_line_before_any_process_starts(
    line: str,
    message: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_ranks_run_the_train_command_with_the_same_arguments(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def run(command: list[str], nproc: int, **options: object) -> int:
        seen.extend([command, nproc, options])
        return 0

    monkeypatch.setattr("launch.__main__.run_local", run)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert main(["local", "c.yaml", "--nproc", "2", "seed=3"]) == 0
    command = [sys.executable, "-P", "-m", "gnnpipe", "train", "c.yaml", "seed=3"]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    graces = {"grace_s": 5.0, "stop_grace_s": 30.0}
    assert seen == [command, 2, {"variables": threads, **graces}]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["local", "--help"])
    assert "example" in capsys.readouterr().out


def test_module_is_a_program_in_any_directory(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "local", "--nproc", "3", "c.yaml"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: `--nproc` (=3) must equal")


@pytest.mark.parametrize("is_quiet", [False, True])
def test_a_quiet_job_leaves_warnings_only(is_quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import board

    logger = logging.getLogger("gnnpipe")
    before = (logger.level, logger.propagate, list(logger.handlers))
    left = board.Board()

    class Fitted:
        def __init__(self, config: Config, **options: object) -> None:
            """Trains nothing."""

        def fit(self) -> dict[str, object]:
            logger.info("an epoch")
            logger.warning("look here")
            return {"best_epoch": 1}

    class Remote:
        """Ray's handle of an actor, in this process."""

        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(remote=getattr(left, name))

    monkeypatch.setattr("gnnpipe.trainer.Trainer", Fitted)
    monkeypatch.setattr(board, "summary_text", lambda summary, directory: "the summary")
    monkeypatch.setattr(board, "ray", SimpleNamespace(get=lambda value: value))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(RESTARTS_VARIABLE, "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    try:
        config = to_dict(load_config(None, []))
        board.train_rank({"config": config, "board": Remote(), "is_quiet": is_quiet})
    finally:
        logger.level, logger.propagate, logger.handlers = before
    warning = ("err", "look here")
    all_lines = [("err", "an epoch"), warning, ("out", "the summary")]
    assert left.take() == ([warning] if is_quiet else all_lines)


def test_ray_that_does_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    def init(*, address: str, **_: Any) -> None:
        if address == "auto":
            raise ConnectionError("no cluster")
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(os, "environ", dict(os.environ))  # It is changed for Ray's processes.
    monkeypatch.setattr(ray, "init", init)
    assert main(["ray", f"run.dir={tmp_path / 'run'}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: Ray does not start on this host: The current node timed out")
    assert line.count("\n") == 1
    assert "`ray start --head`" in line


def test_quiet_reaches_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []

    def run(config: Config, job: Any) -> int:
        jobs.append(job)
        return 0

    monkeypatch.setattr("launch.cluster.run_on_cluster", run)
    for option in ([], ["--quiet"]):
        assert main(["ray", f"run.dir={tmp_path / 'run'}", *option]) == 0
    assert [job.is_quiet for job in jobs] == [False, True]
