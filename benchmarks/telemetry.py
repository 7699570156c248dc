"""What telemetry costs: the share of the epochs' time that goes into watching them.

    python benchmarks/telemetry.py --pairs 5              # about 5 minutes, two ranks on two cores
    python benchmarks/telemetry.py
    python -m torch.distributed.run --standalone --nproc_per_node 2 benchmarks/telemetry.py

With ``--pairs`` whole runs take turns: one with everything on, one that records nothing, draws
nothing and shows nothing. What telemetry costs is the median of the pairs' differences in wall
time, evaluations included.

Without, one run with everything on. On every rank the calls that only serve telemetry are timed as
they are made (events, gradient norms, gathering the figures, the record, its line, the display,
the timeline file), and set in proportion to the time of the same epochs. Recording happens inside
an epoch, an event at a time: the price of one event is measured beside, and multiplied. Beside it
the CPU seconds of the process that writes TensorBoard's files: they are not the ranks' time, but
a machine with all cores in use pays them.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gnnpipe import loop
from gnnpipe.config import load_config
from gnnpipe.metrics import read_metrics
from gnnpipe.recorder import Recorder
from gnnpipe.runs import PipelineRun
from gnnpipe.telemetry import RunLog
from gnnpipe.trainer import Trainer

NUM_TRIED_EVENTS = 100_000
WARM_UP_EPOCHS = 2

ends_s: list[float] = []
spent_s: Counter[str] = Counter()
events: Counter[str] = Counter()


def main() -> None:
    """Trains once and prints every rank's shares."""
    options = parse()
    if options.pairs:
        return compare(options.pairs, options.ranks)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    watch() if options.switch == "on" else leave_out()
    with tempfile.TemporaryDirectory() as folder:
        directory = options.out or folder
        config = load_config(
            None,
            [
                f"data.name={options.data}",
                f"model.num_layers={options.layers}",
                f"model.hidden_channels={options.channels}",
                f"partition.num_chunks={options.chunks}",
                f"parallel.num_stages={world_size}",
                f"training.epochs={options.epochs}",
                "checkpoint.every=0",
                f"run.dir={directory}",
                f"run.tensorboard={str(options.switch == 'on').lower()}",
                f"run.trace={str(options.switch == 'on').lower()}",
                "run.threads=1",
                "training.eval_every=8",
            ],
        )
        Trainer(config, on_epoch_end=[start_counting]).fit()
        if rank == 0 and options.switch == "off":
            say_figures({"epoch_wall_s": epoch_wall_s()})
        elif rank == 0:
            records = read_metrics(Path(directory) / "metrics.jsonl")[WARM_UP_EPOCHS:]
            report(sum(record["epoch_s"] for record in records), len(records), world_size)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="synthetic:20000:200000:10")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=0, help="runs on and off, in turn")
    parser.add_argument("--ranks", type=int, default=2, help="of each run of a pair")
    parser.add_argument("--switch", choices=("on", "off"), default="on", help="of one run")
    parser.add_argument("--out", help="run directory, kept; the same on every rank")
    return parser.parse_args()


def compare(num_pairs: int, num_ranks: int) -> None:
    """Runs pairs, every second one the other way round, and prints what being watched costs."""
    differences = []
    for pair in range(num_pairs):
        order = ("on", "off") if pair % 2 == 0 else ("off", "on")
        took_s = {switch: run_once(switch, num_ranks) for switch in order}
        differences.append(took_s["on"] / took_s["off"] - 1)
        both = ", ".join(f"{name} {took_s[name] * 1e3:.1f} ms" for name in ("on", "off"))
        say(f"pair {pair + 1}: {both}, {differences[-1]:+.2%}")
    middle = statistics.median(differences)
    say(
        f"{num_ranks} rank(s): {middle:+.2%} of the epochs' wall time, median of {num_pairs} pairs"
    )
    say_figures({"median_difference": middle, "differences": differences})


def run_once(switch: str, num_ranks: int) -> float:
    """Wall seconds of an epoch of one run in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += [str(num_ranks), str(Path(__file__).resolve()), "--switch", switch]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=200)
    return float(json.loads(done.stdout.splitlines()[-1])["epoch_wall_s"])


def leave_out() -> None:
    """Takes away what only serves telemetry."""
    for name in ("action", "step", "send", "wait"):
        setattr(Recorder, name, ignore)
    PipelineRun.gradient_norms = ignore_norms  # type: ignore[method-assign]
    PipelineRun.write_timeline = ignore  # type: ignore[assignment, method-assign]
    RunLog.epoch = only_add_up  # type: ignore[method-assign]


def ignore(*_: Any, **__: Any) -> None:
    """Nothing."""


def ignore_norms(_: PipelineRun) -> list[float]:
    return []


def only_add_up(log: RunLog, record: Any) -> None:
    """What the summary needs."""
    log._tally.add(record)


def epoch_wall_s() -> float:
    """Wall time of an epoch, all that happens between two included."""
    return (ends_s[-1] - ends_s[WARM_UP_EPOCHS - 1]) / (len(ends_s) - WARM_UP_EPOCHS)


def watch() -> None:
    """Times every call that only serves telemetry, on this rank."""
    for owner, names in (
        (PipelineRun, ("gradient_norms", "gather", "transfer_s", "write_timeline")),
        (RunLog, ("epoch",)),
        (loop, ("_record",)),
    ):
        for name in names:
            setattr(owner, name, timed(name.strip("_"), getattr(owner, name)))
    stop = Recorder.stop

    def counted(recorder: Recorder) -> Any:
        found = stop(recorder)
        events["num"] += len(found)
        return found

    Recorder.stop = timed("to an array", counted)  # type: ignore[method-assign]


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        start_s = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent_s[name] += time.perf_counter() - start_s

    return call


def start_counting(record: Any) -> None:
    """Forgets the first epochs, in which things are compiled and connected."""
    ends_s.append(time.perf_counter())
    if record.epoch == WARM_UP_EPOCHS:
        spent_s.clear()
        events.clear()


def event_s() -> float:
    """Seconds that one event costs."""
    recorder = Recorder()
    recorder.start()
    start_s = time.perf_counter()
    for number in range(NUM_TRIED_EVENTS):
        recorder.wait("boundary", 1, number, start_s=time.perf_counter(), end_s=0.0)
    return (time.perf_counter() - start_s) / NUM_TRIED_EVENTS


def report(epochs_s: float, num_epochs: int, world_size: int) -> None:
    """Prints rank 0's shares; the others only record and send."""
    costs = dict(spent_s) | {"events": events["num"] * event_s()}
    say(f"{world_size} rank(s), {num_epochs} epochs of {epochs_s / num_epochs * 1e3:.0f} ms")
    for name, seconds in sorted(costs.items(), key=lambda item: -item[1]):
        say(f"{name:<16}{seconds / num_epochs * 1e3:8.3f} ms per epoch {seconds / epochs_s:8.3%}")
    total = sum(costs.values()) / epochs_s
    child = resource.getrusage(resource.RUSAGE_CHILDREN)
    child_s = child.ru_utime + child.ru_stime
    say(f"telemetry, rank 0: {total:.3%} of the epochs' time")
    say(f"children (the follower, METIS): {child_s:.2f} CPU s beside {epochs_s:.1f} s of training")
    figures = {"telemetry_share": total, "children_cpu_s": child_s, "epochs_s": epochs_s}
    say_figures(figures | {"epoch_wall_s": epoch_wall_s()})


def say_figures(figures: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(figures) + "\n")


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
