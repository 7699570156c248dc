"""The tables of a convergence study, from its finished cells."""

import math
import platform
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import t as student

Groups = Mapping[tuple[Any, ...], Mapping[tuple[int, str], Mapping[int, Any]]]
"""Finished cells by (graph, model, layers, hidden, epochs), (chunks, variant) and seed."""


def report(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy by variant with paired differences, then gradients and drift."""
    groups = grouped(found)
    lines = [HEAD.format(machine=platform.machine(), torch=torch.__version__)]
    lines += ["", *summary(groups)]
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


def grouped(found: Sequence[Mapping[str, Any]]) -> Groups:
    """The cells in the order of a report."""
    groups: dict[tuple[Any, ...], dict[tuple[int, str], dict[int, Any]]] = defaultdict(dict)
    for cell in found:
        *group, chunks, variant, seed = cell["cell"]
        groups[tuple(group)].setdefault((chunks, variant), {})[seed] = cell
    return groups


def summary(groups: Groups) -> list[str]:
    """Paired differences of cells with at least three seeds, and those of the default pooled."""
    lines = [
        "## Against exact training",
        "",
        "Test points at best validation, pipeline minus exact, paired by seed; the upper bound is "
        "the one-sided 95% bound of the mean by Student's t. Epochs: to 99% of exact's best "
        "validation, over exact's own, median of the seeds, and how many never got there. By "
        "chance: the same of exact training to itself, the worst difference of each seed to the "
        "one before, and the epochs of each seed to the best of each other.",
        "",
        "| graph, model | C | variant | n | exact % | difference | upper bound | worst seed "
        "| by chance | epochs | by chance |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    pooled = []
    for (graph, model, layers, hidden, epochs), variants in sorted(groups.items()):
        plain = variants.get((1, "exact"), {})
        for (chunks, variant), cells in sorted(variants.items()):
            seeds = sorted(set(cells) & set(plain))
            if variant == "exact" or len(seeds) < 3:
                continue
            pairs = [100 * (cells[s]["test"] - plain[s]["test"]) for s in seeds]
            pooled += pairs if variant == "default" else []
            exact = [100 * plain[s]["test"] for s in seeds]
            name = f"{graph}, {model} {layers} x {hidden}, {epochs} epochs"
            worst = f"{min(pairs):.1f} | {worst_by_chance(exact):.1f}"
            bound = f"{mean_of(pairs, digits=2)} | {upper_bound(pairs):.2f}"
            own = [(cells[s], plain[s]) for s in seeds]
            others = [(plain[a], plain[b]) for a, b in permutations(seeds, 2)]
            lines.append(
                f"| {name} | {chunks} | {variant} | {len(seeds)} | {mean_of(exact)} | {bound} "
                f"| {worst} | {epochs_ratio(own)} | {epochs_ratio(others)} |"
            )
    if pooled:
        mean = mean_of(pooled, digits=2)
        lines += ["", f"All pairs of the default ({len(pooled)}): {mean} points."]
    return lines


def upper_bound(pairs: Sequence[float]) -> float:
    """One-sided 95% confidence bound of the mean: ``mean + t_0.95,n-1 s / sqrt(n)``."""
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return statistics.mean(pairs) + float(student.ppf(0.95, len(pairs) - 1)) * error


def worst_by_chance(exact: Sequence[float]) -> float:
    """The least difference of one run of exact training to the run before, in a ring."""
    return min(after - before for before, after in pairwise([exact[-1], *exact]))


def epochs_ratio(pairs: Sequence[tuple[Any, Any]]) -> str:
    """Epochs to 99% of a run's best validation over its own, and how many never got there.

    Args:
        pairs: cells that are to get there, and the cells with the best.
    """
    ratios = []
    for cell, plain in pairs:
        epoch, own = (epochs_to(each["curve"], plain["val"]) for each in (cell, plain))
        assert own is not None
        ratios.append(math.inf if epoch is None else epoch / own)
    median, never = statistics.median(ratios), ratios.count(math.inf)
    missing = f", {never} of {len(ratios)} not" if never else ""
    return ("-" if math.isinf(median) else f"{median:.2f}") + missing


def draw(found: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """One picture for each graph and model: validation and gradient cosine by epoch."""
    directory.mkdir(parents=True, exist_ok=True)
    for group, variants in grouped(found).items():
        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (chunks, variant), cells in sorted(variants.items()):
            curves = [cell["curve"] for cell in cells.values()]
            epochs = [point[0] for point in curves[0]]
            means = [100 * statistics.mean(c[i][1] for c in curves) for i in range(len(epochs))]
            (line,) = left.plot(epochs, means, label=f"{variant}, C = {chunks}")
            biases = [
                {int(e): b["cosine"][-1] for e, b in c["bias"].items()} for c in cells.values()
            ]
            shared = sorted(set.intersection(*map(set, biases)))
            if shared:
                cosines = [statistics.mean(bias[epoch] for bias in biases) for epoch in shared]
                right.plot(shared, cosines, marker="o", color=line.get_color())
        left.set(xlabel="epoch", ylabel="validation, %", title="{} {} {} x {}".format(*group))
        right.set(xlabel="epoch", ylabel="cosine of the gradient with the exact one", xscale="log")
        left.legend(fontsize="x-small")
        graph, model, layers, hidden, _ = group
        figure.savefig(directory / f"{graph}_{model}_{layers}x{hidden}.png", dpi=120)


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


def mean_of(values: Sequence[float], *, digits: int = 1) -> str:
    """Mean and standard error."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} +- {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def epochs_to(curve: Sequence[Sequence[float]], best_val: float) -> int | None:
    """First evaluated epoch with 99% of a validation figure."""
    return next((int(epoch) for epoch, val, _ in curve if val >= 0.99 * best_val), None)
