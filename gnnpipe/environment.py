"""What a process learns from its environment, and what it hands on to its children."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from gnnpipe.errors import UserError

PARENT_VARIABLE = "GNNPIPE_PARENT_PID"
RENDEZVOUS_VARIABLE = "GNNPIPE_RENDEZVOUS"
"""Path of the file through which processes started by ``launch local`` find one another."""
RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT"
"""How often a launcher has started these ranks again; torchrun's name."""

AGENT_VARIABLE = "TORCHELASTIC_RUN_ID"
"""What torchrun, which starts ranks from its main thread, sets for each of them."""

PR_SET_PDEATHSIG = 1  # From <linux/prctl.h>.


def rank() -> int:
    """This process's rank, 0 outside a launcher."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes that were started together, 1 outside a launcher."""
    return _number("WORLD_SIZE", 1)


def is_restart() -> bool:
    """Whether a launcher has started these ranks before."""
    return os.environ.get(RESTARTS_VARIABLE, "0") not in ("", "0")


def leave(status: int) -> NoReturn:
    """Ends a rank that failed, at once.

    gloo's threads still wait for its peers; those that come back into an interpreter that is
    shutting down would turn the status into SIGABRT.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child that must find our packages and not outlive us.

    Args:
        extra: variables to set besides.
    """
    # `launch` is a common name: ours must come before any other on the path.
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        PARENT_VARIABLE: str(os.getpid()),
    }
    return {**os.environ, **own, **extra}


def end_with_parent(death_signal: signal.Signals = signal.SIGKILL) -> None:
    """Asks the kernel to signal this process when the parent that started it is gone.

    Does nothing where no parent asked for it, save that ranks always end with their torchrun.
    Why not in the parent, before exec: code that runs between fork and exec can deadlock in a
    threaded parent.
    """
    # Taken out, so that it does not reach a grandchild with another parent.
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None and AGENT_VARIABLE in os.environ:
        parent = str(os.getppid())
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if str(os.getppid()) != parent:  # It went before we asked.
        sys.exit(1)


def give_back_memory() -> None:
    """Gives freed memory back to the operating system; glibc would keep it for what may come.

    What building and a first epoch leave free is scattered between arrays that stay, so what
    comes later grows beside it.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none.
        if trim is not None:
            trim(0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"`{name}` (={text}) must be a whole number; unset it or use a launcher")
    return int(text)
