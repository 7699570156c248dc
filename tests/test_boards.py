"""TensorBoard: what its files hold, and what a browser shows of them."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from combinations import both_ways, save_partition, write_npz
from rich.console import Console
from test_telemetry import EXTRAS, record

from gnnpipe import chunk, telemetry
from gnnpipe.config import load_config, to_yaml
from gnnpipe.cut_facts import cut_facts, cut_report
from gnnpipe.follower import LAYOUT, curves
from gnnpipe.recorder import ACTION, STEP, WAIT
from gnnpipe.telemetry import Done, RunLog
from gnnpipe.timeline import Timeline, load_timeline, save_timeline

pytestmark = pytest.mark.timeout(180)

PICTURES = {
    f"pictures/{name}" for name in ("chunk_dependencies", "chunk_sizes", "drift", "timeline")
}
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,3000",
    "--virtual-time-budget=20000",
    "--dump-dom",
)


def measured(epoch: int) -> Timeline:
    """Two ranks: rank 1 waits for what rank 0 computes."""
    first = [(ACTION, 0, 0, 0, 0, 0.0, 1.0), (STEP, 0, 0, 0, 0, 3.0, 3.1)]
    second = [(ACTION, 0, 1, 0, 0, 0.0, 2.0), (WAIT, 0, 0, 0, 0, 0.0, 1.0)]
    return Timeline(epoch, [np.array(rows, dtype=np.float64) for rows in (first, second)])


def begin(directory: Path, partition: Path | None, **options: Any) -> RunLog:
    return RunLog(
        directory,
        config_text=to_yaml(load_config(None, ["run.dir=elsewhere"])),
        epochs=4,
        log_every=10,
        tensorboard=True,
        console=Console(file=io.StringIO()),
        partition=None if partition is None else str(partition),
        **options,
    )


@pytest.fixture(scope="module")
def partition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ring of 12 nodes in 3 chunks of 4: each chunk reads 2 edges from both neighbours."""
    folder = tmp_path_factory.mktemp("cut")
    ring = both_ways((i, (i + 1) % 12) for i in range(12))
    graph = write_npz(folder / "graph.npz", ring, num_nodes=12)
    save_partition(graph, folder / "cut", num_chunks=3, num_ways=1, method="contiguous")
    return folder / "cut"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, partition: Path) -> Path:
    """The run directory of two finished epochs on two ranks."""
    directory = tmp_path_factory.mktemp("board") / "run"
    with begin(directory, partition) as log:
        log.epoch(record(1, gradient_norm=[0.5, 0.25]))
        save_timeline(directory / "timeline.npz", measured(2))
        log.epoch(record(2, val=0.75, staleness=[0.1, None, 0.3], time_shares={"wait": 0.4}))
        log.finish(EXTRAS)
    return directory


def events(directory: Path) -> Any:  # tensorboard has no types
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    return found


def points(found: Any, tag: str) -> list[tuple[int, Any]]:  # approximately
    return [(event.step, pytest.approx(event.value)) for event in found.Scalars(tag)]


def test_the_process_behind_the_board_gives_way_from_its_start(tmp_path: Path) -> None:
    with begin(tmp_path / "run", None) as log:
        assert log._follower is not None
        child = log._follower._child.pid
        lower = min(19, os.getpriority(os.PRIO_PROCESS, 0) + telemetry.FOLLOWER_NICENESS)
        assert os.getpriority(os.PRIO_PROCESS, child) == lower


def test_every_figure_is_a_curve(finished: Path) -> None:
    found = events(finished)
    assert set(found.Tags()["scalars"]) == {
        "loss", "time/epoch_s", "time_share/bubble", "time_share/wait",
        *(f"metric/{split}" for split in ("train", "val", "test")),
        *(f"bytes/{kind}" for kind in ("boundary", "carried", "evaluation")),
        *(f"{what}/rank_{rank}" for what in ("memory", "tables") for rank in (0, 1)),
        "drift/layer_0", "drift/layer_2", "gradient_norm/stage_0", "gradient_norm/stage_1",
        *(f"final/{name}" for name in ("val_at_best", "test_at_best", "best_epoch",
                                       "median_epoch_s", "wall_s")),
    }  # fmt: skip
    assert points(found, "loss") == [(1, 0.4123457), (2, 0.4123457)]
    assert points(found, "metric/val") == [(2, 0.75)]
    assert points(found, "memory/rank_1") == [(1, 200.0), (2, 200.0)]
    assert points(found, "gradient_norm/stage_1") == [(1, 0.25)]
    assert points(found, "final/val_at_best") == [(2, 0.75)]


def test_the_layout_shows_every_group_of_curves(finished: Path) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    found = events(finished)
    (tensor,) = found.Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    assert {category.title: len(category.chart) for category in layout.category} == {
        title: len(charts) for title, charts in LAYOUT.items()
    }
    patterns = [t for category in layout.category for c in category.chart for t in c.multiline.tag]
    shown = [tag for tag in found.Tags()["scalars"] if any(re.match(p, tag) for p in patterns)]
    hidden = set(found.Tags()["scalars"]) - set(shown)
    assert {tag.split("/")[0] for tag in hidden} == {"final"}
    unused = [p for p in patterns if not any(re.match(p, tag) for tag in shown)]
    assert unused == ["^time/evaluation_s$"]  # These records have none.


def test_texts_are_the_configuration_and_the_partition_report(finished: Path) -> None:
    found = events(finished)
    texts = {
        tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in ("configuration", "partition")
    }
    assert "    dir: elsewhere\n" in texts["configuration"]
    assert "verdict: cut 25% of edges: good for pipelining" in texts["partition"]


