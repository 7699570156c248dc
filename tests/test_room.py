"""Whether a run fits is known before it starts: counts, the machine's memory, what to change."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from drawn import woven

from gnnpipe import chunk, trainer
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.cli import main
from gnnpipe.config import Config, from_dict, load_config, to_dict
from gnnpipe.configured import model_layers
from gnnpipe.errors import UserError
from gnnpipe.room import (
    PROCESS_BYTES,
    Room,
    check_before_cut,
    check_room,
    free_bytes,
    gpu_room,
    host_room,
    rank_bytes,
    way_counts,
)
from gnnpipe.trainer import Trainer
from gnnpipe.way import way_graph
from partition import assign

SMALL = ("model.num_layers=6", "model.hidden_channels=64", "partition.num_chunks=4")


def cut(num_ways: int = 1, *, is_directed: bool = False, num_nodes: int = 60) -> ChunkedGraph:
    graph = woven(num_nodes)
    if is_directed:
        graph = type(graph).from_edge_index(
            [[0, 1, 2, 3, 30, 40], [9, 40, 31, 30, 2, 5]],
            features=graph.features,
            labels=graph.labels,
            train_mask=graph.train_mask,
            val_mask=graph.val_mask,
            test_mask=graph.test_mask,
        )
    ids = assign(graph.indptr, graph.indices, num_chunks=4, num_ways=num_ways, method="contiguous")
    return chunk.cut(graph, *ids, num_ways=num_ways, method="contiguous", seed=0)


@pytest.mark.parametrize("is_directed", [False, True])
@pytest.mark.parametrize("num_ways", [1, 2, 3])
def test_counts_are_those_of_the_ways_that_will_be_made(num_ways: int, is_directed: bool) -> None:
    chunked = cut(2, is_directed=is_directed)
    for way in range(num_ways):
        made = way_graph(chunked, way=way, num_ways=num_ways)
        counts = way_counts(chunked, way, num_ways)
        assert counts.num_rows == made.num_rows
        assert counts.num_edges == made.incoming.indices.size
        assert counts.in_mirrors == made.in_mirrors.row_id.size
        assert counts.out_mirrors == made.out_mirrors.row_id.size
        assert counts.largest_chunk == (made.chunk_ptr[1:] - made.chunk_ptr[:-1]).max()


def test_stages_share_the_layers_and_ways_the_rows() -> None:
    chunked = cut(2)

    def bytes_of(*overrides: str) -> list[Any]:
        config = load_config(None, [*SMALL, *overrides])
        return rank_bytes(config, chunked, model_layers(config, chunked))

    (alone,) = bytes_of()
    stages = bytes_of("parallel.num_stages=2")
    assert sum(rank.tables for rank in stages) == alone.tables
    assert [rank.features > 0 for rank in stages] == [True, False]
    ways = bytes_of("parallel.num_ways=2")
    assert alone.tables / 2 < ways[0].tables < alone.tables
    assert len(bytes_of("parallel.num_ways=2", "parallel.num_stages=3")) == 6


def test_a_host_has_what_the_kernel_and_the_container_leave(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    cgroup.mkdir()
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2000000 kB\n")
    assert free_bytes(proc, cgroup) == 2_048_000_000
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("5\n")
    assert free_bytes(proc, cgroup) == 2_048_000_000
    (cgroup / "memory.max").write_text("1000\n")
    assert free_bytes(proc, cgroup) == 995
    (cgroup / "memory.max").unlink()
    (cgroup / "memory").mkdir()
    (cgroup / "memory/memory.limit_in_bytes").write_text("700\n")
    (cgroup / "memory/memory.usage_in_bytes").write_text("900\n")
    assert free_bytes(proc, cgroup) == 0
    assert 0 < free_bytes() < 1 << 62


def test_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert host_room(8)[1:] == (8, "this host", False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_room(8)[1:] == (4, "this host", True)
    assert gpu_room(5) == (PROCESS_BYTES + 5, 1, "a GPU", True)


def refused(config: Config, chunked: ChunkedGraph, room: Room) -> str:
    layers = model_layers(config, chunked)
    with pytest.raises(UserError) as caught:
        check_room(
            config, chunked, layers, room, rebuild=lambda other: model_layers(other, chunked)
        )
    return str(caught.value)


def test_the_settings_that_are_proposed_fit() -> None:
    chunked = cut(num_nodes=4000)
    config = load_config(None, [*SMALL, "history.period=3", "model.dtype=float64"])
    (need,) = rank_bytes(config, chunked, model_layers(config, chunked))
    room = Room(PROCESS_BYTES + round(need.total * 0.8), 1, "a GPU", grows=True)
    message = refused(config, chunked, room)
    assert re.search(r"rank 0 needs \d+ MB \(libraries 600 MB, ", message)
    assert message.endswith("or set run.check_memory=false")
    proposed = re.findall(r"([a-z_]+)\.([a-z_]+)=(\w+) \(", message)
    assert ("parallel", "num_stages", "2") in proposed
    assert len(proposed) == 3
    for section, name, value in proposed:
        values = to_dict(config)
        values[section][name] = int(value) if value.isdecimal() else value
        other = from_dict(values)
        check_room(other, chunked, model_layers(other, chunked), room)


def test_more_stages_are_no_help_on_one_host() -> None:
    chunked = cut(num_nodes=4000)
    config = load_config(None, list(SMALL))
    (need,) = rank_bytes(config, chunked, model_layers(config, chunked))
    room = Room(PROCESS_BYTES + need.total - 1, 1, "this host", grows=False)
    message = refused(config, chunked, room)
    assert "num_stages" not in message
    assert "settings that fit: model.hidden_channels=32" in message
    nothing = refused(config, chunked, Room(1000, 1, "this host", grows=False))
    assert "use larger machines" in nothing


def test_running_again_is_proposed_where_it_is_enough() -> None:
    chunked = cut(num_nodes=4000)
    config = load_config(None, [*SMALL, "model.name=gat"])
    (need,) = rank_bytes(config, chunked, model_layers(config, chunked))
    room = Room(PROCESS_BYTES + need.total - 1, 1, "this host", grows=False)
    message = refused(config, chunked, room)
    assert "settings that fit: memory.mode=recompute (" in message


def test_the_check_may_be_switched_off_and_is_always_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="gnnpipe")
    chunked = cut()
    config = load_config(None, [*SMALL, "run.check_memory=false"])
    room = Room(10**6, 1, "this host", grows=False)
    check_room(config, chunked, model_layers(config, chunked), room)
    assert re.search(r"memory: rank 0 needs 6\d\d MB .*; this host has 1 MB", caplog.text)


def test_a_run_that_does_not_fit_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "host_room", lambda ranks: Room(0, ranks, "this host", False))
    run = tmp_path / "run"
    overrides = [*SMALL, f"run.dir={run}", "run.tensorboard=false", "partition.method=random"]
    with pytest.raises(UserError, match="`run.check_memory` .*which has 0 MB"):
        Trainer(load_config(None, overrides), graph=woven(60)).fit()
    assert not run.exists()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["train", *overrides, "run.threads=1"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert "rank 0 needs" in line


def test_a_graph_is_not_cut_for_a_run_that_no_cut_makes_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gnnpipe")
    monkeypatch.setattr(trainer, "host_room", lambda ranks: Room(0, ranks, "this host", False))
    overrides = [*SMALL, f"run.dir={tmp_path / 'run'}", "partition.method=random"]
    with pytest.raises(UserError, match="`run.check_memory` "):
        Trainer(load_config(None, overrides), graph=woven(60)).fit()
    assert "cutting" not in caplog.text


@pytest.mark.parametrize("num_ways", [1, 2])
def test_the_check_before_the_cut_asks_for_no_more_than_the_one_after(num_ways: int) -> None:
    config = load_config(None, [*SMALL, f"parallel.num_ways={num_ways}", "parallel.num_stages=1"])
    chunked = cut(num_ways=num_ways)
    layers = model_layers(config, chunked)
    need = max(rank.total for rank in rank_bytes(config, chunked, layers))
    room = Room(num_ways * (PROCESS_BYTES + need), num_ways, "this host", grows=False)
    graph = woven(chunked.num_nodes)
    check_before_cut(config, graph, room, rebuild=lambda other: model_layers(other, graph))
    with pytest.raises(UserError, match="finds that rank 0 needs"):
        check_before_cut(
            config,
            graph,
            room._replace(free_bytes=num_ways * PROCESS_BYTES),
            rebuild=lambda other: model_layers(other, graph),
        )
