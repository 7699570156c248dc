"""Where waiting went, and the picture of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from combinations import read_run, train_all
from process_pool import ProcessPool

from gnnpipe.mesh import Mesh
from gnnpipe.metrics import read_metrics, time_shares
from gnnpipe.pictures import timeline_figure
from gnnpipe.recorder import (
    ACTION,
    SEND,
    STEP,
    WAIT,
    Array,
    Recorder,
    is_backward_tag,
    message_tag,
)
from gnnpipe.timeline import load_timeline
from gnnpipe.trace import Trace, chrome_events, transfer_s

BOUNDARY, HALO, GRADIENT = 0, 2, 3


def record(*events: tuple[float, ...]) -> Array:
    return np.array(events, dtype=np.float64).reshape(-1, 7)


def test_a_wait_is_a_transfer_from_when_the_message_was_sent() -> None:
    # time      0 1 2 3 4 5 6 7 8 9
    # rank 0    = = = = = send
    # rank 1        . . . ~ ~ ~ ~ =
    first = record((ACTION, 0, 0, 0, 0, 0, 5), (SEND, BOUNDARY, 1, 9, 64, 5, 5.1))
    second = record((WAIT, BOUNDARY, 0, 9, 0, 2, 9))
    assert transfer_s([first, second], Mesh(2, 1)) == [0.0, 4.0]


@pytest.mark.parametrize(("sent_s", "expected"), [(1.0, 7.0), (20.0, 0.0)])
def test_a_transfer_is_no_longer_than_the_wait(sent_s: float, expected: float) -> None:
    first = record((SEND, BOUNDARY, 1, 9, 64, sent_s, sent_s))
    second = record((WAIT, BOUNDARY, 0, 9, 0, 2, 9))
    assert transfer_s([first, second], Mesh(2, 1)) == [0.0, expected]


def test_messages_are_told_apart_by_kind_key_and_peer() -> None:
    sends = record(
        (SEND, BOUNDARY, 2, 1, 0, 3, 3),
        (SEND, BOUNDARY, 2, 2, 0, 4, 4),
        (SEND, HALO, 2, 1, 0, 5, 5),
    )
    waits = record((WAIT, HALO, 0, 1, 0, 0, 6), (WAIT, BOUNDARY, 1, 1, 0, 0, 6))
    assert transfer_s([sends, record(), waits], Mesh(3, 1)) == [0.0, 0.0, 1.0]


def test_a_sum_travels_once_the_last_way_of_the_stage_has_joined() -> None:
    def way(joined_s: float) -> Array:
        return record(
            (SEND, GRADIENT, -1, 1, 0, joined_s, joined_s), (WAIT, GRADIENT, -1, 1, 0, 6, 9)
        )

    # Two stages of two ways: the other stage's sum is another one.
    assert transfer_s([way(1), way(7), way(8), way(2)], Mesh(2, 2)) == [2.0, 2.0, 1.0, 1.0]


def test_shares_of_time_add_up() -> None:
    shares = time_shares([10.0, 8.0], [6.0, 4.0], [0.0, 2.0])
    assert shares == pytest.approx({"compute": 0.5, "wait": 0.4, "transfer": 0.1})
    assert time_shares([0.0], [0.0], [0.0])["compute"] == 0.0


def test_recorder_forgets_what_is_outside_of_epochs() -> None:
    recorder = Recorder()
    recorder.wait("halo", 1, 1, start_s=0.0, end_s=1.0)
    assert recorder.stop().shape == (0, 7)
    recorder.start()
    recorder.action("B", 3, 2, start_s=1.0, end_s=2.5)
    assert [recorder.number(WAIT, "halo", peer) for peer in (1, 1, 2)] == [1, 2, 1]
    assert recorder.stop().tolist() == [[ACTION, 1, 3, 2, 0, 1.0, 2.5]]
    recorder.start()
    assert recorder.number(WAIT, "halo", 1) == 1


@pytest.mark.parametrize("is_backward", [False, True])
def test_tags_tell_their_direction(is_backward: bool) -> None:
    tags = {message_tag(n, item, is_backward=is_backward) for n in range(5) for item in range(8)}
    assert len(tags) == 40
    assert {is_backward_tag(tag) for tag in tags} == {is_backward}


def test_chrome_trace_joins_send_and_receive_by_an_arrow() -> None:
    tag = message_tag(0, 0, is_backward=True)
    first = record((ACTION, 1, 1, 0, 0, 1, 2), (SEND, BOUNDARY, 1, tag, 64, 2, 2.1))
    second = record((WAIT, BOUNDARY, 0, tag, 0, 1, 3), (STEP, 0, 0, 0, 0, 4, 5))
    events = chrome_events([first, second], Mesh(2, 1))
    slices = {
        (e["name"], e["pid"], e["tid"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"
    }
    assert slices == {
        ("1B0", 0, 0): (1e6, 1e6),
        ("boundary to rank 1", 0, 2): (2e6, pytest.approx(1e5)),
        ("boundary from rank 0", 1, 2): (1e6, 2e6),
        ("wait: boundary", 1, 0): (1e6, 2e6),
        ("step", 1, 0): (4e6, 1e6),
    }
    start, end = (next(e for e in events if e["ph"] == phase) for phase in "sf")
    assert (start["id"], start["pid"], start["ts"]) == (end["id"], 0, 2e6)
    assert (end["pid"], end["ts"], end["bp"]) == (1, 3e6, "e")


def test_trace_file_keeps_the_last_epochs_and_names_its_tracks(tmp_path: Path) -> None:
    trace = Trace(Mesh(1, 2))
    assert trace.transfer_s() == [0.0, 0.0]
    for epoch in range(5):
        trace.add([record((ACTION, 0, 0, 0, 0, epoch, epoch + 1)), record()])
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["ts"] for e in events if e["ph"] == "X"] == [2e6, 3e6, 4e6]
    names = {(e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M"}
    assert (1, "rank 1 (stage rank 0, way 1)") in names
    assert (0, "backward messages") in names


@pytest.fixture(scope="module")
def traced(pool: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("traced")
    mesh = ["parallel.num_stages=2", "parallel.num_ways=2", "partition.num_chunks=4"]
    run = ["model.num_layers=4", "model.hidden_channels=16", "training.epochs=3", "run.trace=true"]
    train_all(pool, directory, {"run": [*mesh, *run]})
    return directory / "run"


def test_a_run_books_all_of_its_time(traced: Path) -> None:
    for line in read_metrics(traced / "metrics.jsonl"):
        shares = line["time_shares"]
        assert sum(shares.values()) == pytest.approx(1.0)
        assert min(shares.values()) >= 0.0
        assert shares["wait"] + shares["transfer"] == line["bubble_fraction"]


def test_a_run_leaves_a_trace_of_every_rank(traced: Path) -> None:
    events = json.loads((traced / "trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    for rank in range(4):
        actions = [
            e["name"]
            for e in slices
            if (e["pid"], e["tid"]) == (rank, 0) and e["cat"] == "compute"
        ]
        stage = rank // 2
        forwards = [f"{stage}F{k}" for k in range(4)]
        backwards = [f"{stage}B{k}" for k in reversed(range(4))]
        assert actions == [*forwards, *backwards, "step"] * 3
    assert min(event["dur"] for event in slices) >= 0
    ends = {phase: sorted(e["id"] for e in events if e["ph"] == phase) for phase in "sf"}
    assert ends["s"] == ends["f"]
    kinds = {event["cat"] for event in slices}
    assert kinds == {"compute", "wait", "boundary", "carried", "halo", "gradient"}


def test_an_exact_pass_is_whole_in_the_trace_and_in_the_picture(
    pool: ProcessPool, tmp_path: Path
) -> None:
    mesh = ["parallel.num_stages=2", "parallel.num_ways=2", "partition.num_chunks=4"]
    size = ["model.num_layers=4", "model.hidden_channels=16", "training.epochs=4"]
    exact = ["history.correct_every=2", "run.trace=true"]
    train_all(pool, tmp_path, {"run": [*mesh, *size, *exact]})
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    for rank in range(4):
        stage = rank // 2
        ordinary = [f"{stage}F{k}" for k in range(4)] + [f"{stage}B{k}" for k in range(3, -1, -1)]
        passes = [f"{stage}F exact", f"{stage}B exact"]
        # The last three epochs: with an exact pass, without, with one.
        expected = [*ordinary, *passes, "step", *ordinary, "step", *ordinary, *passes, "step"]
        found = [e for e in trace if (e["ph"], e["pid"], e["tid"]) == ("X", rank, 0)]
        assert [e["name"] for e in found if e["cat"] == "compute"] == expected
    timeline = load_timeline(tmp_path / "run" / "timeline.npz")
    assert timeline is not None
    assert timeline.epoch == 4
    legend = timeline_figure(timeline).axes[0].get_legend()
    assert legend is not None
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["forward", "backward", "exact gradient", "step", "waiting"]
    # Messages of the exact pass are not taken for those of the pipeline that chunk 0 has.
    for events in timeline.ranks:
        tags = events[(events[:, 0] == WAIT) & (events[:, 1] == BOUNDARY), 3]
        assert len(set(tags)) == len(tags) == 4 + 1


def test_no_trace_unless_asked_for(pool: ProcessPool, tmp_path: Path) -> None:
    train_all(pool, tmp_path, {"plain": ["training.epochs=1", "model.num_layers=2"]})
    assert not (tmp_path / "plain" / "trace.json").exists()
    assert read_run(tmp_path / "plain").losses
