"""Runs whose messages round: what a way has received is not what its owner holds, and is kept."""

from pathlib import Path

import numpy as np
import pytest
from process_pool import Job, ProcessPool
from resuming import forked, losses, ring_run, write_ring

from gnnpipe import chunk
from gnnpipe.datasets import load_graph

pytestmark = pytest.mark.timeout(250)

TIMEOUT_S = 200
WAYS = ["parallel.num_stages=1", "parallel.num_ways=2"]
CASES = {
    "int8": [*WAYS, *(f"comm.{kind}=int8" for kind in ("boundary", "halo", "gradient"))],
    # The first snapshot is of the warm start, whose messages are exact.
    "bf16": [*WAYS, "comm.halo=bf16", "history.period=3"],
    "max": [*WAYS, "model.name=sage", "model.aggregator=max", "comm.halo=bf16"],
}


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ring")
    write_ring(folder)
    return folder


def train(overrides: list[str], num_ranks: int = 2, *, until: int | None = None) -> Job:
    if until is None:
        return Job("resuming:train_on", num_ranks, {"overrides": overrides})
    return Job("resuming:train_until", num_ranks, {"overrides": overrides, "epoch": until})


def test_rounded_mirrors_go_on_bit_for_bit(pool: ProcessPool, ring: Path, tmp_path: Path) -> None:
    whole, first, second = [], [], []
    for name, options in CASES.items():
        whole.append(train(ring_run(ring, tmp_path / f"{name}-whole", *options)))
        for epoch in (2, 4):
            run = ring_run(ring, tmp_path / f"{name}-{epoch}", *options)
            first.append(train(run, until=epoch))
            second.append(train(run))
    for jobs in (whole, first, second):
        pool.run(jobs, timeout_s=TIMEOUT_S)
    for name in CASES:
        for epoch in (2, 4):
            assert losses(tmp_path / f"{name}-{epoch}") == losses(tmp_path / f"{name}-whole"), name


def test_rounded_mirrors_of_other_ways_are_fetched_again(
    pool: ProcessPool, ring: Path, tmp_path: Path
) -> None:
    """The same chunks, but other ways: what was received then is of other nodes."""
    there = chunk.load(ring / "ring-4")
    cell_id = np.repeat(np.arange(8), np.diff(there.cell_ptr))[np.argsort(there.node_id)]
    graph, ids = load_graph(str(ring / "ring.npz")), (cell_id // 2, 1 - cell_id % 2)
    swapped = chunk.cut(graph, *ids, num_ways=2, method="bfs", seed=0)
    chunk.save(swapped, tmp_path / "swapped")
    options = CASES["int8"]
    run = ring_run(ring, tmp_path / "whole", *options)
    pool.run([train(run, until=4)], timeout_s=TIMEOUT_S)
    stopped = forked(tmp_path / "whole", tmp_path / "other")
    other = ring_run(ring, stopped, *options, f"partition.path={tmp_path / 'swapped'}")
    alone = ring_run(ring, forked(stopped, tmp_path / "alone"), *options, "parallel.num_ways=1")
    pool.run([train(run), train(other), train(alone, 1)], timeout_s=TIMEOUT_S)
    for name in ("other", "alone"):
        assert losses(tmp_path / name) != losses(tmp_path / "whole")
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=0.05)
