"""The grammar of ``python -m gnnpipe``: commands, options, help."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from gnnpipe import __version__
from gnnpipe.errors import UserError
from gnnpipe.sources import is_override

PROGRAM = "python -m gnnpipe"
SHELLS = ("bash", "zsh", "fish")

EXAMPLES = f"""examples:
  {PROGRAM} train --print-config > config.yaml
  {PROGRAM} train config.yaml model.num_layers=64 run.dir=runs/deep
  torchrun --nproc_per_node 4 -m gnnpipe train config.yaml parallel.num_stages=4
  {PROGRAM} evaluate runs/deep --json
"""
TRAIN_EXAMPLES = f"""examples:
  {PROGRAM} train config.yaml
  {PROGRAM} train data.name=cora data.root=data/cora training.lr=1e-3
  {PROGRAM} train config.yaml preset=gnnpipe-paper --print-config
  python -m launch local --nproc 4 config.yaml parallel.num_stages=4
"""
REFERENCE_EXAMPLES = f"""example:
  {PROGRAM} reference config.yaml run.dir=runs/reference
"""
EVALUATE_EXAMPLES = f"""examples:
  {PROGRAM} evaluate runs/default
  {PROGRAM} evaluate runs/default --weights last --json
"""
PREDICT_EXAMPLES = f"""example:
  {PROGRAM} predict runs/default --out scores.npy
