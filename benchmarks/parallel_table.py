"""The tables of ``parallel.py``: every cell, true geometric means, predictions beside them."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gnnpipe.setting import Setting

LABELS = ("graph", "pipeline", "interleaved", "hybrid", "planner")
POINTS = 5
"""A measured bubble may be that many points above the simulator's."""
SLACK = 1.15
"""An epoch may take that many times its compute or transfer, beside the ideal bubble."""

Line = dict[str, Any]


def table(lines: Sequence[Line]) -> str:
    """Headline cells, then the other parts, then checks of the emulation."""
    own = {part: [line for line in lines if line["part"] == part] for part in _PARTS}
    texts = [make(own[part]) for part, make in _PARTS.items() if own[part]]
    return "\n\n".join(texts)


def _cells(lines: Sequence[Line]) -> str:
    names = ["cell", "Mbit/s", "K", *(f"{label} ms" for label in LABELS)]
    names += ["graph / pipeline", "graph / planner", "bytes", "planner's pick"]
    text = ["Emulated: slept durations, real messages over shaped links, time K times slower.", ""]
    text += _head(names)
    for line in lines:
        text += _row([line["cell"], f"{line['mbit']:.0f}", f"{line['dilation']:g}", *_times(line)])
    ratios = {
        "graph / pipeline": [_time(line, "graph", "pipeline") for line in lines],
        "graph / planner": [_time(line, "graph", "planner") for line in lines],
        "bytes, graph / pipeline, both fp32": [_bytes(line) for line in lines],
    }
    text.append("")
    for name, values in ratios.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        text.append(f"- {name}: geometric mean {_mean(values):.2f}, {spread}")
    alone = [
        min(line["graph"]["epoch_s"], line["one_rank_s"]) / line["planner"]["epoch_s"]
        for line in lines
    ]
    text.append(f"- planner against the better of graph and one rank: {min(alone):.2f} at worst")
    return "\n".join([*text, "", _errors(lines), "", _all_shares(lines), "", _overlap(lines)])


def _times(line: Line) -> Iterator[str]:
    for label in LABELS:
        yield f"{line[label]['epoch_s'] * 1e3:.1f}"
    yield f"{_time(line, 'graph', 'pipeline'):.2f}"
    yield f"{_time(line, 'graph', 'planner'):.2f}"
    yield f"{_bytes(line):.2f}"
    yield _setting(line["planner"])


def _errors(lines: Sequence[Line]) -> str:
    """Predicted epochs beside measured ones."""
    text = ["Predicted over measured epoch time, less 1:", "", *_head(["cell", *LABELS])]
    for line in lines:
        text += _row([line["cell"], *(f"{_error(line[x]):+.1%}" for x in LABELS)])
    every = [abs(_error(line[x])) for line in lines for x in LABELS]
    middle = statistics.median(every)
    return "\n".join([*text, "", f"- off by {middle:.1%} (median), {max(every):.1%} at worst"])


def _all_shares(lines: Sequence[Line]) -> str:
    text = ["Shares of all ranks' time, compute / wait / transfer, and the simulated bubble:"]
    text += ["", *_head(["cell", *LABELS])]
    for line in lines:
        text += _row([line["cell"], *(_shares(line[label]) for label in LABELS)])
    over = [1 - line[x]["compute"] - line[x]["predicted_bubble"] for line in lines for x in LABELS]
    waits = [1 - line["graph"]["compute"] for line in lines]
    less = [line["interleaved"]["compute"] - line["pipeline"]["compute"] for line in lines]
    return "\n".join(
        [
            *text,
            "",
            f"- measured minus simulated bubble: {min(over) * 100:+.1f} to {max(over) * 100:+.1f}"
            f" points (at most {POINTS})",
            f"- graph parallelism waits for {min(waits):.0%} to {max(waits):.0%} of its epoch",
            f"- interleaving takes {min(less) * 100:.1f} to {max(less) * 100:.1f} points off the"
            " pipeline's measured bubble",
        ]
    )


def _overlap(lines: Sequence[Line]) -> str:
    """Whether an epoch is little more than its compute, or transfer, and the ideal bubble."""
    text = [
        f"Epoch over the larger of compute and transfer of the busiest rank, beside {SLACK} and"
        " the ideal bubble ((S - 1) / v C of it):",
        "",
        *_head(["cell", "pipeline", "interleaved"]),
    ]
    met = []
    for line in lines:
        cells = []
        for label in ("pipeline", "interleaved"):
            found, setting = line[label], Setting(*line[label]["setting"])
            link_s = found["most_bytes"] * 8e-6 / line["mbit"]
            ratio = found["epoch_s"] / max(found["busiest_s"], link_s)
            ideal = (setting.num_stages - 1) / (setting.virtual_stages * setting.num_chunks)
            limit = SLACK + ideal
            met.append(ratio <= limit)
            cells.append(f"{ratio:.2f} ({limit:.2f})")
        text += _row([line["cell"], *cells])
    return "\n".join([*text, "", f"- within it: {sum(met)} of {len(met)}"])


