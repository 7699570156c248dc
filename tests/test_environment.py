"""Memory that is free in a process, and what the operating system sees of it."""

import subprocess
import sys

import pytest
from drawn import woven
from one_process import losses, pipeline, settings

HOLES = """
from gnnpipe.environment import give_back_memory
def resident_mib():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024
blocks = [bytearray(b"1" * 100_000) for _ in range(2000)]  # Each below what glibc maps by itself.
held = blocks[::40]  # One at the end of every 4 MB keeps the heap from shrinking.
del blocks
before = resident_mib()
give_back_memory()
print(before - resident_mib(), len(held))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's way of keeping memory")
def test_free_memory_between_arrays_that_stay_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, timeout=60, check=True
    )
    freed_mib, _ = done.stdout.split()
    assert float(freed_mib) > 100  # of 186 that were freed


def test_a_run_gives_back_what_building_and_its_first_epoch_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    monkeypatch.setattr("gnnpipe.runs.give_back_memory", lambda: calls.append(len(calls)))
    run = pipeline(woven(), settings("gcn"))
    assert len(calls) == 1
    losses(run, 3)
    assert len(calls) == 2  # Every epoch would have to ask for it again.
