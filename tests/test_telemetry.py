"""What a run leaves behind and what a person sees of it."""

import dataclasses
import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gnnpipe.console import LiveDisplay, be_quiet, rank_bars, show_table, working
from gnnpipe.errors import UserError
from gnnpipe.metrics import Tally, json_text, metrics_line
from gnnpipe.telemetry import (
    Best,
    EpochRecord,
    RunLog,
    read_metrics,
)

CONFIG = "seed: 0\nmodel: {name: gcnii, num_layers: 32}\nrun: {dir: runs/a}\n"
EXTRAS = {"num_parameters": 1234, "world_size": 2, "threads": 1, "versions": {"torch": "2"}}


def record(epoch: int, *, val: float | None = None, **changes: Any) -> EpochRecord:
    """An epoch of two ranks."""
    accuracy = None if val is None else {"train": 0.9, "val": val, "test": val - 0.01}
    plain = EpochRecord(
        epoch=epoch,
        loss=0.4123456789012345,
        epoch_s=0.182,
        bubble_fraction=0.19,
        comm_bytes={"boundary": 1000, "carried": 500, "halo": 0, "gradient": 0, "evaluation": 7},
        peak_memory_bytes=[100, 200],
        table_bytes=[10, 20],
        compute_s=[0.1, 0.2],
        wait_s={"boundary": [0.01, 0.02]},
        accuracy=accuracy,
    )
    return dataclasses.replace(plain, **changes)


def run_log(directory: Path, *, epochs: int = 3, **options: Any) -> RunLog:
    options = {"log_every": 10, "tensorboard": False, "console": quiet(), **options}
    return RunLog(directory, config_text=CONFIG, epochs=epochs, **options)


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def finished_run(directory: Path) -> dict[str, Any]:
    with run_log(directory) as log:
        log.epoch(record(1, val=0.7))
        return log.finish(EXTRAS)


# --- metrics.jsonl


