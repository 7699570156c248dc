"""``python -m gnnpipe doctor``: what of this machine is fine, and what to do about the rest.

``python -m gnnpipe.doctor FILE RANK`` is one of the two ranks of its send test.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from gnnpipe import environment
from gnnpipe.errors import UserError
from gnnpipe.preflight import check_writable
from gnnpipe.room import free_bytes
from partition import PartitionError, assign

LIBRARIES = {
    "torch": "torch",
    "torch-geometric": "torch_geometric",
    "numpy": "numpy",
    "scipy": "scipy",
    "numba": "numba",
    "pymetis": "pymetis",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
    "ray": "ray",
    "safetensors": "safetensors",
    "pyarrow": "pyarrow",
}
"""Names of packages, and what they are imported as."""
SEND_S = 1.0
SEND_BYTES = 4_000_000
SEND_TIMEOUT_S = 60.0
LITTLE_MEMORY = 2_000_000_000
LITTLE_DISK = 1_000_000_000


class Finding(NamedTuple):
    """One thing that was looked at."""

    state: Literal["ok", "warn", "bad"]
    what: str
    found: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""

    def __str__(self) -> str:
        advice = f"\n{'':18}-> {self.advice}" if self.advice else ""
        return f"{self.state:<5} {self.what:<11} {self.found}{advice}"


def examine(*, send_s: float = SEND_S) -> Iterator[Finding]:
    """Looks at everything that a run needs, the quick things first.

    Args:
        send_s: how long to send between two ranks, seconds.
    """
    yield versions()
    yield threads()
    yield memory()
    yield writing()
    yield from gpus()
    yield metis()
    yield ray()
    yield sending(send_s)


def verdict(findings: list[Finding]) -> str:
    """The last line."""
    bad = [finding.what for finding in findings if finding.state == "bad"]
    if bad:
        return f"to mend before a run can work: {', '.join(bad)}"
    warned = [finding.what for finding in findings if finding.state == "warn"]
    return f"runs will work; worth a look: {', '.join(warned)}" if warned else "all is well"


def versions() -> Finding:
    """Python and the libraries."""
    found, missing = [f"python {sys.version.split()[0]}"], []
    for package in LIBRARIES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding("bad", "versions", f"missing: {', '.join(missing)}", _install(missing))
    return Finding("ok", "versions", ", ".join(found))


def threads() -> Finding:
    """Cores and how many threads a rank would take."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = os.environ.get("OMP_NUM_THREADS", "")
    found = f"{cores} core(s) for this process, OMP_NUM_THREADS {text or 'not set'}"
    if text.split(",")[0].isdecimal() and int(text.split(",")[0]) > (cores or 1):
        advice = f"more threads than cores slow every rank down: unset it or set at most {cores}"
        return Finding("warn", "threads", found, advice)
    return Finding("ok", "threads", found)


def memory() -> Finding:
    """What is free."""
    free = free_bytes()
    found = f"{free / 1e9:.1f} GB free"
    if free < LITTLE_MEMORY:
        return Finding("warn", "memory", found, "end other programs, or train with fewer ranks")
    return Finding("ok", "memory", found)


def writing() -> Finding:
    """Whether runs can be written here, and how much."""
    try:
        for directory in ("runs", tempfile.gettempdir()):
            check_writable(directory, "run.dir")
    except UserError as error:
        advice = "run in a directory of your own, or set run.dir and TMPDIR"
        return Finding("bad", "writing", str(error), advice)
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{Path.cwd()} and {tempfile.gettempdir()}, {free / 1e9:.1f} GB free"
    if free < LITTLE_DISK:
        return Finding("warn", "writing", found, "make room: checkpoints hold the histories too")
    return Finding("ok", "writing", found)


def gpus() -> Iterator[Finding]:
    """Devices, what joins them, and the backends of messages."""
    backends = [name for name in ("gloo", "nccl") if _has_backend(name)]
    if "gloo" not in backends:
        yield Finding("bad", "backends", ", ".join(backends) or "none", _install(["torch"]))
    else:
        yield Finding("ok", "backends", ", ".join(backends))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        build = torch.version.cuda
        found = f"none, torch is built {f'for CUDA {build}' if build else 'without CUDA'}"
        advice = "" if build is None else "if there is one, check its driver with nvidia-smi"
        yield Finding("warn" if build else "ok", "GPUs", f"{found}: ranks compute on CPUs", advice)
        return
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        peers = [i for i in range(count) if i != index and _can_reach(index, i)]
        links = f", reaches {peers} directly" if peers else ""
        yield Finding(
            "ok", f"GPU {index}", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB{links}"
        )
    if "nccl" not in backends:
        advice = "install a torch build with NCCL, or set device=cpu"
        yield Finding("bad", "NCCL", "missing, GPUs cannot talk", advice)


