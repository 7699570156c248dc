"""mkdocs hook: pages made from the code and from files outside ``docs``, and drawn timelines."""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["COLUMNS"] = "99"  # Before argparse formats a help text.

from mkdocs.structure.files import File, Files

from gnnpipe.arguments import build_parser
from gnnpipe.keys import config_reference
from gnnpipe.schedule import fill_drain, simulate
from launch.__main__ import _parser as launch_parser
from partition.__main__ import _parser as partition_parser

ROOT = Path(__file__).resolve().parents[1]
COPIED = {
    "contributing/log.md": "dev/log.md",
    "contributing/gpu.md": "dev/gpu.md",
    "contributing/changelog.md": "CHANGELOG.md",
}
TIMELINE = re.compile(r"^<!-- timeline (\d+) stages (\d+) chunks (\d+) virtual -->$", re.MULTILINE)
TEST_COMMENT = re.compile(r"^<!-- test: .*?-->\n", re.MULTILINE | re.DOTALL)
RESULTS_LINK = re.compile(r"\]\((?:\.\./)*benchmarks/results/")
DOCS_LINK = re.compile(r"\]\((?:\.\./)*docs/")
SLOT, ROW = 34, 26  # pixels


def on_config(config: Any) -> Any:
    """Lists every page of results: a benchmark that writes one need not touch mkdocs.yml."""
    (results,) = (entry["Results"] for entry in config.nav if "Results" in entry)
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        results.append({path.stem.replace("_", " ").capitalize(): f"results/{path.name}"})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not in ``docs``."""
    pages = {name: (ROOT / path).read_text("utf-8") for name, path in COPIED.items()}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        pages[f"results/{path.name}"] = path.read_text("utf-8")
    pages["reference/commands.md"] = command_reference()
    pages["reference/configuration.md"] = "# Configuration\n\n" + config_reference()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Draws timelines, drops what only tests read, and points links into the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = RESULTS_LINK.sub(f"]({up}results/", DOCS_LINK.sub(f"]({up}", markdown))
    return TIMELINE.sub(timeline_svg, TEST_COMMENT.sub("", markdown))


def command_reference() -> str:
    """Every command's own help text."""
    parts = [
        "# Commands\n\nThe help texts of the programs themselves: `COMMAND --help` prints the"
        " same.\nExit statuses are in [Architecture](../architecture.md#5-commands-and-exit-"
        "statuses)."
    ]
    for parser in all_parsers():
        parts.append(f"## {parser.prog}\n\n```text\n{parser.format_help().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def all_parsers() -> Iterator[argparse.ArgumentParser]:
    """The parsers of all programs and of their commands."""
    for parser in (build_parser(), launch_parser(), partition_parser()):
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                # Commands that another program does have no help of their own.
                yield from (sub for sub in action.choices.values() if sub.add_help)


def timeline_svg(match: "re.Match[str]") -> str:
    """The simulated epoch of a setting, every action as long as every other."""
    num_stages, num_chunks, virtual = map(int, match.groups())
    timeline = simulate(fill_drain(num_stages, num_chunks, virtual), lambda action: 1.0)
    width, height = 70 + SLOT * round(timeline.makespan_s), ROW * num_stages + 6
    shapes = []
    for rank, spans in enumerate(timeline.ranks):
        top = ROW * rank + 3
        shapes.append(f'<text x="0" y="{top + 16}" fill="currentColor">rank {rank}</text>')
        for action, start_s, end_s in spans:
            left, length = 60 + SLOT * start_s, SLOT * (end_s - start_s) - 2
            color = "#3b6fb6" if action.kind == "F" else "#b6653b"
            shapes.append(
                f'<rect x="{left:g}" y="{top}" width="{length:g}" height="{ROW - 4}" rx="3"'
                f' fill="{color}"/><text x="{left + length / 2:g}" y="{top + 16}" fill="#fff"'
                f' text-anchor="middle">{action!r}</text>'
            )
    label = f"{num_stages} ranks, {num_chunks} chunks, {virtual} virtual stages"
    return (
        f'<svg role="img" aria-label="Timeline: {label}" viewBox="0 0 {width} {height}"'
        f' style="max-width: {width}px; width: 100%" font-family="monospace" font-size="12">'
        f"{''.join(shapes)}</svg>"
    )
