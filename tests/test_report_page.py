"""The page that compares runs: figures by hand, offline, mistakes named."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_boards import measured
from test_telemetry import EXTRAS, quiet, record

from gnnpipe.cli import main
from gnnpipe.config import load_config, to_yaml
from gnnpipe.telemetry import RunLog
from gnnpipe.timeline import save_timeline


def make_run(directory: Path, figures: list[float], *overrides: str, is_done: bool = True) -> str:
    """A run whose epochs take 2 s each and end with these validation figures."""
    text = to_yaml(load_config(None, [f"run.dir={directory}", *overrides]))
    with RunLog(directory, config_text=text, epochs=9, log_every=10, console=quiet()) as log:
        for epoch, val in enumerate(figures, start=1):
            log.epoch(record(epoch, val=val, epoch_s=2.0))
        save_timeline(directory / "timeline.npz", measured(len(figures)))
        if is_done:
            log.finish(EXTRAS)
    return str(directory)


class Rows(HTMLParser):
    """The cells of every table row, and the tags and attributes of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self._is_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key.endswith(("src", "href"))]
        if tag == "tr":
            self.rows.append([])
        self._is_cell = tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.rows[-1].append(data)
            self._is_cell = False


def report(tmp_path: Path, *run_dirs: str) -> tuple[str, Rows]:
    out = tmp_path / "report.html"
    assert main(["report", *run_dirs, "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    return text, Rows(text)


def test_runs_are_compared_by_hand_counted_figures(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a&b", [0.4, 0.8, 0.9])
    second = make_run(tmp_path / "slow", [0.1, 0.5, 0.7, 0.8], "model.dropout=0.3", "seed=4")
    text, page = report(tmp_path, first, second)
    assert "<title>gnnpipe: a&amp;b, slow</title>" in text
    rows = {row[0]: row[1:] for row in reversed(page.rows)}
    assert rows["a&b"][:6] == ["finished", "3", "3", "0.9000", "0.8900", "2,000.0"]
    # 0.8 is what both reach: 90, 95, 99 and 100% of it are 0.72, 0.76, 0.792 and 0.8.
    assert ["run", "val 0.7200", "val 0.7600", "val 0.7920", "val 0.8000"] in page.rows
    assert ["a&b", "4.0", "4.0", "4.0", "4.0"] in page.rows
    assert ["slow", "8.0", "8.0", "8.0", "8.0"] in page.rows
    assert rows["model.dropout"] == ["0.5", "0.3"]
    assert rows["seed"] == ["0", "4"]
    assert "run.dir" not in rows


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    text, page = report(tmp_path, make_run(tmp_path / "run", [0.5]))
    assert page.tags.count("svg") == 5  # curves, time, timeline, bytes, memory
    assert {"script", "link", "img", "iframe", "base"} & set(page.tags) == set()
    assert [link for link in page.links if not link.startswith("#")] == []
    assert re.search(r"@import|url\((?!#)", text) is None
    for words in ("validation figure", "epoch 1, measured", "rank 1", "training loss"):
        assert words in text


def test_a_run_that_goes_on_is_shown_too(tmp_path: Path) -> None:
    _, page = report(tmp_path, make_run(tmp_path / "run", [0.5, 0.6], is_done=False))
    assert ["run", "not finished", "2"] in [row[:3] for row in page.rows]


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    directories = [make_run(tmp_path / parent / "run", [0.5]) for parent in ("x", "y")]
    _, page = report(tmp_path, *directories)
    assert {row[0] for row in page.rows} >= set(directories)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (("metrics.jsonl", None), "must hold a run's config.yaml and metrics.jsonl"),
        (("config.yaml", "{"), "must hold a readable config.yaml and summary.json"),
        (("config.yaml", "7"), "must hold a readable config.yaml and summary.json"),
        (("summary.json", "{"), "must hold a readable config.yaml and summary.json"),
        (("metrics.jsonl", "7\n"), "line 1 is damaged"),
    ],
)
def test_a_damaged_run_is_a_mistake(
    damage: tuple[str, str | None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path / "run", [0.5])
    name, text = damage
    if text is None:
        (tmp_path / "run" / name).unlink()
    else:
        (tmp_path / "run" / name).write_text(text)
    assert main(["report", run, "--out", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "report.html").exists()