def test_each_epoch_is_one_line_in_full_precision(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        log.epoch(record(1))
        log.epoch(record(2, val=0.7, evaluation_s=0.5))
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first == {
        "epoch": 1,
        "loss": 0.4123456789012345,
        "epoch_s": 0.182,
        "bubble_fraction": 0.19,
        "comm_bytes": {
            "boundary": 1000, "carried": 500, "halo": 0, "gradient": 0, "evaluation": 7,
        },
        "peak_memory_bytes": [100, 200],
        "table_bytes": [10, 20],
        "compute_s": [0.1, 0.2],
        "wait_s": {"boundary": [0.01, 0.02]},
    }  # fmt: skip
    assert second["accuracy"] == {"train": 0.9, "val": 0.7, "test": 0.7 - 0.01}
    assert second["evaluation_s"] == 0.5


def test_counters_and_tuples_are_written_as_plain_json() -> None:
    line = metrics_line(record(1, comm_bytes=Counter(halo=3), table_bytes=(1, 2)))
    written = json.loads(line)
    assert written["comm_bytes"] == {"halo": 3}
    assert written["table_bytes"] == [1, 2]


@given(st.floats())
def test_a_float_comes_back_exactly_and_what_json_lacks_as_null(value: float) -> None:
    text = json_text({"value": [value]})
    back = json.loads(text)["value"][0]
    assert back == (value if abs(value) < float("inf") else None)


def test_every_epoch_is_readable_at_once(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        for epoch in (1, 2, 3):
            log.epoch(record(epoch))
            assert len(read_metrics(tmp_path / "metrics.jsonl")) == epoch


def test_a_killed_run_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; from test_telemetry import record, run_log\n"
        f"log = run_log(Path({str(tmp_path)!r}))\n"
        "log.epoch(record(1)); log.epoch(record(2)); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).resolve().parents[1]
    killed = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60)
    assert killed.returncode == -9
    assert [line["epoch"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "config.yaml").read_text() == CONFIG


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = metrics_line(record(1))
    for torn in ("", "{", metrics_line(record(2))[:-1], '{"epoch": "\N{MICRO SIGN}'):
        path.write_bytes((whole + torn).encode()[: -1 if "\N{MICRO SIGN}" in torn else None])
        assert [line["epoch"] for line in read_metrics(path)] == [1]


@pytest.mark.parametrize("damage", ["{", "", "7", "[1]"])
def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(metrics_line(record(1)) + damage + "\n" + metrics_line(record(2)))
    with pytest.raises(UserError, match=r"one JSON object per line, line 2 is damaged; "):
        read_metrics(path)


def test_missing_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be a readable file of metrics \(No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_an_epoch_out_of_turn_is_refused(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        log.epoch(record(1))
        with pytest.raises(AssertionError, match="epoch 3 is out of turn"):
            log.epoch(record(3))


def test_metrics_of_another_run_are_not_written_over(tmp_path: Path) -> None:
    finished_run(tmp_path)
    with pytest.raises(FileExistsError, match=r"metrics\.jsonl"):
        run_log(tmp_path)


# --- summary.json


def test_the_summary_holds_what_was_derived_and_what_was_given(tmp_path: Path) -> None:
    started_s = time.perf_counter()
    with run_log(tmp_path, epochs=8) as log:
        for epoch in range(1, 9):
            log.epoch(
                record(
                    epoch,
                    val={2: 0.7, 4: 0.8, 6: 0.8, 8: 0.75}.get(epoch),
                    epoch_s=100.0 if epoch <= 5 else float(epoch),
                    peak_memory_bytes=[epoch, 300 - epoch],
                )
            )
        summary = log.finish(EXTRAS)
    assert 0 < summary["wall_s"] <= time.perf_counter() - started_s
    assert summary == {
        "epochs": 8,
        "best_epoch": 4,
        "val_at_best": 0.8,
        "test_at_best": 0.8 - 0.01,
        "median_epoch_s": 7.0,
        "median_bubble_fraction": 0.19,
        "comm_bytes_per_epoch": {"boundary": 1000, "carried": 500, "halo": 0, "gradient": 0},
        "peak_memory_bytes": {"max": 299, "per_rank": [8, 299]},
        "wall_s": summary["wall_s"],
        **EXTRAS,
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_the_median_keeps_all_epochs_when_there_are_at_most_five() -> None:
    tally = Tally()
    for epoch in range(1, 6):
        tally.add(record(epoch, epoch_s=float(epoch)))
    assert tally.figures()["median_epoch_s"] == 3.0
    tally.add(record(6, epoch_s=60.0))
    assert tally.figures()["median_epoch_s"] == 60.0


def test_the_best_is_known_as_soon_as_it_happens(tmp_path: Path) -> None:
    best = []
    with run_log(tmp_path) as log:
        for epoch, val in enumerate([float("nan"), 0.5, 0.5, 0.6], start=1):
            log.epoch(record(epoch, val=val))
            best.append(log.best)
    assert best == [None, Best(2, 0.5, 0.49), Best(2, 0.5, 0.49), Best(4, 0.6, 0.6 - 0.01)]


def test_a_run_that_was_never_validated_has_no_best(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        summary = log.finish(EXTRAS)
    figures = ("best_epoch", "val_at_best", "test_at_best", "median_epoch_s")
    assert [summary[name] for name in figures] == [None] * 4
    assert summary["peak_memory_bytes"] == {"max": 0, "per_rank": []}


def test_an_error_closes_the_files_and_leaves_no_summary(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    log.epoch(record(1))
    with pytest.raises(RuntimeError, match="rank 1 is gone"), log:
        raise RuntimeError("rank 1 is gone")
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "metrics.jsonl"]
    with pytest.raises(ValueError, match="closed file"):
        log.epoch(record(2))


# --- imports


def test_torch_is_not_loaded() -> None:
    code = "import sys, gnnpipe.telemetry; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


# --- the console


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name == "gnnpipe"]


def test_one_line_every_log_every_epochs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gnnpipe")
    with run_log(tmp_path, epochs=25) as log:
        for epoch in range(1, 26):
            log.epoch(record(epoch, val=0.731 if epoch == 20 else None))
    assert logged(caplog) == [
        "epoch 010 | loss 0.412 | val   -   | 182 ms | bubble 0.19",
        "epoch 020 | loss 0.412 | val 0.731 | 182 ms | bubble 0.19",
        "epoch 025 | loss 0.412 | val 0.731 | 182 ms | bubble 0.19",
    ]


def test_the_last_epoch_is_logged_once_and_before_the_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gnnpipe")
    with run_log(tmp_path, epochs=3) as log:
        log.epoch(record(1))
        log.finish(EXTRAS)
        assert len(logged(caplog)) == 1
    assert len(logged(caplog)) == 1


def test_lines_keep_their_width(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gnnpipe")
    with run_log(tmp_path, epochs=2000, log_every=1) as log:
        log.epoch(record(1, loss=float("nan"), epoch_s=0.004, val=float("nan")))
        log.epoch(record(2, loss=9.5, bubble_fraction=0.0, val=1.0))
    first, second = logged(caplog)
    assert first == "epoch 0001 | loss   nan | val   nan |   4 ms | bubble 0.19"
    assert len(first) == len(second)


def terminal() -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    console = Console(
        file=screen, force_terminal=True, force_interactive=True, width=80, no_color=True
    )
    return console, screen


@pytest.fixture
def _loud(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A terminal, and the logger's level as it was."""
    monkeypatch.setenv("TERM", "xterm")
    level = logging.getLogger("gnnpipe").level
    yield
    logging.getLogger("gnnpipe").setLevel(level)


@pytest.mark.usefixtures("_loud")
def test_a_terminal_shows_progress_and_every_rank_in_80_columns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gnnpipe")
    console, screen = terminal()
    with run_log(tmp_path, epochs=200, console=console) as log:
        for epoch in range(1, 101):
            log.epoch(record(epoch, val=0.731 if epoch == 1 else None, evaluation_s=0.5))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines()
    last_line = [line for line in lines if "/200" in line][-1]
    assert "100/200" in last_line
    assert "loss 0.412  val 0.731  182 ms/epoch  bubble 0.19" in last_line
    assert "0:0" in last_line  # the time left
    assert [line for line in lines if "sent" in line][-1] == "sent 0.0 MB/s  evaluation 0.50 s"
    first, second = (next(x for x in reversed(lines) if f"rank {r}" in x) for r in (0, 1))
    assert first == "rank 0   " + "#" * 16 + "." * 14 + "  busy  55%    0.00 GB"
    assert second == "rank 1   " + "#" * 30 + "  busy 100%    0.00 GB"
    assert logged(caplog) == []


@pytest.mark.usefixtures("_loud")
def test_a_terminal_shows_that_an_epoch_is_being_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = iter(range(100, 1000, 7))
    monkeypatch.setattr("gnnpipe.console.time.monotonic", lambda: next(now_s))
    console, screen = terminal()
    display = LiveDisplay(console, epochs=200)
    display.evaluating()
    display.close()
    assert re.search(r"^evaluating \d+ s", screen.getvalue(), re.MULTILINE)
    with run_log(tmp_path, epochs=200, console=console) as log:
        log.epoch(record(1, evaluation_s=0.5))
        log.evaluating()
    shown = re.search(r"sent 0.0 MB/s  evaluating \d+ s \(last time 0.50 s\)", screen.getvalue())
    assert shown


def test_only_the_first_ranks_get_a_bar() -> None:
    many = record(1, compute_s=[0.1] * 40, peak_memory_bytes=[2_500_000_000] * 40)
    lines = [text.plain for text in rank_bars(many)]
    assert len(lines) == 17
    assert lines[0].endswith("busy  55%    2.50 GB")
    assert lines[-1] == "... 24 more ranks"


@pytest.mark.usefixtures("_loud")
def test_long_work_shows_how_long_it_has_taken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gnnpipe")
    console, screen = terminal()
    with working("cutting 12 nodes", console):
        pass
    assert re.search("cutting 12 nodes .*0:00:0", screen.getvalue())
    assert logged(caplog) == []
    with working("cutting 13 nodes", quiet()):
        pass
    assert logged(caplog) == ["cutting 13 nodes"]


@pytest.mark.usefixtures("_loud")
def test_a_report_is_a_table_on_a_terminal_and_a_verdict_elsewhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="gnnpipe")
    console, screen = terminal()
    show_table("nodes 12\nverdict: good", "verdict: good", console)
    assert screen.getvalue() == "nodes 12\nverdict: good\n"
    show_table("nodes 12\nverdict: good", "verdict: good", quiet())
    assert logged(caplog) == ["verdict: good"]


@pytest.mark.usefixtures("_loud")
def test_quiet_shows_nothing_anywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    console, screen = terminal()
    be_quiet()
    with run_log(tmp_path, console=console, log_every=1) as log:
        log.epoch(record(1))
    with working("cutting", console):
        show_table("nodes", "verdict", console)
    with working("cutting", quiet()):
        show_table("nodes", "verdict", quiet())
    assert screen.getvalue() == ""
    assert logged(caplog) == []
