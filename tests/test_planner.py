"""What the planner predicts of settings, and which it takes."""

import argparse
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from combinations import COMMON
from rich.console import Console

from gnnpipe import plan_command
from gnnpipe.cli import main
from gnnpipe.config import load_config
from gnnpipe.costs import MESSAGE_S, Line, Links, Profile, load_profile, save_profile
from gnnpipe.datasets import load_graph
from gnnpipe.errors import UserError
from gnnpipe.memory import FeatureCounts
from gnnpipe.plan_request import PlanRequest, plan_request
from gnnpipe.planner import Planner
from gnnpipe.planning import (
    SHAPES,
    Counts,
    applied,
    assumed_layers,
    assumed_shape,
    predict_all,
    shape_of,
)
from gnnpipe.schedule import Action, fill_drain, simulate
from gnnpipe.setting import GraphShape, Setting, WayShape, choose, reason, settings
from gnnpipe.shapes import num_parameters
from gnnpipe.volume import MirrorCounts

FAST = Links(1e9, 0.0, 1e9, 1000)


def per_row(seconds: float) -> Profile:
    """Every layer costs the same per row, a backward twice the forward; the ends are free."""
    none = Line(0.0, 0.0, 0.0)
    lines = {f"{role} {kind}": none for role in ("input", "output") for kind in "FB"}
    lines |= {"convolution F": Line(0.0, seconds, 0.0), "convolution B": Line(0, 2 * seconds, 0)}
    return Profile(lines, 0.0, "made up", 0.0, 0.0)


def planner(
    *, num_layers: int = 8, links: Links = FAST, mirrors: int = 0, profile: Profile | None = None
) -> Planner:
    """A GCN on 1000 nodes and 1000 edges."""
    config = load_config(None, ["model.name=gcn", f"model.num_layers={num_layers}"])
    layers = assumed_layers(config, Counts(1000, 1000, 10, 3))

    def ways(num_ways: int) -> WayShape:
        count = mirrors * (num_ways - 1)
        return WayShape(MirrorCounts(count, count), 1.0)

    shape = GraphShape(1000, 1000, FeatureCounts(10, None), True, ways)
    return Planner(layers, shape, profile=profile or per_row(1e-6), links=links)


def test_one_rank_takes_the_sum_of_its_layers() -> None:
    found = planner().predict(Setting(1, 1, 1, 1))
    assert found.epoch_s == pytest.approx(8 * 3e-6 * 1000)
    assert found.bubble_fraction == pytest.approx(0.0)
    assert sum(found.comm_bytes.values()) == 0


@pytest.mark.parametrize(("S", "C", "v"), [(2, 4, 1), (4, 8, 1), (2, 4, 2), (4, 8, 2)])
def test_even_stages_have_the_ideal_bubble(S: int, C: int, v: int) -> None:
    found = planner().predict(Setting(S, 1, C, v))
    ideal = (S - 1) / (v * C + S - 1)
    assert found.bubble_fraction == pytest.approx(ideal)
    assert found.epoch_s == pytest.approx(8 * 3e-3 / S / (1 - ideal))
    assert found.sizes == found.sizes[::-1] or sum(found.sizes) == 10


def split_per_row(seconds: float) -> Profile:
    """:func:`per_row` whose backward may be split in two equal halves."""
    plain, none = per_row(seconds), Line(0.0, 0.0, 0.0)
    lines = {f"{role} {kind}": none for role in ("input", "output") for kind in "IG"}
    lines |= {f"convolution {kind}": Line(0.0, seconds, 0.0) for kind in "IG"}
    return plain._replace(lines={**plain.lines, **lines})


