"""Inductive training: the training part alone is seen, and the whole graph is judged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from combinations import both_ways, train_all, write_npz
from drawn import woven
from process_pool import ProcessPool

from gnnpipe.config import Config, from_dict
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.inference import evaluate_run
from gnnpipe.metrics import read_metrics
from gnnpipe.pretrained import PretrainedModel
from gnnpipe.reference_run import ReferenceRun
from gnnpipe.subgraph import training_part
from gnnpipe.trainer import Trainer

EPOCHS = 4


def inductive(folder: Path, **partition: Any) -> Config:
    return from_dict(
        {
            "data": {"inductive": True},
            "partition": {"num_chunks": 1, "method": "contiguous", **partition},
            "model": {"name": "gcn", "num_layers": 3, "hidden_channels": 8, "dtype": "float64"},
            "training": {"epochs": EPOCHS, "eval_every": 1},
            "parallel": {"virtual_stages": 2},
            "run": {"dir": str(folder / "run"), "tensorboard": False, "threads": 1},
        }
    )


def train(graph: Graph, config: Config) -> list[dict[str, Any]]:
    Trainer(config, graph=graph).fit()
    return read_metrics(Path(config.run.dir) / "metrics.jsonl")


def test_one_chunk_equals_the_reference(tmp_path: Path) -> None:
    graph, config = woven(is_directed=True), inductive(tmp_path)
    records = train(graph, config)
    plain = ReferenceRun(config, graph, device=torch.device("cpu"))
    for epoch, record in enumerate(records, 1):
        assert record["loss"] == pytest.approx(plain.train_epoch(epoch), rel=0, abs=1e-9)
        assert record["accuracy"] == plain.evaluate()


def test_training_is_that_on_the_training_part_alone(tmp_path: Path) -> None:
    graph = woven()
    records = train(graph, inductive(tmp_path, num_chunks=3))
    transductive = replace(inductive(tmp_path / "part", num_chunks=3))
    values = {**vars(transductive), "data": replace(transductive.data, inductive=False)}
    alone = train(training_part(graph), Config(**values))
    assert [r["loss"] for r in records] == [r["loss"] for r in alone]
    others = ~graph.train_mask
    assert isinstance(graph.features, np.ndarray)
    changed = graph.features + others[:, None].astype(np.float32)
    again = train(replace(graph, features=changed), inductive(tmp_path / "again", num_chunks=3))
    assert [r["loss"] for r in again] == [r["loss"] for r in records]
    assert all(r["accuracy"]["val"] is None for r in alone)


def test_evaluation_is_that_of_the_whole_graph(tmp_path: Path) -> None:
    graph, config = woven(), inductive(tmp_path, num_chunks=3)
    record = train(graph, config)[-1]
    scores = PretrainedModel.from_pretrained(config.run.dir, weights="last")(graph)
    right = scores.argmax(1).numpy() == graph.labels
    for split in ("train", "val", "test"):
        mask = getattr(graph, f"{split}_mask") & (graph.labels >= 0)
        assert record["accuracy"][split] == right[mask].mean()
    assert evaluate_run(config.run.dir, weights="last")["accuracy"] == record["accuracy"]


def test_stages_and_ways_change_nothing(pool: ProcessPool, tmp_path: Path) -> None:
    ring = [(i, (i + step) % 32) for i in range(32) for step in (1, 2, 5)]
    write_npz(tmp_path / "graph.npz", both_ways(ring), num_nodes=32)
    common = [
        f"data.name={tmp_path / 'graph.npz'}",
        "data.inductive=true",
        "partition.num_chunks=2",
        "model.num_layers=3",
        "model.hidden_channels=8",
        "model.dtype=float64",
        "training.epochs=3",
    ]
    both = ["parallel.num_stages=2", "parallel.num_ways=2"]
    table = {
        "one": [*common, "partition.method=bfs"],
        "stages": [*common, "partition.method=bfs", "parallel.num_stages=3"],
        "ways": [*common, "partition.method=bfs", *both],
    }
    found = train_all(pool, tmp_path, table)
    assert found["one"].losses == found["stages"].losses
    assert found["one"].accuracy == found["stages"].accuracy
    last = read_metrics(tmp_path / "ways" / "metrics.jsonl")[-1]
    assert evaluate_run(str(tmp_path / "ways"), weights="last")["accuracy"] == last["accuracy"]
    assert json.loads((tmp_path / "ways" / "summary.json").read_text())["world_size"] == 4


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    graph, config = woven(), inductive(tmp_path, num_chunks=3)
    train(graph, config)
    longer = replace(config, training=replace(config.training, epochs=EPOCHS + 2))
    records = train(graph, longer)
    whole = inductive(tmp_path / "whole", num_chunks=3)
    straight = train(graph, replace(whole, training=longer.training))
    assert [r["loss"] for r in records] == [r["loss"] for r in straight]


def test_a_partition_made_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`partition.path` .*must be null with `data.inductive`"):
        inductive(tmp_path, path=str(tmp_path))
