"""The commands as real processes: imports, exit statuses, signals, foreign packages."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gnnpipe import environment
from gnnpipe.cli import main
from gnnpipe.config import load_config, to_yaml

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 60
HEAVY = ("torch", "numpy", "numba", "scipy", "ray", "torch_geometric")


def python(code: str, *arguments: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code, *arguments]
    env = environment.child_environment({})
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=cwd, env=env
    )


def test_nothing_heavy_loads_before_a_mistake_is_told(tmp_path: Path) -> None:
    code = f"""
import sys
from gnnpipe.cli import main
status = main(sys.argv[1:])
assert not set({HEAVY!r}) & set(sys.modules), sorted(sys.modules)
sys.exit(status)
"""
    for line in ["train parallel.num_stages=4", "train model.depth=3", "evaluate nope"]:
        done = python(code, *line.split(), cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_module_is_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gnnpipe", "train", "--print-config", "seed=5"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        cwd=tmp_path,
        env=environment.child_environment({}),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == to_yaml(load_config(None, ["seed=5"]))


def test_launch_is_passed_on_even_beside_a_foreign_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "launch.py").write_text("raise SystemExit('foreign')\n")
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "local", "--help"]) == 0
    assert "--nproc" in capfd.readouterr().out
    assert main(["launch", "local", "--nproc", "2", "seed=1"]) == 2
    assert capfd.readouterr().err.startswith("error: `--nproc` (=2) must equal")


def start_passing_on(module: Path, body: str) -> "subprocess.Popen[str]":
    """Starts ``main(["partition"])`` with a stand-in for partition that runs ``body``."""
    module.write_text(body)
    code = f"""
import sys
from gnnpipe import cli, environment
found = {{"PYTHONPATH": {str(module.parent)!r}}}
real = environment.child_environment
environment.child_environment = lambda extra: {{**real(extra), **found}}
sys.exit(cli.main(["partition"]))
"""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


SLEEPER = """
import signal, sys, time
def stop(number, frame):
    print("got", number, flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_passed_on_to_the_other_program(tmp_path: Path, number: int) -> None:
    process = start_passing_on(tmp_path / "partition.py", SLEEPER)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"got {int(number)}\n"
        assert process.wait(TIMEOUT_S) == 7


def test_status_of_a_killed_program_is_128_plus_signal(tmp_path: Path) -> None:
    body = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    process = start_passing_on(tmp_path / "partition.py", body)
    with process:
        assert process.wait(TIMEOUT_S) == 128 + signal.SIGKILL


def test_child_whose_parent_is_already_gone_ends_at_once() -> None:
    code = "from gnnpipe.cli import main; main(['train', '--print-config'])"
    env = {**environment.child_environment({}), environment.PARENT_VARIABLE: "1999999999"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=env,
    )
    assert (done.returncode, done.stdout) == (1, "")
