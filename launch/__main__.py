"""``python -m launch``: one process per rank, watched until the last has ended."""

import argparse
import signal
import sys
from collections.abc import Sequence

from gnnpipe import environment, preflight
from gnnpipe.arguments import Parser, config_arguments, parse
from gnnpipe.cli import guarded
from gnnpipe.config import Config, load_config
from gnnpipe.environment import RESTARTS_VARIABLE
from gnnpipe.errors import UserError
from launch.local import GRACE_S, STOP_GRACE_S, run_local

PROGRAM = "python -m launch"
EXAMPLES = f"""example:
  {PROGRAM} local --nproc 4 config.yaml parallel.num_stages=4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``python -m launch``.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        The exit status: 0, 2 for a user's mistake, 1 for a failed run, 128 + signal when stopped.
    """
    environment.end_with_parent(signal.SIGTERM)
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments))


def _run(argv: Sequence[str]) -> int:
    options = parse(_parser(), argv)
    return _run_ray(options) if options.command == "ray" else _run_local(options)


def _run_ray(options: argparse.Namespace) -> int:
    cpus = options.cpus_per_rank
    if options.max_restarts < -1 or (cpus is not None and cpus <= 0):
        raise UserError(
            f"`--max-restarts` (={options.max_restarts}) must be at least -1 (no limit) and "
            f"`--cpus-per-rank` (={options.cpus_per_rank}) above 0"
        )
    config = load_config(*config_arguments(options.arguments))
    fewest = options.min_ranks
    if fewest is not None and not 1 <= fewest <= config.world_size:
        raise UserError(
            f"`--min-ranks` (={fewest}) must be at least 1 and at most `parallel.num_stages` x "
            f"`parallel.num_ways` (={config.world_size})"
        )
    preflight.check_inputs(config)
    preflight.check_writable(config.run.dir, "run.dir")
    from launch.cluster import Job, run_on_cluster

    job = Job(options.address, options.max_restarts, cpus, fewest, options.quiet)
    return run_on_cluster(config, job)


def _run_local(options: argparse.Namespace) -> int:
    if min(options.max_restarts, options.stop_grace) < 0:
        raise UserError(
            f"`--max-restarts` (={options.max_restarts}) and `--stop-grace` "
            f"(={options.stop_grace}) must be at least 0"
        )
    if options.nproc < 1 or options.timeout_grace < 0:
        raise UserError(
            f"`--nproc` (={options.nproc}) must be at least 1 and `--timeout-grace` "
            f"(={options.timeout_grace}) at least 0"
        )
    config = load_config(*config_arguments(options.arguments))
    _check_ranks(config, options.nproc)
    preflight.check_inputs(config)
    preflight.check_writable(config.run.dir, "run.dir")
    threads = preflight.resolve_threads(config, options.nproc)
    # -P: a package of this name in the working directory is not ours.
    command = [sys.executable, "-P", "-m", "gnnpipe", "train", *options.arguments]
    command += ["--quiet"] if options.quiet else []
    for restart in range(options.max_restarts + 1):
        number = {RESTARTS_VARIABLE: str(restart)} if restart else {}
        status = run_local(
            command,
            options.nproc,
            variables={**preflight.thread_variables(threads), **number},
            grace_s=options.timeout_grace,
            stop_grace_s=options.stop_grace,
        )
        if status != 1 or restart == options.max_restarts:
            break
        sys.stderr.write(f"launch: restart {restart + 1} of {options.max_restarts}\n")
    return status


def _check_ranks(config: Config, nproc: int) -> None:
    needed = config.world_size
    if nproc != needed:
        raise UserError(
            f"`--nproc` (={nproc}) must equal `parallel.num_stages` x `parallel.num_ways` "
            f"(={needed}); give --nproc {needed} or change parallel.num_stages"
        )


def _parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog=PROGRAM,
        description="Start the processes of a training run.",
        epilog=EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    local = commands.add_parser(
        "local",
        help="processes on this host, without torchrun",
        description="Start one process per rank on this host and watch them.",
        epilog=EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    local.add_argument("--nproc", type=int, required=True, metavar="N", help="number of ranks")
    local.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    local.add_argument(
        "--timeout-grace",
        type=float,
        default=GRACE_S,
        metavar="S",
        help="seconds that the other ranks get to end when one has failed (default: %(default)s)",
    )
    local.add_argument(
        "--stop-grace",
        type=float,
        default=STOP_GRACE_S,
        metavar="S",
        help="seconds for a checkpoint after SIGTERM or Ctrl-C (default: %(default)s)",
    )
    local.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start failed ranks again, from the newest checkpoint (default: %(default)s)",
    )
    local.add_argument(
        "arguments",
        nargs="+",
        metavar="CONFIG.yaml | key.sub=value",
        help="a configuration file, then values that overrule it; without a file, the defaults",
    )
    _add_ray(commands)
    return parser


def _add_ray(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "ray",
        help="a Ray Train job, on a cluster or on this host",
        description="Run one rank per Ray Train worker; without a cluster, start Ray here.",
        epilog=f"example:\n  {PROGRAM} ray config.yaml parallel.num_stages=4\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    parser.add_argument("--address", metavar="A", help="of a cluster, such as ray://head:10001")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="restarts from the newest checkpoint after failures, -1: no limit (default: 3)",
    )
    parser.add_argument(
        "--cpus-per-rank", type=float, metavar="N", help="CPUs to reserve (default: its threads)"
    )
    parser.add_argument(
        "--min-ranks",
        type=int,
        metavar="N",
        help="go on with so few ranks while hosts are missing (default: wait for all)",
    )
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="CONFIG.yaml | key.sub=value",
        help="a configuration file, then values that overrule it",
    )


if __name__ == "__main__":
    sys.exit(main())