def _every(lines: Sequence[Line]) -> str:
    """All settings of a few cells: how good the planner's pick is."""
    names = ["cell", "settings", "best ms", "best setting", "pick ms", "pick", "pick / best"]
    text = ["Every setting of 8 ranks:", "", *_head([*names, "error, median", "worst"])]
    for line in lines:
        tried = {name: found for name, found in line.items() if name[:1].isdigit()}
        best = min(tried.values(), key=lambda found: float(found["epoch_s"]))
        errors = [abs(_error(found)) for found in tried.values()]
        pick = line["planner"]
        cells = [line["cell"], str(len(tried)), _ms(best), _setting(best), _ms(pick)]
        cells += [_setting(pick), f"{pick['epoch_s'] / best['epoch_s']:.3f}"]
        text += _row([*cells, f"{statistics.median(errors):.1%}", f"{max(errors):.1%}"])
    return "\n".join(text)


def _curve(lines: Sequence[Line]) -> str:
    """One cell at several link speeds, or depths."""
    text = [f"Against {lines[0]['part']}, {lines[0]['cell']}:", ""]
    names = ["Mbit/s", "layers", "K", "graph ms", "pipeline ms", "planner ms"]
    text += _head([*names, "graph / pipeline", "planner's pick"])
    for line in sorted(lines, key=lambda each: (each["layers"], each["mbit"])):
        times = [_ms(line[x]) for x in ("graph", "pipeline", "planner")]
        ratio = f"{_time(line, 'graph', 'pipeline'):.2f}"
        cells = [f"{line['mbit']:.0f}", str(line["layers"]), f"{line['dilation']:g}", *times]
        text += _row([*cells, ratio, _setting(line["planner"])])
    return "\n".join(text)


def _dilations(lines: Sequence[Line]) -> str:
    """One cell, emulated at several speeds of time."""
    labels = LABELS[:-1]
    text = [f"The same at several dilations, {lines[0]['cell']}, epoch ms:", ""]
    text += _head(["K", *labels])
    for line in lines:
        text += _row([f"{line['dilation']:g}", *(_ms(line[label]) for label in labels)])
    return "\n".join(text)


def _checks(lines: Sequence[Line]) -> str:
    """Emulated beside real epochs, ranks no more than cores."""
    text = ["Emulated beside real epochs, 2 ranks, K = 1:", ""]
    text += _head(["cell", "setting", "emulated ms", "real ms", "emulated / real"])
    for line in lines:
        for label in ("graph", "pipeline"):
            slept, real = line[label], line[f"real {label}"]
            ratio = slept["epoch_s"] / real["epoch_s"]
            text += _row([line["cell"], label, _ms(slept), _ms(real), f"{ratio:.3f}"])
    return "\n".join(text)


_PARTS: dict[str, Callable[[Sequence[Line]], str]] = {
    "cells": _cells,
    "every": _every,
    "bandwidth": _curve,
    "depth": _curve,
    "dilation": _dilations,
    "check": _checks,
}


def _shares(found: Line) -> str:
    shares = "/".join(f"{found[name]:.2f}" for name in ("compute", "wait", "transfer"))
    return f"{shares} ({found['predicted_bubble']:.2f})"


def _error(found: Line) -> float:
    return float(found["predicted_s"] / found["epoch_s"] - 1)


def _ms(found: Line) -> str:
    return f"{found['epoch_s'] * 1e3:.1f}"


def _setting(found: Line) -> str:
    S, W, C, v, schedule = Setting(*found["setting"])
    return f"{S} x {W}, C {C}, v {v}" + (", split" if schedule == "split_backward" else "")


def _time(line: Line, one: str, other: str) -> float:
    return float(line[one]["epoch_s"] / line[other]["epoch_s"])


def _bytes(line: Line) -> float:
    return float(line["graph"]["sent_bytes"] / line["pipeline"]["sent_bytes"])


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _head(names: Sequence[str]) -> list[str]:
    return [*_row(names), *_row(["---", *["---:"] * (len(names) - 1)])]


def _row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]