def metis() -> Finding:
    """Cuts a ring, in a child process as a run does."""
    num_nodes = 64
    ring = np.stack([(np.arange(num_nodes) + step) % num_nodes for step in (-1, 1)], axis=1)
    indices = np.sort(ring, axis=1).astype(np.int32).ravel()
    indptr = np.arange(0, 2 * num_nodes + 1, 2, dtype=np.int64)
    try:
        assign(indptr, indices, num_chunks=4, method="metis")
    except PartitionError as error:
        advice = f"{_install(['pymetis'])}, or set partition.method=bfs"
        return Finding("bad", "METIS", str(error), advice)
    return Finding("ok", "METIS", f"pymetis {metadata.version('pymetis')} cuts")


def ray() -> Finding:
    """Whether Ray loads; only `launch ray` needs it."""
    try:
        module = importlib.import_module("ray")
    except Exception as error:  # Whatever a broken installation raises.
        return Finding(
            "warn",
            "Ray",
            f"does not load: {error}",
            "launch ray needs it: " + _install(["ray[train]"]),
        )
    address = os.environ.get("RAY_ADDRESS")
    where = f"RAY_ADDRESS {address}" if address else "no RAY_ADDRESS: launch ray starts its own"
    return Finding("ok", "Ray", f"{module.__version__}, {where}")


def sending(seconds: float) -> Finding:
    """Sends between two ranks on this host for a while."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "gnnpipe.doctor", f"{folder}/meet"]
        env = environment.child_environment({"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"})
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(seconds)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
            for rank in (0, 1)
        ]
        try:
            outputs = [rank.communicate(timeout=SEND_TIMEOUT_S + seconds) for rank in ranks]
        except subprocess.TimeoutExpired:
            advice = "check that a firewall does not stop this host's own address"
            return Finding(
                "bad", "sending", f"two ranks did not meet in {SEND_TIMEOUT_S:g} s", advice
            )
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(rank.returncode for rank in ranks):
        lines = "".join(error for _, error in outputs).strip().splitlines()
        why = lines[-1] if lines else "a rank was ended"
        return Finding("bad", "sending", why, "gloo must reach the loopback interface lo")
    return Finding("ok", "sending", outputs[0][0].strip())


def send_test(path: str, rank: int, seconds: float) -> str:
    """One rank: small messages there and back, then large ones one way, half the time each.

    Returns:
        What rank 0 found.
    """
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2,
        timeout=timedelta(seconds=SEND_TIMEOUT_S),
    )  # fmt: skip
    small, large = torch.zeros(1), torch.zeros(SEND_BYTES // 4)

    def there_and_back() -> None:
        # Rank 0 -> rank 1 -> rank 0.
        for turn in (0, 1):
            (dist.send if turn == rank else dist.recv)(small, 1 - rank)

    def one_way() -> None:
        # Rank 0 -> rank 1, who confirms.
        (dist.send if rank == 0 else dist.recv)(large, 1 - rank)
        there_and_back()

    trip_s, large_s = (
        _seconds_of(action, rank, seconds / 2) for action in (there_and_back, one_way)
    )
    dist.destroy_process_group()
    rate = SEND_BYTES / max(large_s - trip_s, 1e-9)
    return f"two ranks on this host: {trip_s / 2 * 1e6:.0f} us, {rate / 1e9:.2f} GB/s"


def _seconds_of(action: Callable[[], None], rank: int, seconds: float) -> float:
    """Mean time of an action that both ranks repeat until rank 0 has had enough."""
    go_on, count = torch.ones(1), 0
    action()  # Connects.
    start_s = time.perf_counter()
    while True:
        action()
        count += 1
        if count % 8 == 0:
            if rank == 0 and time.perf_counter() - start_s > seconds:
                go_on.zero_()
            dist.broadcast(go_on, 0)  # Rank 0 -> rank 1.
            if not go_on:
                return (time.perf_counter() - start_s) / count


def _has_backend(name: str) -> bool:
    return bool(dist.is_available() and dist.is_backend_available(name))


def _can_reach(index: int, other: int) -> bool:
    return bool(torch.cuda.can_device_access_peer(index, other))


def _install(packages: list[str]) -> str:
    return f"pip install {' '.join(repr(p) if '[' in p else p for p in packages)}"


if __name__ == "__main__":
    environment.end_with_parent()
    print(send_test(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