"""
REPORT_EXAMPLES = f"""examples:
  {PROGRAM} report runs/default
  {PROGRAM} report runs/* --out compared.html
"""
DOCTOR_EXAMPLES = f"""example:
  {PROGRAM} doctor
"""
KEYS_EXAMPLES = f"""example:
  {PROGRAM} keys > keys.md
"""
SCHEMA_EXAMPLES = f"""example:
  {PROGRAM} schema > gnnpipe.schema.json
  then, as the first line of a configuration for editors with a YAML language server:
  # yaml-language-server: $schema=gnnpipe.schema.json
"""
SHELL_EXAMPLES = """examples:
  source <(gnnpipe completion bash)
  gnnpipe completion fish > ~/.config/fish/completions/gnnpipe.fish
"""
PLAN_EXAMPLES = f"""examples:
  {PROGRAM} plan config.yaml --ranks 4
  {PROGRAM} plan config.yaml --ranks 16 --hosts 4 --memory-gb 24 --write new.yaml
  {PROGRAM} plan model.num_layers=64 --ranks 256 --shape ogbn-papers100M --bandwidth-gbps 100
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every user's mistake."""

    def error(self, message: str) -> NoReturn:
        """Raises the complaint instead of printing the usage and exiting."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def config_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Splits ``[CONFIG.yaml] [key=value ...]`` into the path and the overrides."""
    if arguments and not is_override(arguments[0]):
        return arguments[0], list(arguments[1:])
    return None, list(arguments)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses; options may stand between ``arguments``, the command's free positionals."""
    options, rest = parser.parse_known_args(argv)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown or (rest and not hasattr(options, "arguments")):
        words = " ".join(unknown or rest)
        asked = f"{parser.prog} {options.command} --help"
        raise UserError(f"unrecognized arguments: {words}; see `{asked}`")
    if rest:
        options.arguments = [*options.arguments, *rest]
    return options


def build_parser() -> Parser:
    """The parser of every command; ``command`` names the one that was given."""
    parser = Parser(
        prog=PROGRAM,
        description="Train deep graph neural networks on one large graph, in a pipeline.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gnnpipe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_run(commands, "train", "train, in as many processes as were started", TRAIN_EXAMPLES)
    _add_run(commands, "reference", "the plain full-graph loop, one process", REFERENCE_EXAMPLES)
    add_plan(_add_command(commands, "plan", "choose stages, ways and chunks", PLAN_EXAMPLES))
    evaluate = _add_inference(
        commands, "evaluate", "exact accuracy of saved weights", EVALUATE_EXAMPLES
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    predict = _add_inference(commands, "predict", "class scores of every node", PREDICT_EXAMPLES)
    predict.add_argument(
        "--out", metavar="FILE", help=".npy or .parquet file (default: predictions.npy in RUN_DIR)"
    )
    predict.add_argument("--node-ids", action="store_true", help="put ids into a .npy file too")
    report = _add_command(commands, "report", "one page that compares runs", REPORT_EXAMPLES)
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="directories of runs")
    report.add_argument("--out", default="report.html", metavar="FILE", help="(report.html)")
    doctor = _add_command(
        commands, "doctor", "what of this machine is fine, and what is not", DOCTOR_EXAMPLES
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    _add_texts(commands)
    for module, help_text in (
        ("launch", "start the processes of a run (python -m launch)"),
        ("partition", "cut a graph into chunks (python -m partition)"),
    ):
        commands.add_parser(module, help=help_text, add_help=False)
    return parser


def _add_texts(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Commands that print a text about the program itself."""
    _add_command(commands, "keys", "every key of the configuration, as Markdown", KEYS_EXAMPLES)
    _add_command(commands, "schema", "the configuration as a JSON schema", SCHEMA_EXAMPLES)
    completion = _add_command(
        commands, "completion", "a script that makes a shell complete commands", SHELL_EXAMPLES
    )
    completion.add_argument("shell", choices=SHELLS, help="which shell")


def _add_run(
    commands: "argparse._SubParsersAction[Parser]", name: str, help_text: str, examples: str
) -> None:
    command = _add_command(commands, name, help_text, examples)
    command.add_argument(
        "arguments",
        nargs="*",
        metavar="CONFIG.yaml | key.sub=value",
        help="a configuration file, then values that overrule it; without a file, the defaults",
    )
    command.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    command.add_argument("--quiet", action="store_true", help="show warnings and errors only")


def add_plan(command: "Parser") -> None:
    """The options of ``plan``."""
    command.add_argument("arguments", nargs="*", metavar="CONFIG.yaml | key.sub=value")
    numbers: tuple[tuple[str, type, object, str], ...] = (
        ("--ranks", int, None, "processes (default: those of the configuration)"),
        ("--hosts", int, 1, "hosts they are spread over (default: 1)"),
        ("--bandwidth-gbps", float, 10.0, "between hosts, per rank, Gbit/s (default: 10)"),
        ("--local-gbps", float, None, "inside a host (default: as between hosts)"),
        ("--latency-us", float, 200.0, "of a message, microseconds (default: 200)"),
        ("--memory-gb", float, None, "memory of a rank (default: no limit)"),
    )
    for name, kind, default, help_text in numbers:
        command.add_argument(name, type=kind, default=default, help=help_text)
    command.add_argument("--chunks", metavar="C,C,...", help="numbers of chunks to try")
    command.add_argument("--shape", metavar="NAME", help="a graph known by its counts only")
    command.add_argument("--profile", metavar="FILE", help="costs measured on another machine")
    command.add_argument("--save-profile", metavar="FILE", help="write the measured costs")
    command.add_argument("--write", metavar="FILE", help="write the configuration with the plan")
    command.add_argument("--picture", metavar="FILE.png", help="draw the timeline")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_inference(
    commands: "argparse._SubParsersAction[Parser]", name: str, help_text: str, examples: str
) -> Parser:
    command = _add_command(commands, name, help_text, examples)
    command.add_argument("run_dir", metavar="RUN_DIR", help="directory of a run")
    command.add_argument(
        "--data", metavar="NAME|PATH", help="another graph with the same features (default: own)"
    )
    command.add_argument(
        "--weights", choices=("best", "last"), default="best", help="which (default: best)"
    )
    return command


def _add_command(
    commands: "argparse._SubParsersAction[Parser]", name: str, help_text: str, examples: str
) -> Parser:
    return commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
