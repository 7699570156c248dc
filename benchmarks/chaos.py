"""Kills runs at random moments and checks that they lose nothing: losses, processes, epochs.

Each trial takes a launcher, S, W and a moment from a shuffled table, and draws the rank, the
epoch and the event (see ``benchmarks/moments``) from (seed, trial). The run must end by itself
with the losses of an undisturbed one, bit for bit, repeat at most one checkpoint interval, and
leave no process behind::

    python benchmarks/chaos.py --out runs/chaos             50 trials; goes on where it was stopped
    python benchmarks/chaos.py --out runs/chaos --quick     one trial of each kind, S = 2
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chaos_report import read_results, report

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 40
EVERY = 5
NUM_TRIALS = 50
LIMIT_S = 400.0
END_S = 15.0
"""How long the processes of a trial may take to end after the launcher has."""
MARK = "GNNPIPE_CHAOS_TRIAL"
PLAN = "GNNPIPE_CHAOS_PLAN"
POLL_S = 0.01
# Ray every fifth time: its start alone takes half a minute.
LAUNCHERS = ("torchrun", "local", "torchrun", "local", "ray")
SHAPES = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2))


class Moment(NamedTuple):
    """What a run does when it is disturbed."""

    places: tuple[str, ...]
    """Functions whose inside is meant."""
    most_events: int
    """The signal comes at one of that many calls and returns inside of them."""


MOMENTS = {
    "compute": Moment(("Engine._forward", "Engine._backward", "Adam.step"), 3000),
    "send": Moment(("Comm.send", "Comm.start_sum"), 300),
    "checkpoint": Moment(("Saver.save", "Saver.finish", "write_shard"), 900),
    "evaluation": Moment(("PipelineRun.evaluate",), 900),
}
STALL = "stall"
"""SIGSTOP while computing: the rank stays, and says nothing more."""

HEAD = f"""`python benchmarks/chaos.py --out DIR --seed {{seed}}`; digits, C = 4, 8 layers,
{EPOCHS} epochs, a checkpoint every {EVERY}."""

CONFIG = [
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
    """The rank waits for the moment from this epoch on, counted from 1."""
    events: int
    """So many calls and returns of the moment happen before the signal."""
    victim: int
    """Rank that gets the signal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all trials that ``--out`` has no result of; 0 if every trial so far held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for runs and results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=NUM_TRIALS)
    parser.add_argument("--budget-s", type=float, default=1e9, help="start none after this time")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="run.timeout_s")
    parser.add_argument("--quick", action="store_true", help="one trial of each moment, S=2")
    options = parser.parse_args(argv)
    out, start_s = options.out.resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    done = read_results(out / "results.jsonl")
    trials = quick_trials() if options.quick else draw_trials(options.seed, options.trials)
    for trial in trials:
        if trial.number in done or time.monotonic() > start_s + options.budget_s:
            continue
        done[trial.number] = result = run_trial(trial, out, options.timeout_s)
        with (out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    results = [done[trial.number] for trial in trials if trial.number in done]
    (out / "chaos.md").write_text(
        report(results, HEAD.format(seed=options.seed)), encoding="utf-8"
    )
    sys.stdout.write(f"{len(results)} of {len(trials)} trials done\n")
    return 0 if all(result["is_sound"] for result in results) else 1


def draw_trials(seed: int, num_trials: int) -> list[Trial]:
    """The trials of a seed: the same ones however often the program is started."""
    table = list(itertools.product(SHAPES, MOMENTS))
    random.Random(seed).shuffle(table)
    trials = []
    for number in range(num_trials):
        rng = random.Random(seed * 100_003 + number)
        (num_stages, num_ways), moment = table[number % len(table)]
        if moment == "send" and num_stages * num_ways == 1:
            moment = "compute"  # Nothing is sent.
        trials.append(
            Trial(
                number,
                LAUNCHERS[number % len(LAUNCHERS)],
                num_stages,
                num_ways,
                moment,
                epoch=rng.randrange(1, EPOCHS - 9),
                events=rng.randrange(1, MOMENTS[moment].most_events),
                victim=rng.randrange(num_stages * num_ways),
            )
        )
    return trials


def quick_trials() -> list[Trial]:
    """One trial of each moment, by the launcher that starts soonest."""
    names = [*MOMENTS, STALL]
    return [Trial(number, "local", 2, 1, name, 7, 90, 1) for number, name in enumerate(names)]


def run_trial(trial: Trial, out: Path, timeout_s: float) -> dict[str, Any]:
    """Starts a run, waits for its end while the plan disturbs it, and judges."""
    baseline = undisturbed(trial, out)
    directory = out / f"trial-{trial.number}"
    shutil.rmtree(directory, ignore_errors=True)
    note = directory.with_suffix(".note")
    note.unlink(missing_ok=True)
    is_stall = trial.moment == STALL
    plan = {
        "rank": trial.victim,
        "places": MOMENTS["compute" if is_stall else trial.moment].places,
        "epoch": trial.epoch,
        "events": trial.events,
        "signal": int(signal.SIGSTOP if is_stall else signal.SIGKILL),
        "note": str(note),
    }
    start_s = time.monotonic()
    with directory.with_suffix(".log").open("w") as log:
        process = start(trial, out, directory, log=log, timeout_s=timeout_s, plan=plan)
        seen = watch(directory, note, process)
    end_s = time.monotonic()
    left = left_over(directory)
    facts = {
        "is_done": process.poll() == 0,
        "is_disturbed": seen["where"] is not None,
        "is_equal": read_losses(directory) == baseline,
        "is_clean": not left,
        "is_cheap": 0 <= seen["repeated_epochs"] <= EVERY,
    }
    is_sound = all(facts.values())
    return trial._asdict() | seen | facts | {"is_sound": is_sound, "wall_s": end_s - start_s}


def undisturbed(trial: Trial, out: Path) -> list[float]:
    """Losses of the run that nobody disturbs; ways change the last bits, stages do not."""
    directory = out / f"undisturbed-W{trial.num_ways}"
    if not (directory / "summary.json").exists():
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = ["--dataset", "digits", "--num-chunks", "4", "--num-ways", "2"]
        if not (out / "partition").exists():
            command = [sys.executable, "-P", "-m", "partition", *words]
            where = ["--out", str(out / "partition")]
            subprocess.run([*command, *where], env=environment, check=True)
        quiet = trial._replace(num_stages=1, launcher="local")
        with directory.with_suffix(".log").open("w") as log:
            process = start(quiet, out, directory, log=log, timeout_s=300, plan=None)
            if process.wait(LIMIT_S) != 0:
                raise RuntimeError(f"the undisturbed run failed, see {log.name}")
    return read_losses(directory)


def start(
    trial: Trial,
    out: Path,
    directory: Path,
    *,
    log: Any,
    timeout_s: float,
    plan: Mapping[str, Any] | None,
) -> "subprocess.Popen[bytes]":
    """Starts the launcher of a trial."""
    num_ranks = str(trial.num_stages * trial.num_ways)
    overrides = [
        *CONFIG,
        f"partition.path={out / 'partition'}",
        f"parallel.num_stages={trial.num_stages}",
        f"parallel.num_ways={trial.num_ways}",
        f"run.timeout_s={timeout_s}",
        f"run.dir={directory}",
    ]
    python, restarts = [sys.executable, "-P", "-m"], ["--max-restarts", "3"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", num_ranks]
    commands: Mapping[str, list[str]] = {
        "local": [*python, "launch", "local", "--nproc", num_ranks, *restarts],
        "torchrun": [*python, *torchrun, *restarts, "-m", "gnnpipe", "train"],
        "ray": [*python, "launch", "ray", *restarts],
    }
    # Inherited by every process of the trial, so that none is overlooked.
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks" / "moments")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", MARK: str(directory)}
    if plan is not None:
        own[PLAN] = json.dumps(plan)
    return subprocess.Popen(
        [*commands[trial.launcher], *overrides], env={**os.environ, **own}, stdout=log, stderr=log
    )


def watch(directory: Path, note: Path, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """Waits for the end; notes where the signal came and when the run was where it had been."""
    seen: dict[str, Any] = {"where": None, "repeated_epochs": 0, "recovery_s": None}
    metrics, before, deadline_s = directory / "metrics.jsonl", 0, time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        if seen["where"] is None and note.exists():
            strike = json.loads(note.read_text())
            seen["where"], before = strike["where"], count(metrics)
        elif seen["where"] and seen["recovery_s"] is None and count(metrics) > before:
            seen["recovery_s"] = time.time() - strike["time_s"]
        time.sleep(POLL_S)
    process.kill()  # Does nothing to one that has ended.
    process.wait()
    if seen["where"] is not None:
        seen["repeated_epochs"] = before - resumed_at(directory.with_suffix(".log"))
    return seen


def resumed_at(log: Path) -> int:
    """The epoch of the checkpoint that the run went on from first; 0 if from none."""
    lines = log.read_text(errors="replace").splitlines()
    marks = [line for line in lines if "going on after epoch " in line]
    return int(marks[0].split("going on after epoch ")[1].split()[0]) if marks else 0


def left_over(directory: Path) -> list[int]:
    """Processes of a trial that do not end."""
    deadline_s = time.monotonic() + END_S
    while (left := processes_of(directory)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    for pid in left:  # So that they do not disturb the next trial; the result tells of them.
        os.kill(pid, signal.SIGKILL)
    return left


def processes_of(directory: Path) -> list[int]:
    """Every process of a trial."""
    mark, found = f"{MARK}={directory}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if mark in variables and state != "Z":
            found.append(int(path.name))
    return found


def count(metrics: Path) -> int:
    """Whole lines of a file."""
    try:
        return metrics.read_bytes().count(b"\n")
    except OSError:
        return 0


def read_losses(directory: Path) -> list[float]:
    """The loss of each epoch."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    sys.exit(main())