def test_a_split_backward_is_predicted_where_it_was_measured() -> None:
    made, plain = planner(profile=split_per_row(1e-6)), planner()
    assert (made.schedules, plain.schedules) == (["fill_drain", "split_backward"], ["fill_drain"])
    S, C, chunk_s = 4, 8, 2 * 1e-6 * 1000 / 8  # 2 layers a stage
    whole = made.predict(Setting(S, 1, C, 1))
    split = made.predict(Setting(S, 1, C, 1, "split_backward"))
    assert whole.epoch_s == pytest.approx((C + S - 1) * 3 * chunk_s)
    assert split.epoch_s == pytest.approx(whole.epoch_s - (S - 1) * chunk_s)
    assert split.sizes == whole.sizes
    tried: dict[str, Any] = {"chunks": [C], "num_layers": 10, "num_nodes": 1000}
    found = predict_all(made, 4, **tried)
    assert {p.setting.schedule for p in found if p.setting.num_stages == 1} == {"fill_drain"}
    piped = [p for p in found if p.setting.num_stages == S]
    assert choose(piped).setting.schedule == "split_backward"
    assert {p.setting.schedule for p in predict_all(plain, 4, **tried)} == {"fill_drain"}
    config = load_config(None, ["model.name=gcn", "model.num_layers=8"])
    assert applied(config, split.setting, split.sizes).parallel.schedule == "split_backward"


def test_ways_share_rows_and_wait_for_what_they_mirror() -> None:
    alone = planner().predict(Setting(1, 2, 1, 1))
    assert alone.epoch_s == pytest.approx(8 * 3e-3 / 2)
    # 8 layers, forward and backward: 500 mirror rows x 64 channels x 4 bytes over 1 Gbit/s.
    slow = planner(links=Links(1.0, 0.0, 1.0, 1), mirrors=1000).predict(Setting(1, 2, 1, 1))
    halo_s = 16 * 500 * 64 * 4 * 8e-9
    sums_s = slow.epoch_s - 8 * 3e-3 / 2 - halo_s
    assert 0 <= sums_s < 1e-3
    assert slow.bubble_fraction == pytest.approx((halo_s + 0.0) / slow.epoch_s, abs=0.05)
    assert slow.comm_bytes["halo"] == 8 * 2 * 1000 * 64 * 4


def test_boundaries_follow_one_another_on_a_link() -> None:
    # A chunk's rows take 10 times as long to send as to compute: the link sets the pace.
    chunk_bytes = 250 * 64 * 4
    compute_s = 4 * 250e-6
    gbps = chunk_bytes * 8e-9 / (10 * compute_s)
    found = planner(links=Links(gbps, 0.0, gbps, 1)).predict(Setting(2, 1, 4, 1))
    assert found.epoch_s > 2 * 4 * 10 * compute_s


def test_work_on_messages_takes_time_on_both_sides() -> None:
    free = per_row(1e-6)
    dear = free._replace(post_s=1e-3, pack_s_per_byte=1e-9)
    none, some = (planner(profile=p).predict(Setting(2, 1, 4, 1)) for p in (free, dear))
    # Each rank sends, or takes, one message in each of its 8 actions.
    busy = [sum(p.timeline.busy_s) for p in (none, some)]
    assert busy[1] - busy[0] == pytest.approx(2 * 8 * 1e-3)
    none, some = (
        planner(profile=p, mirrors=1000).predict(Setting(1, 2, 1, 1)) for p in (free, dear)
    )
    # 8 layers, 2 directions: one message out and one in, 500 rows of 64 floats to collect.
    packed_s = 16 * (2 * 1e-3 + 500 * 64 * 4 * 1e-9)
    assert some.epoch_s - none.epoch_s == pytest.approx(packed_s, rel=1e-3)


def test_a_prediction_is_the_simulation_of_a_saved_profile(tmp_path: Path) -> None:
    lines = {"input F": [2e-4, 3e-7, 0.0], "input B": [3e-4, 2e-7, 0.0]}
    lines |= {"convolution F": [2e-4, 5e-7, 6e-9], "convolution B": [2e-4, 8e-7, 5e-9]}
    lines |= {"output F": [3e-4, 3e-7, 0.0], "output B": [2e-4, 2e-7, 0.0]}
    costs = {"step_s_per_parameter": 1e-8, "post_s": 5e-5, "pack_s_per_byte": 0.0}
    (tmp_path / "p.json").write_text(json.dumps({"lines": lines, "note": "", **costs}))
    profile = load_profile(tmp_path / "p.json")
    made = planner(profile=profile, links=Links(0.1, 100.0, 0.1, 1))
    S, C, v, rows = 2, 4, 2, 250
    found = made.predict(Setting(S, 1, C, v))
    roles = ["input", *["convolution"] * 8, "output"]
    bounds = [sum(found.sizes[:stage]) for stage in range(S * v + 1)]

    def duration(action: Action) -> float:
        stage = action.stage_index
        held = roles[bounds[stage] : bounds[stage + 1]]
        compute_s = sum(
            profile.lines[f"{role} {action.kind}"].seconds(rows, rows) for role in held
        )
        return compute_s + 5e-5 * ((stage > 0) + (stage < S * v - 1))

    on_link_s = rows * 64 * 4 * 8e-9 / 0.1
    schedule = fill_drain(S, C, v)
    expected = simulate(schedule, duration, transfer=1e-4, occupancy=on_link_s)
    ranks = [[i for s in range(r, S * v, S) for i in range(*bounds[s : s + 2])] for r in range(S)]
    ends = [
        spans[-1].end_s + 1e-8 * num_parameters(made._layers[i] for i in held)
        for spans, held in zip(expected.ranks, ranks, strict=True)
    ]
    assert found.epoch_s == pytest.approx(max(ends))


