"""The commands of ``python -m gnnpipe``: parse, check what is cheap to check, then run.

Nothing heavy is imported at the top. A mistake is told before torch loads, and the numbers of
threads are in the environment before numpy, numba and torch read them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from gnnpipe import environment, preflight
from gnnpipe.arguments import PROGRAM, build_parser, config_arguments, parse
from gnnpipe.completion import completion_script
from gnnpipe.config import Config, load_config, to_yaml
from gnnpipe.errors import PeerError, Stopped, UserError
from gnnpipe.keys import config_reference, schema_text
from gnnpipe.plan_request import plan_request

if TYPE_CHECKING:
    from gnnpipe.graph import Graph

PASSED_ON = ("launch", "partition")
INTERRUPT_WAIT_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        The exit status: 0, 2 for a user's mistake, 1 for a failed run, 130 when interrupted.
    """
    environment.end_with_parent()
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments))


def guarded(action: Callable[[], int]) -> int:
    """Runs ``action`` and turns its errors into messages on stderr and an exit status."""
    try:
        return action()
    except KeyboardInterrupt:
        tell("interrupted")
        return 128 + signal.SIGINT
    except Stopped as stopped:
        tell(f"{stopped}; the same command goes on from there")
        return 0 if stopped.signal_name == "SIGTERM" else 128 + signal.SIGINT
    except Exception as error:
        if _is_mistake(error):
            tell("error: " + " ".join(str(error).split("\n")))
            return 2
        prefix = f"[rank {os.environ.get('RANK', '0')}] "
        lines = "".join(traceback.format_exception(error)).splitlines()
        if isinstance(error, PeerError):  # That rank shows the traceback.
            lines = ["stopped: " + " ".join(str(error).split())]
        # One write, so that lines of several ranks do not mix.
        sys.stderr.write("".join(f"{prefix}{line}\n" for line in lines))
        return 1


