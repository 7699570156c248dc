"""What the runs of ``benchmarks/chaos.py`` showed: read from a file, shown as tables."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_results(path: Path) -> dict[int, dict[str, Any]]:
    """Results of earlier starts of the program, by the run's number."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result["number"]: result for result in map(json.loads, lines)}


def report(results: Sequence[Mapping[str, Any]], head: str) -> str:
    """Everything that the runs showed, as Markdown.

    Args:
        results: of all runs.
        head: the command and its settings.
    """
    lines = [
        "# Killed runs\n",
        head,
        f"{os.cpu_count()} CPU cores, {platform.machine()}, shared with other work.\n",
        "Recovery: from the signal to the end of the first epoch after it, all processes started"
        " anew, or to its start where the next signal came within it. Sound: the run ended by"
        " itself with status 0, losses bit-equal to the undisturbed run, no process left, no kill"
        " repeated more epochs than a checkpoint interval.\n",
        "| launcher | runs | sound | kills | recovery s, median (least - most) | most repeated |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted({result["launcher"] for result in results}):
        own = [result for result in results if result["launcher"] == name]
        kills = [kill for result in own for kill in result["kills"] if kill]
        seconds = [kill["recovery_s"] for kill in kills] or [0.0]
        spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} - {max(seconds):.1f})"
        sound = sum(result["is_sound"] for result in own)
        repeated = max((kill["repeated_epochs"] for kill in kills), default=0)
        lines.append(
            f"| {name} | {len(own)} | {sound} | {len(kills)} | {spread} | {repeated} epochs |"
        )
    lines += [
        "\n| run | launcher | S x W | sound | rank | while | in | repeated | recovery s |",
        "| ---: | --- | --- | --- | ---: | --- | --- | ---: | ---: |",
    ]
    return "\n".join(lines + [row for result in results for row in _rows(result)]) + "\n"


def _rows(result: Mapping[str, Any]) -> list[str]:
    shape = f"{result['num_stages']} x {result['num_ways']}"
    sound = "yes" if result["is_sound"] else "NO"
    start = f"| {result['number']} | {result['launcher']} | {shape} | {sound} |"
    rows = []
    for strike, kill in zip(result["strikes"], result["kills"], strict=True):
        seen = (
            f"`{kill['where']}` | {kill['repeated_epochs']} | {kill['recovery_s']:.1f}"
            if kill
            else "never | |"
        )
        rows.append(f"{start} {strike['rank']} | {strike['moment']} | {seen} |")
    return rows
