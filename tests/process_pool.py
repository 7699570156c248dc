"""A pool of processes for tests: starting one costs seconds, so one pool serves a whole session.

Jobs travel as JSON files and every worker reads all of them, in order. A job of n ranks runs on n
neighbouring workers, which meet through a rendezvous of its own, as ranks that a launcher has
just started do; other workers go on with the next job meanwhile.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from gnnpipe.environment import child_environment
from gnnpipe.preflight import thread_variables

WORKER = Path(__file__).with_name("pool_worker.py")
POLL_S = 0.02
PEER_ERROR = "gnnpipe.errors.PeerError"


class Job(NamedTuple):
    """A function for some ranks to call together."""

    function: str
    """``module:name`` of a function in the folder of the tests."""
    num_ranks: int
    arguments: Mapping[str, Any]
    """What JSON can hold; results travel through files that these name."""


class ProcessPool:
    """Workers that wait for jobs; a context manager that leaves no process behind.

    A job that raises ends its worker, and so the pool: later calls of :meth:`run` say so.

    Args:
        num_workers: processes, and so the most ranks of a job.
        directory: an empty directory for jobs, outcomes and output.
    """

    def __init__(self, num_workers: int, directory: Path) -> None:
        self._directory = directory
        self._load = [0] * num_workers
        self._num_jobs = 0
        self._broken: str | None = None
        environment = child_environment(thread_variables(1))
        with ExitStack() as stack:
            self._workers = []
            for index in range(num_workers):
                output = stack.enter_context((directory / f"output-{index}").open("w"))
                command = [sys.executable, "-W", "error", str(WORKER), str(directory), str(index)]
                worker = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
                self._workers.append(worker)
                stack.callback(_end, worker)
            self._stack = stack.pop_all()

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, jobs: Sequence[Job], *, timeout_s: float = 200.0) -> None:
        """Runs jobs to their end, several at a time.

        Args:
            jobs: none with more ranks than the pool has workers.
            timeout_s: for all together.

        Raises:
            RuntimeError: one failed or did not end in time; the pool is of no use then.
        """
        deadline_s = time.monotonic() + timeout_s
        waiting = {self._directory / name for job in jobs for name in self._post(job)}
        while waiting:
            self._raise_if_broken()
            waiting = {path for path in waiting if not path.exists()}
            if time.monotonic() > deadline_s:
                self._break(f"jobs did not end in {timeout_s:g} s: {sorted(map(str, waiting))}")
            time.sleep(POLL_S)

    def _post(self, job: Job) -> list[str]:
        """Gives a job to the least busy workers; returns the names of their outcomes."""
        blocks = range(0, len(self._load) - job.num_ranks + 1, job.num_ranks)
        first = min(blocks, key=lambda b: max(self._load[b : b + job.num_ranks]))
        workers = range(first, first + job.num_ranks)
        for worker in workers:
            self._load[worker] += 1
        path = self._directory / f"job-{self._num_jobs}"
        self._num_jobs += 1
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({"first": first, **job._asdict()}))
        draft.rename(path)
        return [f"{path.name}.done-{worker}" for worker in workers]

    def _raise_if_broken(self) -> None:
        if self._broken is None and all(worker.poll() is None for worker in self._workers):
            return
        self._break("a worker of the pool ended early")

    def _break(self, reason: str) -> None:
        if self._broken is None:
            time.sleep(1.0)  # The rank that failed first may still be writing.
            self._stack.close()
            texts = [path.read_text() for path in sorted(self._directory.glob("output-*"))]
            # Ranks that only stopped with another one say nothing new.
            texts.sort(key=lambda text: PEER_ERROR in text)
            self._broken = "\n".join([reason, *(text for text in texts if text)])
        raise RuntimeError(self._broken)


def _end(worker: "subprocess.Popen[bytes]") -> None:
    worker.kill()
    worker.wait()


def rank_variables(rank: int, num_ranks: int, rendezvous: Path) -> dict[str, str]:
    """What ``launch local`` puts into the environment of a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "GNNPIPE_RENDEZVOUS": os.fspath(rendezvous),
    }
