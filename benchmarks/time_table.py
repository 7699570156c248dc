"""The tables of ``time_to_accuracy.py``: seconds until a share of exact training's best."""

import math
import platform
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

GOAL = 0.99
HEAD = (
    "| method | reached | epochs | wall s | CPU s | wall / exact | CPU / exact | CPU without"
    " batches / exact | best val | test at best |\n| --- " + "| ---: " * 9 + "|"
)

Runs = dict[tuple[str, int], Any]
"""Curves by method and seed."""


def report(cells: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """All tables as Markdown."""
    return "\n".join(_lines(cells, notes)) + "\n"


def _lines(cells: Sequence[dict[str, Any]], notes: Sequence[str]) -> Iterator[str]:
    yield "# Time to accuracy on one process\n"
    yield "Made by `python benchmarks/time_to_accuracy.py` and its `--report`, which says what the"
    yield "methods are. One thread; training alone is timed, exact evaluations are not.\n"
    yield f"Seconds to {GOAL:.0%} of the best validation accuracy of `exact` with the same seed:"
    yield "medians over the seeds that reached it. Ratios are paired by seed: their median"
    yield "[smallest, largest]. *Without batches*: the time of making mini-batches is left out."
    yield "Accuracy: mean over seeds (standard error), at the best validation epoch.\n"
    yield f"torch {torch.__version__}, {platform.machine()}, {platform.system()}.\n"
    yield from (f"{note}\n" for note in notes)
    graphs = dict.fromkeys((cell["cell"][0], *cell["cell"][3:]) for cell in cells)
    for graph, layers, hidden, epochs in graphs:
        found: Runs = {
            (cell["cell"][1], cell["cell"][2]): cell["curve"]
            for cell in cells
            if (cell["cell"][0], *cell["cell"][3:]) == (graph, layers, hidden, epochs)
        }
        yield f"## {graph}, GCNII {layers} x {hidden}, {epochs} epochs\n"
        yield from _table(found)
        yield ""


def _table(found: Runs) -> Iterator[str]:
    goals = {
        seed: GOAL * max(point["val"] for point in curve)
        for (method, seed), curve in found.items()
        if method == "exact"
    }
    yield HEAD
    for method in dict.fromkeys(method for method, _ in found):
        seeds = [seed for name, seed in found if name == method and seed in goals]
        curves = {seed: found[method, seed] for seed in seeds}
        hits = {seed: _first(curve, goals[seed]) for seed, curve in curves.items()}
        reached = {seed: point for seed, point in hits.items() if point is not None}
        exact = {seed: _first(found["exact", seed], goals[seed]) for seed in reached}
        if not curves:
            continue
        columns = [method, f"{len(reached)}/{len(curves)}"]
        columns += [_median([p[key] for p in reached.values()]) for key in ("epoch", "wall_s")]
        columns.append(_median([point["cpu_s"] for point in reached.values()]))
        for key, less in (("wall_s", 0), ("cpu_s", 0), ("cpu_s", 1)):
            pairs = [(reached[seed], exact[seed]) for seed in reached]
            columns.append(
                _spread([(p[key] - less * p["batches_s"]) / e[key] for p, e in pairs if e])
            )
        best = [max(curve, key=lambda point: point["val"]) for curve in curves.values()]
        columns += [_mean([point[key] for point in best]) for key in ("val", "test")]
        yield "| " + " | ".join(columns) + " |"


def _first(curve: Sequence[dict[str, float]], goal: float) -> dict[str, float] | None:
    return next((point for point in curve if point["val"] >= goal), None)


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g}" if values else "-"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def _mean(values: Sequence[float]) -> str:
    percent = [100 * value for value in values]
    error = statistics.stdev(percent) / math.sqrt(len(percent)) if len(percent) > 1 else math.nan
    return f"{statistics.mean(percent):.2f} ({error:.2f})"
