"""Lets ranks of a disturbed run send themselves signals at chosen moments, one in each attempt.

Python imports a module of this name at its start; ``benchmarks/chaos.py`` puts this folder on the
path of a run's processes. Why not a signal from outside: sending a message takes microseconds,
and nobody can hit them from there. The moment is a number of calls and returns, of Python and
of C functions, that happen while the run does what is to be disturbed::

    send   | Comm.send [pack] [isend] |  | Comm.send [pack] [isX          the fifth event of sends

Every start of all ranks is an attempt. In attempt k the k-th strike of the plan happens, and rank
0 notes when its first epoch begins and when it is done.
"""

import importlib.abc
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

PLAN = "GNNPIPE_CHAOS_PLAN"
"""JSON: the paths ``notes`` and ``metrics``; ``strikes``, each with ``rank``, ``places``
(functions), ``epoch`` (of the attempt, from 1), ``events`` (inside of those functions, from that
epoch on) and ``signal``."""
BEGINS = "gnnpipe.runs"
"""Nothing is watched before this module loads, so starting takes as long as ever."""
EPOCH = "PipelineRun.train_epoch"


class Watcher:
    """Counts events of a process; called for every call and return.

    Args:
        plan: what shall happen, see :data:`PLAN`.
        rank: this process.
    """

    def __init__(self, plan: dict[str, Any], rank: int) -> None:
        self._notes, self._metrics = Path(plan["notes"]), Path(plan["metrics"])
        self._attempt = len(list(self._notes.glob("strike-*.json")))
        strikes = plan["strikes"][self._attempt :]
        self._strike = strikes[0] if strikes and strikes[0]["rank"] == rank else None
        self._is_to_begin = rank == 0
        self._num_epochs = self._num_events = 0
        self._inside: dict[int, FrameType] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Takes one event, as ``sys.setprofile`` describes it."""
        name = frame.f_code.co_qualname
        if name == EPOCH:
            self._num_epochs += event == "call"
            if self._is_to_begin and self._num_epochs == 1 and event == "call":
                self._note("resume", {"epoch": frame.f_locals["epoch"]})
            if self._is_to_begin and event == "return" and argument is not None:  # No exception.
                self._is_to_begin = False
                self._note("begin", {"epoch": frame.f_locals["epoch"]})
        if self._strike is None and not self._is_to_begin:
            sys.setprofile(None)  # Nothing more to see in this attempt: go on at full speed.
            threading.setprofile(None)
        if self._strike is None or self._num_epochs < self._strike["epoch"]:
            return
        thread = threading.get_ident()
        outer = self._inside.get(thread)
        if outer is None:
            if event == "call" and name in self._strike["places"]:
                self._inside[thread] = frame
            return
        self._num_events += 1
        if self._num_events == self._strike["events"]:
            called = getattr(argument, "__name__", "") if event.startswith("c_") else ""
            self._end(f"{outer.f_code.co_qualname}: {event} {name} {called}".strip())
        if event == "return" and frame is outer:
            del self._inside[thread]

    def _end(self, where: str) -> None:
        lines = self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0
        assert self._strike is not None
        self._note("strike", {"where": where, "epochs": lines})
        os.kill(os.getpid(), self._strike["signal"])

    def _note(self, what: str, facts: dict[str, Any]) -> None:
        """Leaves a file that is whole as soon as it is there."""
        path = self._notes / f"{what}-{self._attempt}.json"
        path.with_suffix(".tmp").write_text(json.dumps({"time_s": time.time(), **facts}))
        path.with_suffix(".tmp").rename(path)


class Beginning(importlib.abc.MetaPathFinder):
    """Starts to watch when the run's own code loads; finds no module itself."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """Looks at what is imported."""
        if name == BEGINS and "RANK" in os.environ:
            sys.meta_path.remove(self)
            watcher = Watcher(self._plan, int(os.environ["RANK"]))
            threading.setprofile(watcher)
            sys.setprofile(watcher)


if PLAN in os.environ:
    sys.meta_path.insert(0, Beginning(json.loads(os.environ[PLAN])))
