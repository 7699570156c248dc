"""The run directory: what lies in it, and whether a new run may use it.

It imports nothing heavy, so that a user's mistake is found before torch loads.
"""

import json
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from gnnpipe.errors import UserError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
TRACE_FILE = "trace.json"
TIMELINE_FILE = "timeline.npz"
TENSORBOARD_DIR = "tensorboard"
WEIGHTS_DIR = "weights"
CHECKPOINTS_DIR = "checkpoints"
PARTITION_DIR = "partition"
WHOLE_PARTITION_DIR = "partition-whole"  # of inductive runs: what evaluations read
# Anything else (a partition, a launcher's logs) does not make a directory somebody's run.
RUN_MARKS = (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, WEIGHTS_DIR)
# Where and how long a run computes, not what; the graph and its chunks are compared by hash.
FREE_FIELDS = (
    "preset",
    "device",
    "data.root",
    "partition.path",
    "parallel.",
    "training.epochs",
    "training.eval_every",
    "memory.",
    "kernels.",
    "checkpoint.",
    "run.",
)
PATH_FIELDS = ("data.name", "partition.file")
LARGE_BUBBLE = 0.25
"""Share of waiting from which another plan is worth a try."""
WAY_OUT = "choose another run.dir or delete it"


class Found(NamedTuple):
    """What a run directory held."""

    state: Literal["new", "unfinished", "finished"]
    """Unfinished: killed, or finished with fewer epochs than are asked for now."""
    summary: dict[str, Any] | None
    """Of a finished run, or of the one that is to go on."""


def prepare_run_directory(
    path: str | Path, config_text: str, *, is_resumable: bool = True
) -> Found:
    """Checks that a run may use a directory, or finds that the run is done, or that it can go on.

    Args:
        path: The run directory; not created yet, lest a mistake in the data leave it empty.
        config_text: The resolved configuration as YAML.
        is_resumable: Whether a run may go on where it stopped.

    Raises:
        UserError: The directory cannot be written, holds another run, or an unfinished one that
            must not go on.
    """
    directory = Path(path)
    _check_writable(directory)
    if not any((directory / name).exists() for name in RUN_MARKS):
        return Found("new", None)
    here = _flatten(yaml.safe_load(config_text))
    there = _flatten(_read(directory / CONFIG_FILE, yaml.safe_load))
    has_summary = (directory / SUMMARY_FILE).exists()
    summary = _read(directory / SUMMARY_FILE, json.loads) if has_summary else None
    if not there or (has_summary and not isinstance(summary, dict)):
        raise UserError(
            f"`run.dir` (={directory}) must hold a readable {CONFIG_FILE} and {SUMMARY_FILE}, one"
            f" is damaged; {WAY_OUT}"
        )
    if differing := differing_fields(there, here):
        raise UserError(
            f"`run.dir` (={directory}) holds a run of another configuration: "
            f"{', '.join(differing)}; {WAY_OUT}"
        )
    done, wanted = there.get("training.epochs"), here.get("training.epochs")
    if has_summary and done == wanted:
        return Found("finished", summary)
    if has_summary and isinstance(done, int) and isinstance(wanted, int) and wanted < done:
        raise UserError(
            f"`training.epochs` (={wanted}) must be at least the {done} that {directory} has"
            f" done; {WAY_OUT}"
        )
    if not is_resumable:
        raise UserError(
            f"`run.dir` (={directory}) holds an unfinished run; set checkpoint.resume=auto to go"
            f" on with it, or {WAY_OUT}"
        )
    return Found("unfinished", summary)


