"""Norms over nodes in whole runs: several ranks, a stop, evaluation, the plain model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from combinations import (
    both_ways,
    largest_difference,
    save_partition,
    train_all,
    write_npz,
)
from drawn import woven
from process_pool import Job, ProcessPool
from resuming import forked, ring_run, write_ring
from resuming import losses as losses_of

from gnnpipe.config import load_config
from gnnpipe.errors import UserError
from gnnpipe.inference import predict_run
from gnnpipe.interchange import to_pyg
from gnnpipe.pretrained import PretrainedModel, plain_model
from gnnpipe.trainer import Trainer

pytestmark = pytest.mark.timeout(250)


def test_ways_stages_and_a_stop_change_nothing(pool: ProcessPool, tmp_path: Path) -> None:
    write_ring(tmp_path)

    def run(name: str, num_each: int) -> dict[str, Any]:
        parallel = [f"parallel.num_{kind}={num_each}" for kind in ("stages", "ways")]
        common = ["model.dtype=float64", "model.norm=batch", *parallel]
        return {"overrides": ring_run(tmp_path, tmp_path / name, *common)}

    first = [Job("resuming:train_until", n * n, run(f"{n}", n) | {"epoch": 5}) for n in (1, 2)]
    pool.run([Job("resuming:train_on", 1, run("whole", 1)), *first])
    forked(tmp_path / "2", tmp_path / "2to1")
    onward = {"1": 1, "2": 2, "2to1": 1}
    pool.run([Job("resuming:train_on", n * n, run(name, n)) for name, n in onward.items()])
    wanted = losses_of(tmp_path / "whole")
    assert losses_of(tmp_path / "1") == wanted
    for name in ("2", "2to1"):
        assert losses_of(tmp_path / name) == pytest.approx(wanted, rel=0, abs=1e-10), name


def test_graph_norm_evaluates_alike_on_all_ways(pool: ProcessPool, tmp_path: Path) -> None:
    ring = [(i, (i + step) % 24) for i in range(24) for step in (1, 5)]
    graph = write_npz(tmp_path / "ring.npz", both_ways(ring), num_nodes=24)
    save_partition(graph, tmp_path / "ring", num_chunks=3, num_ways=2)
    common = [
        f"data.name={tmp_path / 'ring.npz'}",
        f"partition.path={tmp_path / 'ring'}",
        "partition.num_chunks=3",
        "model.name=resgcn+",
        "model.norm=graph",
        "model.num_layers=3",
        "model.hidden_channels=8",
        "model.dtype=float64",
        "training.epochs=3",
        "training.eval_every=1",
    ]
    table = {str(ways): [*common, f"parallel.num_ways={ways}"] for ways in (1, 2)}
    results = train_all(pool, tmp_path, table)
    assert results["1"].accuracy == results["2"].accuracy
    assert largest_difference(results["1"], results["2"]) < 1e-9


@pytest.mark.parametrize("norm", ["none", "layer", "batch", "graph"])
@pytest.mark.parametrize("name", ["gcn", "jknet", "resgcn+", "deepergcn"])
def test_a_run_with_a_norm_becomes_a_plain_model(name: str, norm: str, tmp_path: Path) -> None:
    graph = woven()
    directory = str(tmp_path / "run")
    overrides = [
        "partition.num_chunks=3",
        "partition.method=contiguous",
        f"model.name={name}",
        f"model.norm={norm}",
        "model.num_layers=3",
        "model.hidden_channels=8",
        "model.dtype=float64",
        "training.epochs=2",
        "run.tensorboard=false",
        "run.threads=1",
        f"run.dir={directory}",
    ]
    Trainer(load_config(None, overrides), graph=graph).fit()
    scores = np.load(predict_run(directory))
    data = to_pyg(graph)
    with torch.no_grad():
        plain = plain_model(directory)(data.x.double(), data.edge_index)
        own = PretrainedModel.from_pretrained(directory)(graph)
    assert np.abs(plain.numpy() - scores).max() < 1e-9
    assert np.abs(own.numpy() - scores).max() < 1e-9
    if norm == "graph":
        with pytest.raises(UserError, match="`nodes` cannot be served alone: `model.norm`"):
            PretrainedModel.from_pretrained(directory).predict(graph, [0])


def test_models_without_a_place_for_a_norm_refuse_one() -> None:
    with pytest.raises(UserError, match=r"`model.norm` \(=batch\) is an option of gcn, sage"):
        load_config(None, ["model.name=appnp", "model.norm=batch"])
    with pytest.raises(UserError, match=r"`model.norm` \(=bach\)"):
        load_config(None, ["model.norm=bach"])
