"""A job of the process pool: one rank of a command, or a script, of a page of the docs."""

import contextlib
import importlib
import logging
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock


def run_command(module: str, argv: list[str], directory: str, output: str) -> None:
    """Runs ``main(argv)`` of a module in a directory, and leaves its status and output."""
    with _elsewhere(Path(directory), output) as status:
        status.append(importlib.import_module(module).main(argv))


def run_script(path: str, argv: list[str], directory: str, output: str) -> None:
    """Runs a Python file as a program."""
    with _elsewhere(Path(directory), output) as status:
        previous, sys.argv = sys.argv, [path, *argv]
        try:
            runpy.run_path(path, run_name="__main__")
        finally:
            sys.argv = previous
        status.append(0)


@contextlib.contextmanager
def _elsewhere(directory: Path, output: str) -> Iterator[list[int]]:
    """Another working directory, and files for what is printed; an error becomes status 1.

    Streams are redirected below Python, so that handlers made before keep working. TensorBoard's
    files are not written: the process that does so costs seconds, and has tests of its own.
    """
    # Workers make errors of warnings; this one is torch_geometric's, on import.
    warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated")
    before, status = os.getcwd(), list[int]()
    saved = [os.dup(1), os.dup(2)]
    prefix = f"{output}-{os.environ['RANK']}"
    os.chdir(directory)
    try:
        for number, name in ((1, "out"), (2, "err")):
            with open(f"{prefix}.{name}", "wb") as file:
                os.dup2(file.fileno(), number)
        try:
            with mock.patch("gnnpipe.telemetry._Follower"):
                yield status
        except BaseException as error:
            stops = isinstance(error, SystemExit) and isinstance(error.code, int)
            status.append(int(error.code) if stops else 1)  # type: ignore[attr-defined]
            if not stops:
                traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(before)
        logging.getLogger().handlers.clear()
    Path(f"{prefix}.status").write_text(str(status[0]))