def test_pictures_are_png_files_of_the_stated_size(finished: Path) -> None:
    found = events(finished)
    assert set(found.Tags()["images"]) == PICTURES
    for tag in PICTURES:
        (image,) = found.Images(tag)
        content = image.encoded_image_string
        assert content.startswith(b"\x89PNG\r\n")
        assert image.step == (0 if "chunk" in tag else 2)
        size = [int.from_bytes(content[start : start + 4], "big") for start in (16, 20)]
        assert size == [image.width, image.height]


def test_settings_and_final_metrics_are_in_the_hparams_tab(finished: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    metadata = {
        tag: HParamsPluginData.FromString(content)
        for tag, content in events(finished).PluginTagToContent("hparams").items()
    }
    start = metadata["_hparams_/session_start_info"].session_start_info.hparams
    assert start["training.lr"].number_value == 0.01
    assert start["history.order"].string_value == "shuffled"
    assert "run.dir" not in start
    shown = metadata["_hparams_/experiment"].experiment.metric_infos
    assert "final/test_at_best" in {info.name.tag for info in shown}
    assert metadata["_hparams_/session_end_info"].session_end_info.status == 1  # success


def test_epochs_that_come_again_replace_the_old_ones(tmp_path: Path) -> None:
    with begin(tmp_path, None) as log:
        for epoch in (1, 2, 3):
            log.epoch(record(epoch, loss=1.0))
    with begin(tmp_path, None, done=Done(1, 0.0)) as log:
        for epoch in (2, 3):
            log.epoch(record(epoch, loss=2.0))
    assert points(events(tmp_path), "loss") == [(1, 1.0), (2, 2.0), (3, 2.0)]


def test_a_killed_run_leaves_its_curves_and_no_process(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; from test_boards import begin, record\n"
        f"log = begin(Path({str(tmp_path)!r}), None)\n"
        "log.epoch(record(1)); print(log._follower._child.pid, flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[1]
    run = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE)
    assert run.stdout is not None
    child = int(run.stdout.readline())
    run.send_signal(signal.SIGKILL)
    run.wait(10)
    run.stdout.close()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()
    assert points(events(tmp_path), "loss") == [(1, 0.4123457)]


def test_a_run_outlives_the_process_that_draws_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with begin(tmp_path, tmp_path / "nowhere") as log:
        log.epoch(record(1))
        log.finish(EXTRAS)
    assert (tmp_path / "summary.json").exists()
    assert "TensorBoard files are incomplete: " in caplog.text
    assert "manifest.json cannot be read" in caplog.text


def test_a_run_does_not_wait_for_pictures_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(telemetry, "FOLLOWER_WAIT_S", 0.01)
    with begin(tmp_path, None) as log:
        log.epoch(record(1))
        log.finish(EXTRAS)
    assert "incomplete: the process that writes them was not ready after 0.01 s" in caplog.text
    assert f"`python -m gnnpipe report {tmp_path}` draws the whole run" in caplog.text


# --- what they are made of


def test_a_timeline_comes_back_from_disk(tmp_path: Path) -> None:
    save_timeline(tmp_path / "t.npz", measured(7))
    found = load_timeline(tmp_path / "t.npz")
    assert found is not None
    assert found.epoch == 7
    for mine, theirs in zip(measured(7).ranks, found.ranks, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert sorted(os.listdir(tmp_path)) == ["t.npz"]
    (tmp_path / "t.npz").write_bytes(b"PK")
    assert load_timeline(tmp_path / "t.npz") is None
    assert load_timeline(tmp_path / "nowhere.npz") is None


def test_chunks_are_counted(partition: Path) -> None:
    facts = cut_facts(chunk.load(partition))
    assert facts.nodes.tolist() == [4, 4, 4]
    assert facts.reads.tolist() == [[6, 1, 1], [1, 6, 1], [1, 1, 6]]
    assert "chunks x ways         3 x 1" in cut_report(chunk.load(partition))


def test_curves_of_many_layers_sort_by_number() -> None:
    tags = curves({"epoch": 1, "staleness": [0.0] * 11})
    assert {"drift/layer_00", "drift/layer_10"} <= tags.keys()


# --- in a browser


def answer_of(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return str(answer.read(), "utf-8", "replace")


def shown_by(chromium: str, page: str, profile: Path) -> str:
    """What a browser makes of a page; a busy machine gets three tries."""
    for number in range(3):
        done = subprocess.run(
            [chromium, *CHROMIUM_FLAGS, f"--user-data-dir={profile}-{number}", page],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        if "<line-chart" in done.stdout and done.stdout.count("imageData") >= len(PICTURES):
            break
    return done.stdout


@pytest.fixture
def served(finished: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a TensorBoard of the run, on a free port of this host."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(finished)]
    command += ["--host", "127.0.0.1", "--port", "0", "--load_fast=false"]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        # It answers before it has read the files.
        while "final/wall_s" not in answer_of(f"{found[0]}data/plugin/timeseries/tags"):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield found[0]
    finally:
        server.terminate()
        server.wait(20)


def test_a_browser_shows_charts_and_pictures(served: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium here; apt-get install chromium")
    page = f"{served}?tagFilter=%5Eloss%7Cpictures#timeseries"
    html = shown_by(chromium, page, tmp_path / "profile")
    assert "<line-chart" in html
    assert re.search(r">\s*0\.4123\s*<", html), "the last loss, in the chart's table"
    sources = re.findall(r'<img[^>]* src="(data/plugin/timeseries/imageData[^"]*)"', html)
    assert len(sources) == len(PICTURES)
    assert {tag for tag in PICTURES if tag in html} == PICTURES
    for source in sources:
        with urllib.request.urlopen(served + unescape(source), timeout=20) as answer:
            assert answer.read(8) == b"\x89PNG\r\n\x1a\n"
