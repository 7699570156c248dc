"""Runs the blocks of a page as a reader would, in a directory of its own, on warm processes.

Commands of this project run on ranks of the process pool instead of processes of their own: their
arguments are parsed and their ranks counted by the real launchers, only the start of the processes
(seconds each, and tested elsewhere) is replaced. Any other line is given to bash.
"""

import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from doc_blocks import Block, commands_of
from process_pool import Job, ProcessPool

import launch.__main__
import launch.cluster
from gnnpipe.config import to_yaml
from gnnpipe.environment import child_environment

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("examples", "benchmarks", "launch", "setup.cfg")
CONFIGURED = ("train", "reference", "plan")
TIMEOUT_S = 200.0


class Done(NamedTuple):
    """How a command ended, as rank 0 saw it."""

    status: int
    out: str
    err: str


class PageRunner:
    """A directory that looks like a checkout, and the processes that work in it.

    Args:
        pool: ranks.
        directory: an empty one.
        monkeypatch: puts the pool in the place of the launchers' processes.
    """

    def __init__(
        self, pool: ProcessPool, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._pool, self._directory = pool, directory
        self._scratch = directory / ".outputs"
        self._scratch.mkdir()
        self._numbers = itertools.count()
        for name in LINKED:
            (directory / name).symlink_to(ROOT / name)
        monkeypatch.chdir(directory)
        monkeypatch.setattr(launch.__main__, "run_local", self._local)
        monkeypatch.setattr(launch.cluster, "run_on_cluster", self._cluster)

    def run(self, block: Block) -> list[Done]:
        """Runs a block; one result for each of its commands."""
        if block.language == "python":
            path = self._scratch / f"block-{block.line}.py"
            path.write_text(block.text)
            return [self._script(1, str(path), [])]
        extra = shlex.split(block.directives.get("with", ""))
        return [self._line(line, extra) for line in commands_of(block.text)]

    def _line(self, line: str, extra: Sequence[str]) -> Done:
        words = shlex.split(line, comments=True)
        while words[0].startswith("OMP_NUM_THREADS="):  # The pool has one thread for each rank.
            words = words[1:]
        words, target = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)
        done = self._own(words, extra) or self._bash(line)
        if target is not None and done.status == 0:
            (self._directory / target).write_text(done.out)
        return done

    def _own(self, words: list[str], extra: Sequence[str]) -> Done | None:
        """Runs a command of this project; None if it is another's."""
        ranks = 1
        if words[0] == "torchrun":
            assert words[1] == "--nproc_per_node", words
            ranks, words = int(words[2]), ["python", *words[3:]]
        if words[0] == "gnnpipe":
            words = ["python", "-m", *words[words[1] in ("launch", "partition") :]]
        if words[0] != "python":
            return None
        if words[1] != "-m":
            return self._script(ranks, words[1], [*words[2:], *extra])
        match words[2:]:
            case ["launch", *argv]:
                return self._launch([*argv, *extra])
            case ["partition", *argv]:
                return self._command(1, "partition.__main__", argv)
            case ["gnnpipe", name, *argv]:
                more = extra if name in CONFIGURED else ()
                return self._command(ranks, "gnnpipe.cli", [name, *argv, *more])
        return None

    def _launch(self, argv: Sequence[str]) -> Done:
        self._launched: Done | None = None
        status = launch.__main__.main(argv)
        return self._launched or Done(status, "", "see the test's own output")

    def _local(self, command: Sequence[str], nproc: int, **_: Any) -> int:
        start = list(command).index("gnnpipe") + 1
        self._launched = self._command(nproc, "gnnpipe.cli", list(command[start:]))
        return self._launched.status

    def _cluster(self, config: Any, *_: Any) -> int:
        path = self._scratch / f"cluster-{next(self._numbers)}.yaml"
        path.write_text(to_yaml(config))
        argv = ["train", str(path)]
        self._launched = self._command(config.world_size, "gnnpipe.cli", argv)
        return self._launched.status

    def _command(self, ranks: int, module: str, argv: list[str]) -> Done:
        return self._on_pool(ranks, "doc_job:run_command", module=module, argv=argv)

    def _script(self, ranks: int, path: str, argv: list[str]) -> Done:
        return self._on_pool(ranks, "doc_job:run_script", path=path, argv=argv)

    def _on_pool(self, ranks: int, function: str, **arguments: Any) -> Done:
        output = self._scratch / f"command-{next(self._numbers)}"
        arguments |= {"directory": str(self._directory), "output": str(output)}
        self._pool.run([Job(function, ranks, arguments)], timeout_s=TIMEOUT_S)
        statuses = [int(Path(f"{output}-{rank}.status").read_text()) for rank in range(ranks)]
        texts = [Path(f"{output}-0.{name}").read_text() for name in ("out", "err")]
        return Done(max(statuses), *texts)

    def _bash(self, line: str) -> Done:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self._directory,
            env=child_environment({"PATH": path}),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)
