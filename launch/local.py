"""One process per rank on this host: start them, watch them, leave none behind.

Why not torchrun: no port, no agent, and the first rank that failed is the one that is named.
"""

import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from gnnpipe.environment import RENDEZVOUS_VARIABLE, child_environment

GRACE_S = 5.0
STOP_GRACE_S = 30.0
AGAIN_S = 2.0
"""A second Ctrl-C counts as one after this time."""
KILL_AFTER_S = 3.0
POLL_S = 0.1
INTERRUPT_WAIT_S = 0.5
USER_MISTAKE = 2

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class End(NamedTuple):
    """How one rank ended."""

    rank: int
    status: int
    """Exit status, or minus the signal's number."""


class Graces(NamedTuple):
    """Seconds that ranks get."""

    end_s: float
    """To end when another has failed."""
    stop_s: float
    """To end when the launcher was told to stop: time for a checkpoint."""
    kill_s: float
    """Between SIGTERM and SIGKILL."""


class Step(NamedTuple):
    """A signal for the ranks that still run when its time has come."""

    time_s: float
    """On the clock of ``time.monotonic``."""
    signal: signal.Signals


def run_local(
    command: Sequence[str],
    nproc: int,
    *,
    variables: Mapping[str, str] | None = None,
    grace_s: float = GRACE_S,
    stop_grace_s: float | None = None,
    kill_after_s: float = KILL_AFTER_S,
) -> int:
    """Runs ``command`` once for each rank and waits for all; call it from the main thread.

    Each process gets ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE`` and
    ``GNNPIPE_RENDEZVOUS``, a path in a directory that lives as long as the call. It dies with
    this process if it calls :func:`gnnpipe.environment.end_with_parent`.

    Args:
        command: program and arguments.
        nproc: number of ranks.
        variables: more environment variables.
        grace_s: seconds that the others get to end by themselves when one has failed.
        stop_grace_s: seconds that all get to end by themselves when this process was told to
            stop; None is the same.
        kill_after_s: seconds between SIGTERM and SIGKILL.

    Returns:
        0 if every rank returned 0, after SIGTERM too; 128 + signal if this process was told to
        stop and not all did so in peace; 2 if a rank returned 2 (a user's mistake); else 1.
    """
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="gnnpipe-") as directory, _caught_signals() as caught:
        try:
            for rank in range(nproc):
                own = _rank_variables(rank, nproc, directory)
                environment = child_environment({**(variables or {}), **own})
                children.append(subprocess.Popen(command, env=environment))
            graces = Graces(
                grace_s, grace_s if stop_grace_s is None else stop_grace_s, kill_after_s
            )
            failures = _watch(children, caught, graces)
        finally:
            for child in children:
                child.kill()  # Does nothing to one that has been waited for.
                child.wait()
    return _conclude(failures, caught)


def _rank_variables(rank: int, nproc: int, directory: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        RENDEZVOUS_VARIABLE: str(Path(directory) / "rendezvous"),
    }


def _watch(
    children: Sequence["subprocess.Popen[bytes]"],
    caught: Sequence[signal.Signals],
    graces: Graces,
) -> list[End]:
    """Waits for all; ends the rest when one fails or a signal is caught. First failure first."""
    ends = _ends(children)
    running = set(range(len(children)))
    failures: list[End] = []
    steps: list[Step] | None = None
    asked_s, is_urgent = 0.0, False
    while running:
        try:
            end = ends.get(timeout=POLL_S)
        except queue.Empty:
            pass
        else:
            running.discard(end.rank)
            failures += [end] if end.status else []
        if steps is None and (failures or caught):
            steps = _escalation(caught, graces)
            asked_s = time.monotonic()
        if len(caught) > 1 and not is_urgent and time.monotonic() > asked_s + AGAIN_S:
            is_urgent, steps = True, _escalation(caught[-1:], graces._replace(stop_s=graces.end_s))
        while steps and steps[0].time_s <= time.monotonic():
            step = steps.pop(0)
            for rank in running:
                children[rank].send_signal(step.signal)
    return failures


def _escalation(caught: Sequence[signal.Signals], graces: Graces) -> list[Step]:
    """The signals to send from now on: the caught one, SIGTERM after the grace, SIGKILL."""
    now_s, grace_s = time.monotonic(), graces.stop_s if caught else graces.end_s
    steps = [
        Step(now_s + grace_s, signal.SIGTERM),
        Step(now_s + grace_s + graces.kill_s, signal.SIGKILL),
    ]
    if caught:
        # A terminal interrupts the ranks as well: once is enough.
        wait_s = INTERRUPT_WAIT_S if caught[0] == signal.SIGINT else 0.0
        steps.insert(0, Step(now_s + min(wait_s, grace_s), caught[0]))
    return steps


def _ends(children: Sequence["subprocess.Popen[bytes]"]) -> "queue.SimpleQueue[End]":
    """A queue that gets each rank's end when it happens, so that the first is known."""
    ends: queue.SimpleQueue[End] = queue.SimpleQueue()

    def wait(rank: int) -> None:
        ends.put(End(rank, children[rank].wait()))

    for rank in range(len(children)):
        threading.Thread(target=wait, args=(rank,), daemon=True).start()
    return ends


@contextmanager
def _caught_signals() -> Iterator[list[signal.Signals]]:
    """Notes signals in a list instead of dying of them, save those that are ignored."""
    caught: list[signal.Signals] = []

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(signal.Signals(number))

    previous = {
        each: signal.signal(each, note)
        for each in FORWARDED
        if signal.getsignal(each) != signal.SIG_IGN
    }
    try:
        yield caught
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _conclude(failures: Sequence[End], caught: Sequence[signal.Signals]) -> int:
    """Says on stderr what ended the run, and returns the exit status."""
    if caught:
        _say(f"stopped by {caught[0].name}")
        return 0 if caught[0] == signal.SIGTERM and not failures else 128 + caught[0]
    if not failures:
        return 0
    status = USER_MISTAKE if any(end.status == USER_MISTAKE for end in failures) else 1
    if End(0, USER_MISTAKE) not in failures:  # Rank 0 has printed its one `error:` line.
        rank, code = failures[0]
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"failed with status {code}"
        _say(f"rank {rank} {how}")
    return status


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # A real-time signal has no name.
        return f"signal {number}"


def _say(what: str) -> None:
    sys.stderr.write(f"launch: {what}\n")