def differing_fields(
    there: Mapping[str, Any], here: Mapping[str, Any], *, free: Sequence[str] = FREE_FIELDS
) -> list[str]:
    """Fields that differ and change the numbers, with both values.

    Args:
        there: Dotted keys of the run that exists.
        here: Dotted keys of the run that is asked for.
        free: Beginnings of the keys that may differ.
    """
    keys = [*here, *(key for key in there if key not in here)]
    return [
        f"{key} ({_shown(there, key)} there, {_shown(here, key)} here)"
        for key in keys
        if not key.startswith(tuple(free)) and _shown(there, key) != _shown(here, key)
    ]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of nested mappings: ``{"run": {"dir": 1}}`` becomes ``{"run.dir": 1}``."""
    return _flatten(tree)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it: all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def summary_text(summary: Mapping[str, Any], directory: str | Path) -> str:
    """Says in a few lines how a run went, where its files are and what to try next.

    Args:
        summary: The content of ``summary.json``.
        directory: The run directory.
    """
    directory = Path(directory)
    lines = [
        f"best   {_best(summary)}",
        f"time   {_number(summary['wall_s'], '.1f')} s, "
        f"{_number(summary['median_epoch_s'], '.0f', scale=1e3)} ms/epoch (median)",
        f"size   {summary['num_parameters']:,} parameters on {summary['world_size']} rank(s), "
        f"{_megabytes(summary['peak_memory_bytes']['max'])} at most on one",
        f"sent   {_sent(summary['comm_bytes_per_epoch'])}",
        f"files  {directory}: {', '.join(_contents(directory))}",
    ]
    place = shlex.quote(str(directory))
    bubble, ranks = summary.get("median_bubble_fraction") or 0.0, summary["world_size"]
    if ranks > 1 and bubble > LARGE_BUBBLE:
        plan = f"python -m gnnpipe plan {place}/{CONFIG_FILE} --ranks {ranks}"
        lines.append(f"next   {plan}   (ranks wait {bubble:.0%} of the time)")
    if (directory / TENSORBOARD_DIR).exists():
        lines.append(f"next   tensorboard --logdir {place}")
    lines.append(f"next   python -m gnnpipe report {place}")
    lines.append(f"next   python -m gnnpipe evaluate {place}")
    return "\n".join(lines)


def _check_writable(directory: Path) -> None:
    """Checks that files can be made there; what is missing is left for the run to make."""
    try:
        nearest = directory.absolute()
        while not nearest.exists() and not nearest.is_symlink():
            nearest = nearest.parent
        # Asks the file system itself: permission bits say nothing about read-only mounts.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(
            f"`run.dir` (={directory}) must be a directory that can be written"
            f" ({error.strerror}); choose another run.dir"
        ) from None


def _flatten(tree: object, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings: ``{"run": {"dir": 1}}`` becomes ``{"run.dir": 1}``."""
    if not isinstance(tree, Mapping):
        return {prefix[:-1]: tree} if prefix else {}
    flat = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}."))
    return flat


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """The content of a file; None when it cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _shown(flat: Mapping[str, Any], key: str) -> str:
    """A value as JSON would show it: null is a value, a key that is missing is not."""
    if key not in flat:
        return "not set"
    value = flat[key]
    if key in PATH_FIELDS and isinstance(value, str) and os.sep in value:
        value = os.path.abspath(value)
    return json.dumps(value, default=str)


def _best(summary: Mapping[str, Any]) -> str:
    if summary["best_epoch"] is None:
        return "unknown: no epoch has a validation figure"
    test = _number(summary["test_at_best"], ".4f")
    return f"epoch {summary['best_epoch']}: val {summary['val_at_best']:.4f}, test {test}"


def _sent(comm_bytes: Mapping[str, int]) -> str:
    parts = [f"{kind} {_megabytes(count)}" for kind, count in comm_bytes.items() if count]
    return f"{', '.join(parts)} per epoch" if parts else "nothing: one rank"


def _contents(directory: Path) -> list[str]:
    names = (*RUN_MARKS, CHECKPOINTS_DIR, TENSORBOARD_DIR, TRACE_FILE)
    return [
        name + "/" * (directory / name).is_dir() for name in names if (directory / name).exists()
    ]


def _number(value: float | None, form: str, *, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
