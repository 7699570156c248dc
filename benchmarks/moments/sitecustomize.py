"""Lets one rank of a disturbed run send itself a signal at a chosen moment.

Python imports a module of this name at its start; ``benchmarks/chaos.py`` puts this folder on the
path of a trial's processes. Why not a signal from outside: sending a message takes microseconds,
and nobody can hit them from there. The moment is a number of calls and returns, of Python and
of C functions, that happen while the run does what the trial wants to disturb::

    send   | Comm.send [pack] [isend] |  | Comm.send [pack] [isX          the fifth event of sends
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
"""JSON: ``rank``, ``places``, ``epoch``, ``events``, ``signal``, ``note``."""
BEGINS = "gnnpipe.runs"
"""Nothing is watched before this module loads, so starting takes as long as ever."""
EPOCH = "PipelineRun.train_epoch"


class Watcher:
    """Counts events of a process; called for every call and return.

    Args:
        plan: when to send which signal, and where to leave a note of it.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._epochs_left = int(plan["epoch"])
        self._events_left = int(plan["events"])
        self._inside: dict[int, FrameType] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Takes one event, as ``sys.setprofile`` describes it."""
        name = frame.f_code.co_qualname
        if event == "call" and name == EPOCH:
            self._epochs_left -= 1
        if self._epochs_left > 0:
            return
        thread = threading.get_ident()
        outer = self._inside.get(thread)
        if outer is None:
            if event == "call" and name in self._plan["places"]:
                self._inside[thread] = frame
            return
        self._events_left -= 1
        if self._events_left == 0:
            called = getattr(argument, "__name__", "") if event.startswith("c_") else ""
            self._strike(f"{outer.f_code.co_qualname}: {event} {name} {called}".strip())
        if event == "return" and frame is outer:
            del self._inside[thread]

    def _strike(self, where: str) -> None:
        note = Path(self._plan["note"])
        text = json.dumps({"pid": os.getpid(), "time_s": time.time(), "where": where})
        note.with_suffix(".tmp").write_text(text)
        note.with_suffix(".tmp").rename(note)
        os.kill(os.getpid(), self._plan["signal"])


class Beginning(importlib.abc.MetaPathFinder):
    """Starts to watch when the run's own code loads; finds no module itself."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """Looks at what is imported."""
        if name != BEGINS:
            return
        sys.meta_path.remove(self)
        is_mine = os.environ.get("RANK") == str(self._plan["rank"])
        if is_mine and not Path(self._plan["note"]).exists():  # Once: the restart is left alone.
            watcher = Watcher(self._plan)
            threading.setprofile(watcher)
            sys.setprofile(watcher)


if PLAN in os.environ:
    sys.meta_path.insert(0, Beginning(json.loads(os.environ[PLAN])))
