"""A command that starts processes of its own, none of which outlives it."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def run(
    command: Sequence[str],
    *,
    variables: Mapping[str, str],
    timeout_s: float,
    directory: Path | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Runs a command as the head of a session, all of which ends if it takes too long.

    Args:
        command: program and arguments.
        variables: environment variables beside ours.
        timeout_s: longest wait, seconds.
        directory: working directory; None is ours.
    """
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(command, process.returncode, out, error)