def tell(line: str) -> None:
    """Writes a line that concerns every rank once."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(line + "\n")


def _run(argv: list[str]) -> int:
    if argv and argv[0] in PASSED_ON:
        return _run_module(argv[0], argv[1:])
    options = parse(build_parser(), argv)
    commands: Mapping[str, Callable[[argparse.Namespace], int | None]] = {
        "train": _train,
        "reference": _reference,
        "plan": _plan,
        "evaluate": _evaluate,
        "predict": _predict,
        "report": _report,
        "doctor": _doctor,
        "keys": lambda _: print(config_reference(), end=""),
        "schema": lambda _: print(schema_text(), end=""),
        "completion": lambda options: print(completion_script(options.shell), end=""),
    }
    return commands[options.command](options) or 0


def _train(options: argparse.Namespace) -> None:
    config = _load(options)
    if options.print_config:
        return _print_config(config)
    world_size = environment.world_size()
    if environment.is_restart():
        config = preflight.replanned(config, world_size)
    preflight.check_world_size(config, world_size)
    _prepare(config, world_size)
    from gnnpipe.trainer import train

    with preflight.user_directory(config.run.dir, "run.dir"):
        train(config, is_quiet=options.quiet)


def _reference(options: argparse.Namespace) -> None:
    config = _load(options)
    if options.print_config:
        return _print_config(config)
    preflight.check_single_process("reference", environment.world_size())
    _prepare(config, 1)
    from gnnpipe.trainer import run_reference

    with preflight.user_directory(config.run.dir, "run.dir"):
        run_reference(config, is_quiet=options.quiet)


def _plan(options: argparse.Namespace) -> None:
    config = load_config(*config_arguments(options.arguments))
    request = plan_request(options, config)
    preflight.check_single_process("plan", environment.world_size())
    preflight.check_inputs(config)
    os.environ.update(preflight.thread_variables(1))
    from gnnpipe.plan_command import run_plan

    print(run_plan(config, request))


def _evaluate(options: argparse.Namespace) -> None:
    _prepare_inference("evaluate", options.run_dir)
    from gnnpipe.inference import evaluate_run

    graph = _other_graph(options.data)
    result = evaluate_run(options.run_dir, weights=options.weights, graph=graph)
    print(json.dumps(result) if options.json else "\n".join(_lines(result)))


def _predict(options: argparse.Namespace) -> None:
    _prepare_inference("predict", options.run_dir)
    name, directory = "RUN_DIR", options.run_dir
    if options.out is not None:
        name, directory = "--out", str(Path(options.out).parent)
        if not options.out.endswith((".npy", ".parquet")) or Path(options.out).is_dir():
            raise UserError(
                f"`--out` (={options.out}) must be the name of a .npy or a .parquet file"
            )
    preflight.check_writable(directory, name)
    from gnnpipe.inference import predict_run

    with preflight.user_directory(directory, name):
        graph = _other_graph(options.data)
        ids = {"has_node_ids": options.node_ids, "graph": graph}
        print(predict_run(options.run_dir, weights=options.weights, out=options.out, **ids))


def _report(options: argparse.Namespace) -> None:
    directory = str(Path(options.out).parent)
    if Path(options.out).is_dir():
        raise UserError(f"`--out` (={options.out}) must be the name of a file, not a directory")
    preflight.check_writable(directory, "--out")
    from gnnpipe.report_page import write_report

    with preflight.user_directory(directory, "--out"):
        write_report(options.run_dirs, options.out)
    print(options.out)


def _doctor(options: argparse.Namespace) -> int:
    preflight.check_single_process("doctor", environment.world_size())
    from gnnpipe.doctor import examine, verdict

    findings = []
    for finding in examine():
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    last = verdict(findings)
    found = [finding._asdict() for finding in findings]
    print(json.dumps({"verdict": last, "findings": found}) if options.json else last)
    return int(any(finding.state == "bad" for finding in findings))


def _other_graph(name: str | None) -> "Graph | None":
    """The graph that ``--data`` names, if it does."""
    from gnnpipe.datasets import load_graph

    return None if name is None else load_graph(name)


def _load(options: argparse.Namespace) -> Config:
    if not options.arguments and not options.print_config:
        raise UserError(
            f"CONFIG.yaml is missing; give a file or key=value, see "
            f"`{PROGRAM} {options.command} --help`"
        )
    return load_config(*config_arguments(options.arguments))


def _print_config(config: Config) -> None:
    if environment.rank() == 0:
        sys.stdout.write(to_yaml(config))


def _prepare(config: Config, world_size: int) -> None:
    """Checks the paths and settles the threads: the last step before heavy imports."""
    preflight.check_inputs(config)
    if environment.rank() == 0:
        preflight.check_writable(config.run.dir, "run.dir")
    threads = preflight.resolve_threads(config, world_size)
    os.environ.update(preflight.thread_variables(threads))


def _prepare_inference(command: str, run_dir: str) -> None:
    preflight.check_single_process(command, environment.world_size())
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(f"RUN_DIR (={run_dir}) must hold a config.yaml; give a finished run")
    threads = preflight.resolve_threads(load_config(str(path)), 1)
    os.environ.update(preflight.thread_variables(threads))


def _run_module(module: str, argv: Sequence[str]) -> int:
    """Runs ``python -m module`` as a child and passes signals and its status on."""
    # -P: a package of this name in the working directory is not ours.
    command = [sys.executable, "-P", "-m", module, *argv]
    child = subprocess.Popen(command, env=environment.child_environment({}))

    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        status = child.wait()
    except KeyboardInterrupt:
        try:  # A terminal has interrupted the child too; `kill -INT` has not.
            status = child.wait(INTERRUPT_WAIT_S)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            status = child.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    return status if status >= 0 else 128 - status


def _is_mistake(error: Exception) -> bool:
    # Not imported: partition loads numpy. If nobody has, this is no PartitionError.
    errors = sys.modules.get("partition.errors")
    return isinstance(error, UserError) or (
        errors is not None and isinstance(error, errors.PartitionError)
    )


def _lines(result: Mapping[str, object], prefix: str = "") -> list[str]:
    """Nested figures as ``accuracy.test  0.8123`` lines."""
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{prefix}{key}.")
        else:
            text = f"{value:.4f}" if isinstance(value, float) else str(value)
            lines.append(f"{prefix + key:<24} {text}")
    return lines