def test_ways_wait_for_the_slowest_and_the_busiest() -> None:
    def uneven(num_ways: int) -> WayShape:
        loads = ((0.5, 1.0), (1.5, 1.0)) if num_ways == 2 else ((1.0, 1.0),)
        count = 1000 * (num_ways - 1)
        return WayShape(MirrorCounts(count, count), 1.0, 2.0, loads)

    made = planner(links=Links(1.0, 0.0, 1.0, 1), mirrors=1000)
    even = made.predict(Setting(1, 2, 1, 1))
    made._graph = made._graph._replace(ways=uneven)
    made._ways.clear()
    found = made.predict(Setting(1, 2, 1, 1))
    halo_s = 16 * 500 * 64 * 4 * 8e-9
    even_s = 8 * 3e-3 / 2  # of half the rows; the slowest way has 1.5 times as many
    hidden_s = (1.5 - 0.5) * even_s / 2  # while the quicker way's rows are on their way
    expected = 0.5 * even_s + halo_s - hidden_s
    assert found.epoch_s - even.epoch_s == pytest.approx(expected, rel=1e-3)


def test_uneven_ways_wait_for_each_other_in_turn() -> None:
    def ways(loads: tuple[tuple[float, float], ...]) -> float:
        shape = WayShape(MirrorCounts(2000, 2000), 0.0, 1.0, loads)
        made = planner(links=Links(1.0, 0.0, 1.0, 1))
        made._graph = made._graph._replace(ways=lambda _: shape)
        return made._halo_s(2, "F", Setting(1, 2, 1, 1))

    # One way sends its rows while the other computes: of two layers in turn, one of each.
    row_s = 1e-6 * 1000 / 2
    assert ways(((1.0, 1.0), (1.0, 1.0))) == pytest.approx(1000 * 64 * 4 * 8e-9)
    halo_s = 1000 * 64 * 4 * 8e-9 - row_s * (1.4 - 0.6) / 2
    assert ways(((1.4, 1.0), (0.6, 1.0))) == pytest.approx(halo_s)


def test_halos_share_a_link_with_results_that_leave() -> None:
    made = planner(links=Links(1.0, 0.0, 1.0, 1), mirrors=1000)
    alone, hybrid = (made.predict(Setting(S, 2, 8, 1)) for S in (1, 2))
    assert alone.timeline.held_up_s == 0.0
    # A chunk's rows, 62 x 64, take 0.13 ms to leave; a layer's halo as long, with 3 to 4 layers a
    # stage. So from a stage's second chunk on a halo waits for the result before, which is gone
    # when that has gone on once.
    result_s = 1000 / 16 * 64 * 4 * 8e-9
    assert hybrid.timeline.held_up_s == pytest.approx(2 * 7 * result_s)
    rest_s = hybrid.epoch_s * (1 - hybrid.bubble_fraction) * 2
    assert rest_s == pytest.approx(8 * 3e-3 / 2)  # No wait is work.


def test_a_pipeline_waits_for_its_largest_chunk() -> None:
    made = planner()
    made._graph = made._graph._replace(chunks=lambda _: [(2.0, 1.0), (0.5, 1.0), (0.5, 1.0)])
    found, alone = made.predict(Setting(2, 1, 3, 1)), made.predict(Setting(1, 1, 3, 1))
    # 4 layers for each rank: the large chunk crosses both ranks, the others hide behind it.
    large_s, small_s = (4 * 1e-6 * 1000 / 3 * share for share in (2.0, 0.5))
    assert found.epoch_s == pytest.approx(3 * (2 * large_s + 2 * small_s))
    assert alone.epoch_s == pytest.approx(8 * 3e-3)


