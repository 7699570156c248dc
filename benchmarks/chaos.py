"""Kills runs at random moments and checks that they lose nothing: losses, processes, epochs.

Each trial draws a launcher, S, W, a rank and a moment from (seed, trial). The run must end by
itself with the losses of an undisturbed one, bit for bit, repeat at most one checkpoint interval,
and leave no process behind::

    python benchmarks/chaos.py --out runs/chaos             50 trials; goes on where it was stopped
    python benchmarks/chaos.py --out runs/chaos --quick     one trial of each kind, S = 2
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 40
EVERY = 5
NUM_TRIALS = 50
LIMIT_S = 900.0
END_S = 15.0
"""How long the processes of a trial may take to end after the launcher has."""
MARK = "GNNPIPE_CHAOS_TRIAL"
POLL_S = 0.005
LAUNCHERS = ("torchrun", "local", "ray")
SHAPES = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
MOMENTS = ("compute", "send", "checkpoint", "evaluation", "stop")
"""``stop`` is SIGSTOP: the rank stays, and says nothing more."""

CONFIG = [
    "data.name=digits",
    "partition.num_chunks=4",
    "model.num_layers=6",
    "model.hidden_channels=16",
    f"training.epochs={EPOCHS}",
    "training.eval_every=4",
    f"checkpoint.every={EVERY}",
    "run.tensorboard=false",
    "run.threads=1",
    "run.log_every=1",
]


class Trial(NamedTuple):
    """One run and how it is disturbed."""

    number: int
    launcher: str
    num_stages: int
    num_ways: int
    moment: str
    epoch: int
    """The signal is sent once this many epochs are done, at the moment's turn."""
    delay_s: float
    """After the moment was seen."""
    victim: int
    """Rank that gets the signal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all trials that ``--out`` has no result of; 0 if every trial held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for runs and results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=NUM_TRIALS)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--timeout-s", type=float, default=120.0, help="run.timeout_s")
    parser.add_argument("--quick", action="store_true", help="one trial of each moment, S=2")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results_path = out / "results.jsonl"
    done = read_results(results_path)
    trials = draw_trials(options.seed, options.trials, options.launchers, is_quick=options.quick)
    for trial in trials:
        if trial.number in done:
            continue
        done[trial.number] = result = run_trial(trial, out, options.timeout_s)
        with results_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    sys.stdout.write(report([done[trial.number] for trial in trials]) + "\n")
    return 0 if all(done[trial.number]["is_sound"] for trial in trials) else 1


def draw_trials(
    seed: int, num_trials: int, launchers: Sequence[str], *, is_quick: bool
) -> list[Trial]:
    """The trials of a seed: the same ones however often the program is started."""
    if is_quick:
        launcher = launchers[0]
        return [
            Trial(number, launcher, 2, 1, moment, 7, 0.002, 1)
            for number, moment in enumerate(MOMENTS)
        ]
    trials = []
    for number in range(num_trials):
        rng = random.Random(seed * 100_003 + number)
        num_stages, num_ways = rng.choice(SHAPES)
        # One trial in ten is Ray's: its start alone takes half a minute.
        is_ray = "ray" in launchers and (number % 10 == 9 or launchers == ["ray"])
        others = [name for name in launchers if name != "ray"]
        trials.append(
            Trial(
                number,
                "ray" if is_ray else rng.choice(others),
                num_stages,
                num_ways,
                rng.choice(MOMENTS[:4]),
                rng.randrange(1, EPOCHS - 1),
                rng.random() * 0.05,
                rng.randrange(num_stages * num_ways),
            )
        )
    return trials


def run_trial(trial: Trial, out: Path, timeout_s: float) -> dict[str, Any]:
    """Starts a run, disturbs it, waits for its end, and judges."""
    baseline = undisturbed(trial, out)
    directory = out / f"trial-{trial.number}"
    subprocess.run(["rm", "-rf", str(directory)], check=True)
    start_s = time.monotonic()
    with (out / f"trial-{trial.number}.log").open("w") as log:
        process = start(trial, directory, log=log, timeout_s=timeout_s)
        disturbance = disturb(trial, directory, process)
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = -1
    end_s = time.monotonic()
    left = left_over(directory)
    losses = read_losses(directory / "metrics.jsonl")
    facts = {
        "is_done": status == 0,
        "is_disturbed": disturbance["pid"] is not None,
        "is_equal": losses == baseline,
        "is_clean": not left,
        "is_cheap": 0 <= disturbance["repeated"] <= EVERY,
    }
    return {
        **trial._asdict(),
        **facts,
        "is_sound": all(facts.values()),
        "status": status,
        "repeated_epochs": disturbance["repeated"],
        "recovery_s": disturbance["recovery_s"],
        "wall_s": round(end_s - start_s, 2),
    }


def undisturbed(trial: Trial, out: Path) -> list[float]:
    """Losses of the run that nobody disturbs; ways change the last bits, stages do not."""
    directory = out / f"undisturbed-W{trial.num_ways}"
    if not (directory / "summary.json").exists():
        quiet = trial._replace(num_stages=1, launcher="local")
        with (out / f"{directory.name}.log").open("w") as log:
            process = start(quiet, directory, log=log, timeout_s=300)
            if process.wait(LIMIT_S) != 0:
                raise RuntimeError(f"the undisturbed run failed, see {log.name}")
    return read_losses(directory / "metrics.jsonl")


def start(
    trial: Trial, directory: Path, *, log: Any, timeout_s: float
) -> "subprocess.Popen[bytes]":
    """Starts the launcher of a trial."""
    num_ranks = trial.num_stages * trial.num_ways
    overrides = [
        *CONFIG,
        f"parallel.num_stages={trial.num_stages}",
        f"parallel.num_ways={trial.num_ways}",
        f"run.timeout_s={timeout_s}",
        f"run.dir={directory}",
    ]
    python = [sys.executable, "-P", "-m"]
    commands: Mapping[str, list[str]] = {
        "local": [*python, "launch", "local", "--nproc", str(num_ranks), "--max-restarts", "3"],
        "torchrun": [
            *[*python, "torch.distributed.run", "--standalone", "--max-restarts", "3"],
            *["--nproc_per_node", str(num_ranks)],
            *["-m", "gnnpipe", "train"],
        ],
        "ray": [*python, "launch", "ray", "--max-restarts", "3"],
    }
    # Inherited by every process of the trial, so that none is overlooked.
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: str(directory)}
    environment = {**os.environ, **own}
    return subprocess.Popen(
        [*commands[trial.launcher], *overrides], env=environment, stdout=log, stderr=log
    )


def disturb(trial: Trial, directory: Path, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """Waits for the moment, sends the signal, and watches until the run is where it was."""
    metrics, nothing = directory / "metrics.jsonl", {"pid": None, "repeated": 0, "recovery_s": 0.0}
    while count(metrics) < trial.epoch:
        if process.poll() is not None:
            return nothing
        time.sleep(POLL_S)
    if not wait_for_moment(trial, directory, process):
        return nothing
    time.sleep(trial.delay_s)
    pids = ranks_of(directory)
    victim = pids.get(trial.victim)
    if victim is None:
        return nothing
    os.kill(victim, signal.SIGSTOP if trial.moment == "stop" else signal.SIGKILL)
    killed_s, before = time.monotonic(), count(metrics)
    while process.poll() is None and time.monotonic() < killed_s + LIMIT_S:
        if count(metrics) > before:
            break
        time.sleep(POLL_S)
    return {
        "pid": victim,
        "repeated": before - resumed_at(directory),
        "recovery_s": round(time.monotonic() - killed_s, 2),
    }


def wait_for_moment(trial: Trial, directory: Path, process: "subprocess.Popen[bytes]") -> bool:
    """Waits until the run does what the trial wants to disturb."""
    seen = count(directory / "metrics.jsonl")
    while process.poll() is None:
        if trial.moment in ("compute", "send", "stop"):
            return True  # Most of an epoch is one or the other; the delay decides.
        if trial.moment == "checkpoint" and list(directory.glob("checkpoints/.epoch-*.tmp")):
            return True
        now = count(directory / "metrics.jsonl")
        if trial.moment == "evaluation" and now > seen and (now + 1) % 4 == 0:
            return True  # The next epoch ends with an evaluation.
        time.sleep(POLL_S / 5)
    return False


def resumed_at(directory: Path) -> int:
    """The epoch of the checkpoint that the run went on from first; 0 if from none."""
    log = directory.with_name(directory.name + ".log").read_text(errors="replace")
    marks = [line for line in log.splitlines() if "going on after epoch " in line]
    return int(marks[0].split("going on after epoch ")[1].split()[0]) if marks else 0


def ranks_of(directory: Path) -> dict[int, int]:
    """Process id of each rank that trains into a directory."""
    found: dict[int, int] = {}
    for pid, command, variables in processes_of(directory):
        if command.startswith(b"ray::") and b"TrainWorker" in command:
            found[len(found)] = pid  # Ray does not say which rank it is.
        elif b"RANK" in variables and b"gnnpipe" in command.split(b"\0"):
            found[int(variables[b"RANK"])] = pid
    return found


def left_over(directory: Path) -> list[int]:
    """Processes of a trial that do not end."""
    deadline_s = time.monotonic() + END_S
    while (left := [pid for pid, _, _ in processes_of(directory)]) and (
        time.monotonic() < deadline_s
    ):
        time.sleep(0.1)
    for pid in left:  # So that they do not disturb the next trial; the result tells of them.
        os.kill(pid, signal.SIGKILL)
    return left


def processes_of(directory: Path) -> list[tuple[int, bytes, dict[bytes, bytes]]]:
    """Process id, command line and environment of every process of a trial."""
    found = []
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            command = (path / "cmdline").read_bytes()
            lines = (path / "environ").read_bytes().split(b"\0")
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        variables = dict(line.split(b"=", 1) for line in lines if b"=" in line)
        if variables.get(MARK.encode()) == str(directory).encode() and state != "Z":
            found.append((int(path.name), command, variables))
    return found


def count(metrics: Path) -> int:
    """Whole lines of a file."""
    try:
        return metrics.read_bytes().count(b"\n")
    except OSError:
        return 0


def read_losses(metrics: Path) -> list[float]:
    """The loss of each epoch."""
    if not metrics.exists():
        return []
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]


def read_results(path: Path) -> dict[int, dict[str, Any]]:
    """Results of earlier starts of this program, by trial."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result["number"]: result for result in map(json.loads, lines)}


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """How many trials held, and how long recovery took."""
    sound = sum(result["is_sound"] for result in results)
    seconds = sorted(result["recovery_s"] for result in results)
    repeated = max(result["repeated_epochs"] for result in results)
    return (
        f"{sound} of {len(results)} trials sound; recovery median {seconds[len(seconds) // 2]:.1f}"
        f" s, longest {seconds[-1]:.1f} s; at most {repeated} of {EVERY} epochs repeated"
    )


if __name__ == "__main__":
    sys.exit(main())
