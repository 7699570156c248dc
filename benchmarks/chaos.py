"""Kills runs at random moments and checks that they lose nothing: losses, processes, epochs.

Each run takes a launcher, S and W from a table and is struck four times, each time it has got
going again; moments, ranks, epochs and events (see ``benchmarks/moments``) are drawn from (seed,
run). It must end by itself with the losses of an undisturbed one, bit for bit, repeat at most one
checkpoint interval after each strike, and leave no process behind::

    python benchmarks/chaos.py --out runs/chaos             52 kills; goes on where it was stopped
    python benchmarks/chaos.py --out runs/chaos --quick     one run: four kills and a stall, S = 2
"""

import argparse
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
EPOCHS = 48
EVERY = 5
NUM_RUNS = 13
LIMIT_S = 2400.0
END_S = 15.0
"""How long the processes of a run may take to end after the launcher has."""
MARK = "GNNPIPE_CHAOS_RUN"
PLAN = "GNNPIPE_CHAOS_PLAN"
LAUNCHERS = ("torchrun", "ray")
SHAPES = ((1, 2), (4, 1), (2, 2), (2, 1), (4, 2), (1, 1))


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


class Case(NamedTuple):
    """One run and how it is disturbed."""

    number: int
    launcher: str
    num_stages: int
    num_ways: int
    strikes: list[dict[str, Any]]
    """One for each attempt, see ``benchmarks/moments``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all cases that ``--out`` has no result of; 0 if every one so far held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for runs and results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=NUM_RUNS)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of runs; the others later")
    parser.add_argument("--budget-s", type=float, default=1e9, help="start none after this time")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="run.timeout_s")
    parser.add_argument("--quick", action="store_true", help="one run of each kind of strike")
    options = parser.parse_args(argv)
    out, start_s = options.out.resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    done = read_results(out / "results.jsonl")
    cases = [quick_case()] if options.quick else draw_cases(options.seed, options.runs)
    for case in cases:
        is_wanted = options.only is None or case.number in options.only
        is_late = time.monotonic() > start_s + options.budget_s
        if case.number in done or is_late or not is_wanted:
            continue
        done[case.number] = result = run_case(case, out, options.timeout_s)
        with (out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    results = [done[case.number] for case in cases if case.number in done]
    text = report(results, HEAD.format(seed=options.seed))
    (out / "chaos.md").write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(results)} of {len(cases)} runs done\n")
    return 0 if all(result["is_sound"] for result in results) else 1


def draw_cases(seed: int, num_runs: int) -> list[Case]:
    """The cases of a seed: the same ones however often the program is started."""
    cases = []
    for number in range(num_runs):
        rng = random.Random(seed * 100_003 + number)
        num_stages, num_ways = SHAPES[number % len(SHAPES)]
        moments = rng.sample(sorted(MOMENTS), len(MOMENTS))
        strikes = [
            strike(
                "compute" if name == "send" and num_stages * num_ways == 1 else name,
                rank=rng.randrange(num_stages * num_ways),
                epoch=rng.randrange(1, 7),
                share=rng.random(),
            )
            for name in moments
        ]
        # Every second run another launcher, and after all shapes the other one for each shape.
        launcher = LAUNCHERS[(number + number // len(SHAPES)) % len(LAUNCHERS)]
        cases.append(Case(number, launcher, num_stages, num_ways, strikes))
    return cases


def quick_case() -> Case:
    """One strike of each kind, by the launcher that starts soonest."""
    strikes = [strike(name, rank=1, epoch=7, share=0.1) for name in [*MOMENTS, STALL]]
    return Case(0, "local", 2, 1, strikes)


def strike(name: str, *, rank: int, epoch: int, share: float) -> dict[str, Any]:
    """What ``benchmarks/moments`` shall do in one attempt."""
    moment = MOMENTS["compute" if name == STALL else name]
    return {
        "moment": name,
        "rank": rank,
        "places": moment.places,
        "epoch": epoch,
        "events": 1 + int(share * moment.most_events),
        "signal": int(signal.SIGSTOP if name == STALL else signal.SIGKILL),
    }


def run_case(case: Case, out: Path, timeout_s: float) -> dict[str, Any]:
    """Starts a run, waits for its end while the plan disturbs it, and judges."""
    baseline = undisturbed(case, out)
    directory, notes = out / f"run-{case.number}", out / f"notes-{case.number}"
    for path in (directory, notes):
        shutil.rmtree(path, ignore_errors=True)
    notes.mkdir()
    plan = {
        "notes": str(notes),
        "metrics": str(directory / "metrics.jsonl"),
        "strikes": case.strikes,
    }
    with directory.with_suffix(".log").open("w") as log:
        process = start(case, out, directory, log=log, timeout_s=timeout_s, plan=plan)
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    left = left_over(directory)
    kills = [read_strike(notes, number) for number in range(len(case.strikes))]
    facts = {
        "is_done": status == 0,
        "is_disturbed": None not in kills,
        "is_equal": read_losses(directory) == baseline,
        "is_clean": not left,
        "is_cheap": all(0 <= kill["repeated_epochs"] <= EVERY for kill in kills if kill),
    }
    return case._asdict() | facts | {"is_sound": all(facts.values()), "kills": kills}


def read_strike(notes: Path, number: int) -> dict[str, Any] | None:
    """What one strike cost; None if it or the attempt after it did not happen."""
    names = f"strike-{number}", f"begin-{number + 1}", f"resume-{number + 1}"
    paths = [notes / f"{name}.json" for name in names]
    # The next strike may have come before an epoch was done.
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not paths[0].exists() or len(found) < 2:
        return None
    struck, begun = found[:2]
    return {
        "where": struck["where"],
        "repeated_epochs": struck["epochs"] - (begun["epoch"] - 1),
        "recovery_s": begun["time_s"] - struck["time_s"],
    }


def undisturbed(case: Case, out: Path) -> list[float]:
    """Losses of the run that nobody disturbs; ways change the last bits, stages do not."""
    directory = out / f"undisturbed-W{case.num_ways}"
    if not (directory / "summary.json").exists():
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = ["--dataset", "digits", "--num-chunks", "4", "--num-ways", "2"]
        if not (out / "partition").exists():
            command = [sys.executable, "-P", "-m", "partition", *words]
            where = ["--out", str(out / "partition")]
            subprocess.run([*command, *where], env=environment, check=True)
        quiet = case._replace(num_stages=1, launcher="local")
        with directory.with_suffix(".log").open("w") as log:
            process = start(quiet, out, directory, log=log, timeout_s=300, plan=None)
            if process.wait(LIMIT_S) != 0:
                raise RuntimeError(f"the undisturbed run failed, see {log.name}")
    return read_losses(directory)


def start(
    case: Case,
    out: Path,
    directory: Path,
    *,
    log: Any,
    timeout_s: float,
    plan: Mapping[str, Any] | None,
) -> "subprocess.Popen[bytes]":
    """Starts the launcher of a case."""
    num_ranks = str(case.num_stages * case.num_ways)
    overrides = [
        *CONFIG,
        f"partition.path={out / 'partition'}",
        f"parallel.num_stages={case.num_stages}",
        f"parallel.num_ways={case.num_ways}",
        f"run.timeout_s={timeout_s}",
        f"run.dir={directory}",
    ]
    python, restarts = [sys.executable, "-P", "-m"], ["--max-restarts", str(len(case.strikes))]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", num_ranks]
    commands: Mapping[str, list[str]] = {
        "local": [*python, "launch", "local", "--nproc", num_ranks, *restarts],
        "torchrun": [*python, *torchrun, *restarts, "-m", "gnnpipe", "train"],
        "ray": [*python, "launch", "ray", *restarts],
    }
    # Inherited by every process of the run, so that none is overlooked.
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks" / "moments")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", MARK: str(directory)}
    if plan is not None:
        own[PLAN] = json.dumps(plan)
    return subprocess.Popen(
        [*commands[case.launcher], *overrides], env={**os.environ, **own}, stdout=log, stderr=log
    )


def left_over(directory: Path) -> list[int]:
    """Processes of a run that do not end."""
    deadline_s = time.monotonic() + END_S
    while (left := processes_of(directory)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    for pid in left:  # So that they do not disturb the next run; the result tells of them.
        os.kill(pid, signal.SIGKILL)
    return left


def processes_of(directory: Path) -> list[int]:
    """Every process of a run."""
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


def read_losses(directory: Path) -> list[float]:
    """The loss of each epoch."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    sys.exit(main())
