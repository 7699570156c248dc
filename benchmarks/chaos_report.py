"""What the trials of ``benchmarks/chaos.py`` showed: read from a file, shown as a table."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_results(path: Path) -> dict[int, dict[str, Any]]:
    """Results of earlier starts of this program, by trial."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result["number"]: result for result in map(json.loads, lines)}


def report(results: Sequence[Mapping[str, Any]], head: str) -> str:
    """Everything that the trials showed, as Markdown.

    Args:
        results: of all trials.
        head: the command and its settings.
    """
    lines = [
        "# Killed runs\n",
        head,
        f"{os.cpu_count()} CPU cores, {platform.machine()}, shared with other work.\n",
        "Recovery: from the signal to the first epoch that the run had not done before.\n",
        "| launcher | trials | sound | recovery s, median (least - most) | most epochs repeated |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted({result["launcher"] for result in results}):
        own = [result for result in results if result["launcher"] == name]
        seconds = sorted(r["recovery_s"] for r in own if r["recovery_s"] is not None) or [0.0]
        spread = f"{seconds[len(seconds) // 2]:.1f} ({seconds[0]:.1f} - {seconds[-1]:.1f})"
        sound = sum(result["is_sound"] for result in own)
        repeated = max(result["repeated_epochs"] for result in own)
        lines.append(f"| {name} | {len(own)} | {sound} | {spread} | {repeated} |")
    lines += [
        "\n| trial | launcher | S x W | rank | killed in epoch or later | repeated | recovery s"
        " | killed in | sound |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for r in results:
        shape, seconds = f"{r['num_stages']} x {r['num_ways']}", r["recovery_s"] or float("nan")
        lines.append(
            f"| {r['number']} | {r['launcher']} | {shape} | {r['victim']} | {r['epoch']} |"
            f" {r['repeated_epochs']} | {seconds:.1f} | {r['moment']}: `{r['where']}` |"
            f" {'yes' if r['is_sound'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"
