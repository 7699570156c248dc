"""The documentation is true: its blocks run, its site builds, its links lead somewhere."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from doc_blocks import Block, blocks_of, commands_outside_blocks
from doc_runner import PageRunner
from process_pool import ProcessPool

from gnnpipe.arguments import parse
from gnnpipe.environment import PARENT_VARIABLE, child_environment
from gnnpipe.keys import all_keys
from gnnpipe.preflight import thread_variables

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
# Every block that is not run, by page: few, and each with its reason in the page.
SKIPPED = {
    "README.md": 1,  # make: installs
    "docs/howto/many_gpus.md": 1,  # a second host
    "docs/howto/own_model.md": 1,  # an account at Weights & Biases
    "docs/howto/ray.md": 1,  # a cluster's dashboard
    "docs/howto/slurm.md": 1,  # Slurm
    "docs/quickstart.md": 1,  # make: installs
    "docs/troubleshooting.md": 1,  # doctor: its status is the machine's
}
NUM_COMPLAINTS = 54
TIMEOUT_S = 280  # A busy host needs ten times what a quiet one does.
# What a browser would fetch by itself; links that a reader may follow are another matter.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^>]*>"""
)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.is_run]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if runnable(page)],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_blocks_of_a_page_run(
    page: Path, pool: ProcessPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = PageRunner(pool, tmp_path, monkeypatch)
    printed = ""
    for block in blocks_of(page):
        if "file" in block.directives:
            path = tmp_path / block.directives["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif "prints" in block.directives:
            missing = [line for line in block.text.splitlines() if line not in printed]
            assert not missing, f"{block}: not printed: {missing}\n{printed}"
        elif block.is_run and "skip because" not in block.directives:
            ended = runner.run(block)
            wanted = [0] * (len(ended) - 1) + [int(block.directives.get("status", 0))]
            printed = "\n".join(done.out + done.err for done in ended)
            assert [done.status for done in ended] == wanted, f"{block}\n{printed}"


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    found = {}
    for name, page in zip(NAMES, PAGES, strict=True):
        skips = [b for b in runnable(page) if "skip because" in b.directives]
        assert all(len(b.directives["skip because"]) > 10 for b in skips), name
        if skips:
            found[name] = len(skips)
    assert found == SKIPPED


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_stand_in_fenced_blocks(page: Path) -> None:
    assert commands_outside_blocks(page) == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as mkdocs builds it; a warning fails the build."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env=child_environment({"NO_MKDOCS_2_WARNING": "1"}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_site_builds_without_a_warning_and_has_every_page(site: Path) -> None:
    sources = [path.relative_to(ROOT / "docs") for path in PAGES[1:]]
    sources += [Path("results") / path.name for path in (ROOT / "benchmarks/results").glob("*.md")]
    sources += [Path(f"reference/{name}.md") for name in ("commands", "configuration")]
    for source in sources:
        text = (site / source.with_suffix(".html")).read_text("utf-8")
        assert "<!-- test:" not in text
        assert "<!-- timeline" not in text


def test_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert FETCHED.findall(path.read_text("utf-8")) == [], path


def test_references_are_those_of_the_code(site: Path) -> None:
    commands = (site / "reference/commands.html").read_text("utf-8")
    for command in ("train", "reference", "evaluate", "predict", "plan"):
        assert f"python -m gnnpipe {command}" in commands
    configuration = (site / "reference/configuration.html").read_text("utf-8")
    for key in all_keys():
        assert f"<code>{key.name}</code>" in configuration


def test_timelines_show_every_action(site: Path) -> None:
    text = (site / "index.html").read_text("utf-8")
    for stage, chunk in ((0, 0), (3, 7)):
        for kind in "FB":
            assert f">{stage}{kind}{chunk}</text>" in text


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    generated = {"commands.md", "configuration.md", "log.md", "gpu.md", "changelog.md"}
    for target in LINK.findall(page.read_text("utf-8")):
        path = (page.parent / target).resolve()
        if path.parent == ROOT / "docs/results":
            path = ROOT / "benchmarks/results" / path.name
        assert path.exists() or path.name in generated, target


def test_every_complaint_is_answered() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    numbers = [int(n) for n in re.findall(r"^(\d+)\. \*.+", text, re.M)]
    assert numbers == list(range(1, NUM_COMPLAINTS + 1))


def test_notebook_runs_and_is_kept_without_outputs(tmp_path: Path) -> None:
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    # As a kernel would, without needing one: cell after cell, in one process.
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    env = child_environment({**thread_variables(1), "MPLBACKEND": "agg"})
    del env[PARENT_VARIABLE]  # The launcher's parent is the script, not this process.
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: cut" in done.stdout
    right = re.search(r"([\d.]+)% of the test digits are right", done.stdout)
    assert right is not None
    assert float(right[1]) > 80


def site_pages() -> ModuleType:
    """The hook of mkdocs, loaded as mkdocs loads it."""
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "dev/site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_help_text_has_examples_that_parse() -> None:
    parsers = list(site_pages().all_parsers())
    programs = {parser.prog: parser for parser in parsers}
    for parser in parsers:
        assert "example" in parser.format_help(), parser.prog
        for line in re.findall(r"^  ((?:python|torchrun) .*)$", parser.epilog, re.M):
            words = shlex.split(line.partition(" > ")[0])
            start = words.index("-m")
            parse(programs[f"python -m {words[start + 1]}"], words[start + 2 :])
