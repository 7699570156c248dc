"""The same run under torchrun and on Ray clusters of 1, 2 and 3 raylets on this host.

Losses must be equal bit for bit, wherever Ray puts the ranks, when a worker is killed, and when
a host goes away for good and the job goes on with fewer ranks::

    python benchmarks/raylets.py --out runs/raylets             all cases that have not held yet
    python benchmarks/raylets.py --out runs/raylets lost        one of them
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "raylets.md"
LIMIT_S = 900.0
EPOCHS = 60
NUM_RANKS = 3
CONFIG = [
    "data.name=digits",
    "partition.num_chunks=4",
    "model.num_layers=4",
    "model.hidden_channels=8",
    f"training.epochs={EPOCHS}",
    "checkpoint.every=5",
    "run.tensorboard=false",
    "run.threads=1",
    "run.log_every=1",
    "run.timeout_s=60",
]


SHAPES = {
    "1": ("undisturbed", "1", "3"),
    "2": ("undisturbed", "2", "3"),
    "3": ("undisturbed", "3", "3"),
    "killed": ("SIGKILL to a worker after epoch 12", "2", "2"),
    "lost": ("one raylet goes after epoch 12, `--min-ranks 1`", "2, then 1", "2, then 1"),
}
"""What happens, on how many raylets, to how many ranks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases; 0 if all end with the same losses."""
    cases = {"1": undisturbed, "2": undisturbed, "3": undisturbed, "killed": killed, "lost": lost}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the runs")
    parser.add_argument("cases", nargs="*", default=list(cases), help=", ".join(cases))
    parser.add_argument("--table", type=Path, default=RESULT, help="the table of all that held")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    if not (out / "torchrun" / "summary.json").exists():
        torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(NUM_RANKS)]
        words = [*torchrun, "-m", "gnnpipe", "train"]
        with started(words, out / "torchrun", NUM_RANKS) as process:
            process.wait(LIMIT_S)
    wanted, is_equal = losses(out / "torchrun"), True
    assert len(wanted) == EPOCHS, f"torchrun failed, see {out / 'torchrun.log'}"
    for name in options.cases:
        if (out / f"held-{name}.json").exists():
            continue
        start_s = time.monotonic()
        shutil.rmtree(out / f"case-{name}", ignore_errors=True)
        status = cases[name](name, out / f"case-{name}")
        is_same = status == 0 and losses(out / f"case-{name}") == wanted
        is_equal &= is_same
        seconds = time.monotonic() - start_s
        sys.stdout.write(f"{name}: status {status}, losses equal {is_same}, {seconds:.0f} s\n")
        sys.stdout.flush()
        if is_same:
            (out / f"held-{name}.json").write_text(json.dumps({"seconds": seconds}))
    options.table.write_text(table(out), encoding="utf-8")
    return 0 if is_equal else 1


def table(out: Path) -> str:
    """The cases whose losses were torchrun's, as Markdown."""
    lines = [
        "# Ray clusters on one host\n",
        f"`python benchmarks/raylets.py --out DIR`; {os.cpu_count()} CPU cores, "
        f"{platform.machine()}; digits, C = 4, 6 layers, {EPOCHS} epochs, a checkpoint every 5;"
        " one run of each case. Losses are compared bit for bit with torchrun, S = 3. Seconds are"
        " from the start of the cluster to its end.\n",
        "| case | raylets | ranks | status | losses equal | s |",
        "| --- | ---: | --- | ---: | --- | ---: |",
    ]
    for name, (what, hosts, ranks) in SHAPES.items():
        path = out / f"held-{name}.json"
        if path.exists():
            seconds = json.loads(path.read_text())["seconds"]
            lines.append(f"| {what} | {hosts} | {ranks} | 0 | yes | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def undisturbed(name: str, directory: Path) -> int:
    """Three ranks on as many raylets as the case is called."""
    cpus = -(-NUM_RANKS // int(name))
    with raylets(int(name), cpus) as cluster, on_ray(cluster, directory, NUM_RANKS) as process:
        return process.wait(LIMIT_S)


def killed(_: str, directory: Path) -> int:
    """A worker is killed: Ray starts all ranks again, from the newest checkpoint."""
    with raylets(2, 1) as cluster, on_ray(cluster, directory, 2) as process:
        wait_for_epochs(directory, 12, process)
        os.kill(workers_of(directory)[-1], signal.SIGKILL)
        return ended(directory, process, "going on after epoch ")


def lost(_: str, directory: Path) -> int:
    """A host goes away: the job goes on with one rank instead of two."""
    with raylets(2, 1) as cluster, on_ray(cluster, directory, 2, "--min-ranks", "1") as process:
        wait_for_epochs(directory, 12, process)
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        return ended(directory, process, "going on after epoch ")


@contextmanager
def raylets(number: int, cpus: int) -> Iterator[Any]:
    """A cluster of this host alone."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
    try:
        for _ in range(number - 1):
            cluster.add_node(num_cpus=cpus)
        yield cluster
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def on_ray(cluster: Any, directory: Path, num_ranks: int, *options: str) -> Any:
    """The run as a job of a cluster."""
    words = ["launch", "ray", "--address", cluster.address, *options]
    return started(words, directory, num_ranks)


@contextmanager
def started(
    words: Sequence[str], directory: Path, num_ranks: int
) -> Iterator["subprocess.Popen[bytes]"]:
    """One run of the command line, ended with the block."""
    command = [sys.executable, "-P", "-m", *words, *CONFIG]
    run = [f"parallel.num_stages={num_ranks}", f"run.dir={directory}"]
    with directory.with_suffix(".log").open("w") as log:
        process = subprocess.Popen([*command, *run], stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for_epochs(directory: Path, number: int, process: "subprocess.Popen[bytes]") -> None:
    """Waits until the run has got so far."""
    path, deadline_s = directory / "metrics.jsonl", time.monotonic() + LIMIT_S
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"the run did not get on, see {directory.with_suffix('.log')}")
        time.sleep(0.005)


def ended(directory: Path, process: "subprocess.Popen[bytes]", sign: str) -> int:
    """Waits for the end; 1 if the log does not say that the run was started again."""
    status = process.wait(LIMIT_S)
    log = directory.with_suffix(".log").read_text(encoding="utf-8")
    return status if sign in log else 1


def workers_of(directory: Path) -> list[int]:
    """Process ids of Ray's workers that hold a file of the run open or map one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = b"TrainWorker" in (path / "cmdline").read_bytes()
            links = [os.readlink(link) for link in (path / "fd").iterdir()] if is_worker else []
            maps = (path / "maps").read_text() if is_worker else ""
        except OSError:
            continue
        if str(directory) in maps or any(link.startswith(str(directory)) for link in links):
            found.append(int(path.name))
    return found


def losses(directory: Path) -> list[float]:
    """The loss of each epoch."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    sys.exit(main())