def test_a_hybrid_waits_for_the_slowest_way_of_its_largest_chunk() -> None:
    made = planner()
    found = made.predict(Setting(2, 2, 3, 1))
    ways = WayShape(MirrorCounts(0, 0), 1.0, 1.0, ((0.5, 1.0), (1.5, 1.0)))
    made._graph = made._graph._replace(
        ways=lambda _: ways, chunks=lambda _: [(2.0, 1.0), (0.5, 1.0), (0.5, 1.0)]
    )
    made._ways.clear()
    made._loads.clear()
    slow = made.predict(Setting(2, 2, 3, 1))
    assert found.epoch_s == pytest.approx(4 * 3e-6 * 1000 / 6 * 4)
    # As in the pipeline above, with half of the rows, and one and a half times as many there.
    large_s, small_s = (4 * 1e-6 * 1000 / 6 * 1.5 * share for share in (2.0, 0.5))
    assert slow.epoch_s == pytest.approx(3 * (2 * large_s + 2 * small_s))


def test_a_sum_that_comes_last_is_hidden_by_nothing() -> None:
    slow = planner(links=Links(1e-3, 0.0, 1e-3, 1))
    found = slow.predict(Setting(1, 2, 1, 1))
    # All weights travel once, half of them each way; the first layer's come last.
    sums_s = num_parameters(slow._layers) * 4 * 8e-6
    first_s = num_parameters(slow._layers[:1]) * 4 * 8e-6
    assert first_s < found.epoch_s - 8 * 3e-3 / 2 < sums_s
    assert slow.predict(Setting(2, 1, 4, 1)).comm_bytes["gradient"] == 0


def test_ranks_that_share_cores_do_not_compute_at_once() -> None:
    made = planner()
    alone = made.predict(Setting(1, 1, 1, 1))
    shared = Planner(
        made._layers,
        made._graph,
        profile=per_row(1e-6),
        links=Links(1e9, 0.0, 1e9, 4),
        cores=2,
    )
    for setting in (Setting(1, 4, 1, 1), Setting(4, 1, 8, 1)):
        assert shared.predict(setting).epoch_s == pytest.approx(alone.epoch_s / 2)
    assert shared.predict(Setting(1, 2, 1, 1)).epoch_s == pytest.approx(alone.epoch_s / 2)
    assert shared.predict(Setting(1, 1, 1, 1)).epoch_s == pytest.approx(alone.epoch_s)


def test_choice_is_the_quickest_then_the_simplest() -> None:
    made = planner()
    found = [made.predict(s) for s in settings(4, num_layers=10, chunks=[8], num_nodes=1000)]
    assert choose(found).setting == Setting(1, 4, 1, 1)  # no mirrors: nothing to pay
    dear = planner(links=Links(0.1, 500.0, 0.1, 1), mirrors=900)
    rated = [dear.predict(s) for s in settings(4, num_layers=10, chunks=[8], num_nodes=1000)]
    assert choose(rated).setting == Setting(1, 1, 1, 1)
    assert "one rank" in reason(choose(rated), rated)


def test_pipelines_win_where_graph_parallelism_sends_much() -> None:
    made = planner(num_layers=62, links=Links(1.0, 0.0, 1.0, 1), mirrors=900)
    found = [made.predict(s) for s in settings(4, num_layers=64, chunks=[16], num_nodes=1000)]
    best = choose(found)
    assert best.setting.num_stages > 1
    assert "pipeline" in reason(best, found)


def test_settings_use_all_ranks_or_one() -> None:
    found = list(settings(4, num_layers=10, chunks=[2, 8], num_nodes=1000))
    assert {s.num_ranks for s in found} == {1, 4}
    assert all(s.num_stages * s.virtual_stages <= 10 for s in found)
    assert Setting(1, 4, 1, 1) in found
    assert len(found) == len(set(found))
    assert list(settings(1, num_layers=10, chunks=[2], num_nodes=9)) == [Setting(1, 1, 1, 1)]
    assert all(
        s.num_chunks * s.num_ways <= 9
        for s in settings(4, num_layers=10, chunks=[2, 8], num_nodes=9)
    )


