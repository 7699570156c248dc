"""How long a run stands still for a checkpoint, written beside the next epoch or before it.

Both kinds in one process, in turn, so that what else the machine does meets both::

    python benchmarks/saving.py --out runs/saving
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gnnpipe.config import load_config
from gnnpipe.metrics import read_metrics
from gnnpipe.saving import Saver
from gnnpipe.trainer import Trainer

EVERY = 3
CONFIG = [
    "data.name=digits",
    "partition.num_chunks=4",
    "model.num_layers=32",
    "model.hidden_channels=256",
    f"checkpoint.every={EVERY}",
    "training.eval_every=100",
    "run.tensorboard=false",
    "run.log_every=100",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(argv)
    stalls: dict[str, list[float]] = {"false": [], "true": []}
    epochs_s: list[float] = []
    for number in range(2 * options.rounds):
        kind = ("false", "true")[number % 2]
        directory = options.out / f"{number}-{kind}"
        shutil.rmtree(directory, ignore_errors=True)
        run = [f"training.epochs={options.epochs}", f"checkpoint.asynchronous={kind}"]
        seconds = timed(load_config(None, [*CONFIG, *run, f"run.dir={directory}"]))
        stalls[kind] += seconds[: (options.epochs - 1) // EVERY]  # Not the last: nothing follows.
        epochs_s += [record["epoch_s"] for record in read_metrics(directory / "metrics.jsonl")]
        shards = sorted(directory.glob("checkpoints/*/rank-00000.safetensors"))
        size = shards[-1].stat().st_size
    before, after = (statistics.median(stalls[kind]) for kind in ("false", "true"))
    sys.stdout.write(
        f"{size / 1e6:.0f} MB, epoch {statistics.median(epochs_s):.2f} s (median);"
        f" the run stands still for {before:.3f} s ({min(stalls['false']):.3f} -"
        f" {max(stalls['false']):.3f}) when it waits for the disk and {after:.3f} s"
        f" ({min(stalls['true']):.3f} - {max(stalls['true']):.3f}) when it does not:"
        f" {after / before:.2f} of it\n"
    )
    return 0


def timed(config: Any) -> list[float]:
    """Trains; returns what each checkpoint took of the epoch loop's time, seconds."""
    seconds: list[float] = []
    plain: dict[str, Callable[..., None]] = {"save": Saver.save, "finish": Saver.finish}
    depth = 0

    def watch(name: str) -> Callable[..., None]:
        def call(self: Saver, *arguments: Any, **options: Any) -> None:
            nonlocal depth
            is_open = name == "save" or self._open is not None
            start_s, depth = time.perf_counter(), depth + 1
            plain[name](self, *arguments, **options)
            depth -= 1
            if depth == 0 and name == "save":
                seconds.append(0.0)
            if depth == 0 and is_open:
                seconds[-1] += time.perf_counter() - start_s

        return call

    for name in plain:
        setattr(Saver, name, watch(name))
    try:
        Trainer(config).fit()
    finally:
        for name, function in plain.items():
            setattr(Saver, name, function)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
