"""The same run on one process and on Ray clusters of 1, 2 and 3 raylets on this host.

Losses must be equal bit for bit, wherever Ray puts the ranks::

    python benchmarks/raylets.py --out runs/raylets
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS = 3
CONFIG = [
    "data.name=digits",
    "partition.num_chunks=4",
    "model.num_layers=4",
    "model.hidden_channels=8",
    "training.epochs=12",
    "run.tensorboard=false",
    "run.threads=1",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all cases; 0 if all have the same losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--raylets", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args(argv)
    out = options.out.resolve()
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    run(["gnnpipe", "train"], out / "alone")
    wanted, is_equal = losses(out / "alone"), True
    for number in options.raylets:
        cpus = -(-NUM_RANKS // number)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
        for _ in range(number - 1):
            cluster.add_node(num_cpus=cpus)
        start_s = time.monotonic()
        try:
            stages = f"parallel.num_stages={NUM_RANKS}"
            run(["launch", "ray", "--address", cluster.address], out / f"raylets-{number}", stages)
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]
        is_same = losses(out / f"raylets-{number}") == wanted
        is_equal &= is_same
        seconds = time.monotonic() - start_s
        sys.stdout.write(f"{number} raylet(s): losses equal {is_same}, {seconds:.0f} s\n")
        sys.stdout.flush()
    return 0 if is_equal else 1


def run(command: Sequence[str], directory: Path, *more: str) -> None:
    """One run of the command line."""
    words = [sys.executable, "-P", "-m", *command, *CONFIG, *more, f"run.dir={directory}"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def losses(directory: Path) -> list[float]:
    """The loss of each epoch."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    sys.exit(main())