def test_memory_limits_the_choice() -> None:
    made = planner()
    found = [made.predict(s) for s in settings(4, num_layers=10, chunks=[8], num_nodes=1000)]
    least = min(p.memory_bytes for p in found)
    assert choose(found, memory_bytes=least).memory_bytes == least
    with pytest.raises(UserError, match=r"`--memory-gb` \(=1e-09\) must be at least"):
        choose(found, memory_bytes=1)


def test_profiles_survive_a_file(tmp_path: Path) -> None:
    save_profile(per_row(1e-6), tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == per_row(1e-6)
    older = json.loads((tmp_path / "profile.json").read_text())
    del older["post_s"], older["pack_s_per_byte"]
    (tmp_path / "profile.json").write_text(json.dumps(older))
    assert load_profile(tmp_path / "profile.json").post_s == MESSAGE_S


@pytest.mark.parametrize(
    "text", ["", "[]", '{"lines": {}}', '{"lines": {}, "note": "", "step_s_per_parameter": 0}']
)
def test_a_file_that_is_no_profile_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(UserError, match="must be a file that --save-profile wrote"):
        load_profile(path)


def test_mirrors_of_a_real_graph_are_counted() -> None:
    graph = load_graph("digits")
    shape = shape_of(graph)
    assert shape.ways(1) == WayShape(MirrorCounts(0, 0), 1.0)
    two = shape.ways(2)
    assert 0 < two.mirrors.incoming == two.mirrors.outgoing < graph.num_nodes
    assert 0.0 < two.interior_share < 1.0
    assert two.busiest >= 1.0
    chunks = shape.chunks(8)
    assert [sum(column) for column in zip(*chunks, strict=True)] == pytest.approx([8.0, 8.0])
    assert len({rows for rows, _ in chunks}) > 1
    assert [sum(column) for column in zip(*two.loads, strict=True)] == pytest.approx([2.0, 2.0])


def test_assumed_mirrors_grow_with_ways_up_to_a_limit() -> None:
    shape = assumed_shape(SHAPES["ogbn-products"])
    counts = [shape.ways(w).mirrors.incoming for w in (1, 2, 8, 64)]
    assert counts == sorted(counts)
    assert counts[0] == 0


def test_hundreds_of_ranks_are_planned_in_seconds() -> None:
    config = load_config(None, ["model.num_layers=64"])
    counts = SHAPES["ogbn-papers100M"]
    made = Planner(
        assumed_layers(config, counts),
        assumed_shape(counts),
        profile=per_row(1e-8),
        links=Links(100.0, 20.0, 400.0, 8),
    )
    found = predict_all(made, 64, chunks=[32], num_layers=66, num_nodes=counts.num_nodes)
    assert found[0].epoch_s == min(p.epoch_s for p in found)
    assert found[0].setting.num_ranks == 64


# --- the command


def options(**changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "ranks": 4,
        "hosts": 1,
        "bandwidth_gbps": 10.0,
        "local_gbps": None,
        "latency_us": 50.0,
        "memory_gb": None,
        "chunks": None,
        "shape": None,
        "profile": None,
        "save_profile": None,
        "write": None,
        "picture": None,
        "json": False,
    }
    return argparse.Namespace(**values | changes)


def request(**changes: Any) -> PlanRequest:
    return plan_request(options(**changes), load_config(None))


def test_request_fills_in_what_was_left_out() -> None:
    asked = request(ranks=None, chunks="4, 8")
    assert (asked.ranks, asked.chunks, asked.local_gbps) == (1, (4, 8), 10.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 0}, r"`--ranks` \(=0\) must be at least 1"),
        ({"hosts": 0}, r"`--hosts` \(=0\) must be at least 1"),
        ({"hosts": 3}, r"`--hosts` \(=3\) must divide `--ranks` \(=4\)"),
        ({"bandwidth_gbps": 0.0}, r"`--bandwidth-gbps` \(=0\) must be above 0"),
        ({"local_gbps": -1.0}, r"`--local-gbps` \(=-1\) must be above 0"),
        ({"memory_gb": 0.0}, r"`--memory-gb` \(=0\) must be above 0"),
        ({"latency_us": -1.0}, r"`--latency-us` \(=-1\) must be at least 0"),
        ({"chunks": "4,x"}, r"`--chunks` \(=4,x\) must be numbers"),
        ({"profile": "/nowhere.json"}, r"`--profile` \(=/nowhere.json\) must be a file"),
    ],
)
def test_mistakes_in_the_request_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        request(**change)


