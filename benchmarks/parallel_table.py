"""The tables of ``parallel.py``: every cell, true geometric means, predictions beside them."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

LABELS = ("graph", "pipeline", "interleaved", "hybrid", "planner")
POINTS = 5
"""A measured bubble may be that many points above the simulator's."""


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Headline cells, then the points of the curves, then checks of the emulation."""
    parts = [_cells([line for line in lines if line["part"] == "cells"])]
    parts += [_curve(lines, part) for part in ("bandwidth", "depth")]
    parts.append(_checks([line for line in lines if line["part"] == "check"]))
    return "\n\n".join(part for part in parts if part)


def _cells(lines: Sequence[dict[str, Any]]) -> str:
    if not lines:
        return ""
    names = ["cell", "Mbit/s", *(f"{label} ms" for label in LABELS)]
    names += ["graph / pipeline", "graph / planner", "bytes", "planner's pick", "largest error"]
    text = ["Emulated: slept durations, real messages over shaped links.", ""]
    text += [*_row(names), *_row(["---", *["---:"] * (len(names) - 1)])]
    for line in lines:
        text += _row([line["cell"], f"{line['mbit']:.0f}", *_figures(line)])
    ratios = {
        "graph / pipeline": [_time(line, "graph", "pipeline") for line in lines],
        "graph / planner": [_time(line, "graph", "planner") for line in lines],
        "bytes, graph / pipeline": [_bytes(line) for line in lines],
    }
    text.append("")
    text += [
        f"{name}: geometric mean {_mean(values):.2f}, {min(values):.2f} to {max(values):.2f}"
        for name, values in ratios.items()
    ]
    alone = [
        min(line["graph"]["epoch_s"], line["one_rank_s"]) / line["planner"]["epoch_s"]
        for line in lines
    ]
    text.append(f"planner against the better of graph and one rank: {min(alone):.2f} at worst")
    text += [
        "",
        "Shares of all ranks' time, compute / wait / transfer, and the simulated bubble:",
        "",
    ]
    text += [*_row(["cell", *LABELS]), *_row(["---"] * (len(LABELS) + 1))]
    for line in lines:
        text += _row([line["cell"], *(_shares(line[label]) for label in LABELS)])
    over = [
        1 - line[x]["compute"] - line[x]["predicted_bubble"] for line in lines for x in LABELS[1:]
    ]
    text.append("")
    text.append(
        f"measured minus simulated bubble: {max(over) * 100:.1f} points at most ({POINTS})"
    )
    return "\n".join(text)


def _figures(line: dict[str, Any]) -> Iterator[str]:
    for label in LABELS:
        yield f"{line[label]['epoch_s'] * 1e3:.1f}"
    yield f"{_time(line, 'graph', 'pipeline'):.2f}"
    yield f"{_time(line, 'graph', 'planner'):.2f}"
    yield f"{_bytes(line):.2f}"
    S, W, C, v = line["planner"]["setting"]
    yield f"{S} x {W}, C {C}, v {v}"
    yield f"{max(abs(line[x]['predicted_s'] / line[x]['epoch_s'] - 1) for x in LABELS):.1%}"


def _curve(lines: Sequence[dict[str, Any]], part: str) -> str:
    """One cell at several link speeds, or depths."""
    points = [line for line in lines if line["part"] == part]
    if not points:
        return ""
    text = [f"Against {part}, {points[0]['cell']}:", ""]
    names = ["Mbit/s", "layers", "graph ms", "pipeline ms", "planner ms"]
    text += [*_row([*names, "graph / pipeline"]), *_row(["---:"] * (len(names) + 1))]
    for line in sorted(points, key=lambda each: (each["layers"], each["mbit"])):
        times = [f"{line[x]['epoch_s'] * 1e3:.1f}" for x in ("graph", "pipeline", "planner")]
        ratio = f"{_time(line, 'graph', 'pipeline'):.2f}"
        text += _row([f"{line['mbit']:.0f}", str(line["layers"]), *times, ratio])
    return "\n".join(text)


def _checks(lines: Sequence[dict[str, Any]]) -> str:
    """Emulated beside real epochs, ranks no more than cores."""
    text = []
    for line in lines:
        for label in ("graph", "pipeline"):
            slept, real = line[label]["epoch_s"], line[f"real {label}"]["epoch_s"]
            text.append(
                f"check, {line['cell']}, {line['ranks']} ranks, {label}: emulated"
                f" {slept * 1e3:.1f} ms, real {real * 1e3:.1f} ms, {slept / real - 1:+.1%}"
            )
    return "\n".join(text)


def _shares(found: dict[str, Any]) -> str:
    shares = "/".join(f"{found[name]:.2f}" for name in ("compute", "wait", "transfer"))
    return f"{shares} ({found['predicted_bubble']:.2f})"


def _time(line: dict[str, Any], one: str, other: str) -> float:
    return float(line[one]["epoch_s"] / line[other]["epoch_s"])


def _bytes(line: dict[str, Any]) -> float:
    return float(line["graph"]["sent_bytes"] / line["pipeline"]["sent_bytes"])


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]
