"""The tables of a convergence study, from its finished cells."""

import math
import platform
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def report(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy by variant with paired differences, then gradients and drift."""
    groups: dict[tuple[Any, ...], dict[tuple[int, str], dict[int, Any]]] = defaultdict(dict)
    for cell in found:
        *group, chunks, variant, seed = cell["cell"]
        groups[tuple(group)].setdefault((chunks, variant), {})[seed] = cell
    lines = [HEAD.format(machine=platform.machine(), torch=torch.__version__)]
    for (graph, model, layers, hidden, epochs), variants in sorted(groups.items()):
        lines.append(f"\n## {graph}, {model} {layers} x {hidden}, {epochs} epochs\n")
        lines.append(
            "| C | variant | seeds | test % at best val | minus exact, paired | epochs "
            "to 99% of exact's best val | gradient cosine | norm ratio | drift | CPU s |"
        )
        lines.append("| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        plain = variants.get((1, "exact"), {})
        for (chunks, variant), cells_of in sorted(variants.items()):
            lines.append(row(chunks, variant, cells_of, plain))
    return "\n".join(lines) + "\n"


HEAD = """# Convergence

Written by `benchmarks/convergence.py --report`; 2 shared CPU cores ({machine}), one thread for
each run, torch {torch}, METIS seed 0. Mean and standard error over the seeds listed. Cosine and
norm ratio: gradient of all weights against the exact one at the same weights and masks; drift:
`|fresh - historical| / |fresh|` of the middle layer; both are means over the compared epochs, of
which the first of drift is left out. Times are of training alone and of a busy machine.

Made by `benchmarks/convergence.py --graphs G --models M --layers L --hidden H --epochs E --chunks
C --seeds S --variants V`, with what the headings and rows say; the variants are spelled out in
`benchmarks/convergence_cases.py`. A dash: not reached."""


def row(chunks: int, variant: str, found: Mapping[int, Any], plain: Mapping[int, Any]) -> str:
    """One line of the table."""
    seeds = sorted(found)
    test = mean_of([100 * found[seed]["test"] for seed in seeds])
    pairs = [100 * (found[s]["test"] - plain[s]["test"]) for s in seeds if s in plain]
    difference = mean_of(pairs) if pairs and variant != "exact" else ""
    reached = [epochs_to(found[s]["curve"], plain[s]["val"]) for s in seeds if s in plain]
    epochs = " ".join("-" if epoch is None else str(epoch) for epoch in reached)
    bias = [b for seed in seeds for b in found[seed]["bias"].values()]
    cosine = f"{statistics.mean(b['cosine'][-1] for b in bias):.3f}" if bias else ""
    ratio = f"{statistics.mean(b['ratio'][-1] for b in bias):.3f}" if bias else ""
    drifts = [d for seed in seeds for e, d in found[seed]["drift"].items() if int(e) > 1 and d]
    is_stale = variant != "exact" and drifts
    drift = f"{statistics.mean(d[len(d) // 2] for d in drifts):.2f}" if is_stale else ""
    cpu_s = statistics.mean(found[seed].get("cpu_s", found[seed].get("wall_s")) for seed in seeds)
    listed = " ".join(map(str, seeds))
    cells_ = [chunks, variant, listed, test, difference, epochs, cosine, ratio, drift]
    return "| " + " | ".join(map(str, [*cells_, f"{cpu_s:.0f}"])) + " |"


def mean_of(values: Sequence[float]) -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.1f}" + (f" +- {error:.1f}" if len(values) > 1 else "")


def epochs_to(curve: Sequence[Sequence[float]], best_val: float) -> int | None:
    """First evaluated epoch with 99% of a validation figure."""
    return next((int(epoch) for epoch, val, _ in curve if val >= 0.99 * best_val), None)