def run(*arguments: str) -> int:
    return main(["plan", *arguments])


SHORT = ("model.num_layers=4", "model.hidden_channels=16", "--ranks", "2", "--chunks", "4")


def test_command_measures_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--write", str(tmp_path / "new.yaml"), "--save-profile", str(tmp_path / "p.json")]
    assert run(*SHORT, *files, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    written = load_config(str(tmp_path / "new.yaml"))
    best = figures["best"]
    assert written.parallel.num_stages == best["num_stages"]
    assert written.parallel.num_ways == best["num_ways"]
    assert written.partition.num_chunks == best["num_chunks"]
    assert run(*SHORT, "--profile", str(tmp_path / "p.json")) == 0
    text = capsys.readouterr().out
    assert "epoch ms" in text
    assert "rank 0  " in text


def test_the_table_is_ruled_on_a_terminal_and_plain_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    found = []
    for is_terminal in (False, True):
        console = partial(Console, force_terminal=is_terminal, width=100, no_color=True)
        monkeypatch.setattr(plan_command, "Console", console)
        assert run("--shape", "ogbn-arxiv", *SHORT) == 0
        found.append(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))
    plain, ruled = found
    chosen = next(line for line in plain.splitlines() if line.startswith("*"))
    assert ["*", *re.findall(r"\S+", chosen[1:])] == re.findall(
        r"[^\s\u2502]+", next(line for line in ruled.splitlines() if "\u2502 * \u2502" in line)
    )
    assert "\u2502" not in plain
    assert re.findall(r"[.]{3} of \d+ settings", plain) == re.findall("[.]{3} .* settings", ruled)


def test_command_knows_shapes_without_a_graph(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--shape", "ogbn-arxiv", *SHORT) == 0
    assert "assumed" in capsys.readouterr().out
    assert run("--shape", "nothing", *SHORT) == 2
    assert "`--shape` (=nothing) must be one of ogbn-arxiv" in capsys.readouterr().err


@pytest.mark.parametrize(("free", "words"), [(10**12, "enough"), (10**6, "TOO LITTLE")])
def test_memory_is_told_by_purpose_beside_what_this_host_has(
    free: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_command, "free_bytes", lambda: free)
    assert run(*SHORT) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"memory of the fullest rank: \d+ MB \(libraries 600 MB, .*tables", line)
    assert re.search(rf"this host has .*{words} for [12] rank\(s\)", line)
    assert run("--shape", "ogbn-papers100M", *SHORT, "--json") == 0
    best = json.loads(capsys.readouterr().out)["best"]
    assert sum(best["memory"].values()) == best["memory_bytes"]


def test_picture_is_drawn(tmp_path: Path) -> None:
    assert run("--shape", "ogbn-arxiv", *SHORT, "--picture", str(tmp_path / "a.png")) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_plan_auto_trains_with_what_it_chose(tmp_path: Path) -> None:
    run_dir = tmp_path / "auto"
    small = ["model.num_layers=2", "model.hidden_channels=8", "training.epochs=2"]
    arguments = [*COMMON, *small, "parallel.plan=auto", f"run.dir={run_dir}"]
    assert main(["train", *arguments]) == 0
    config = load_config(str(run_dir / "config.yaml"))
    assert config.parallel.plan == "manual"
    assert config.world_size == 1


def test_applied_settings_replace_the_plan() -> None:
    config = load_config(None, ["parallel.plan=auto"])
    after = applied(config, Setting(2, 3, 8, 1), [10, 24])
    assert (after.parallel.plan, after.world_size, after.partition.num_chunks) == ("manual", 6, 8)
    assert after.parallel.layers_per_stage == (10, 24)
    assert applied(config, Setting(1, 3, 8, 1), [34]).parallel.layers_per_stage is None
