"""Several optimizer steps in an epoch: groups of chunks, everything else historical."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import ByHand, Epoch, exact, strata_of
from combinations import both_ways, differing, largest_difference, save_partition, train_all
from combinations import write_npz as write_graph
from drawn import graph_of, woven
from one_process import (
    losses,
    pipeline,
    reference,
    settings,
    striped,
    tables_of,
    weights_of,
)
from process_pool import ProcessPool
from torch.nn import functional

from gnnpipe.config import Config, load_config
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.order import chunk_order, step_bounds

Weights = dict[str, torch.Tensor]


def by_steps(graph: Graph, config: Config, weights: Weights, chunk_id: Sequence[int]) -> float:
    """One epoch by hand, in groups of chunks; trains ``weights``."""
    num_chunks, steps = max(chunk_id) + 1, config.training.steps_per_epoch
    hand = ByHand(graph, config.model.name, num_layers=config.model.num_layers)
    hand.logits(weights, {}, exact(chunk_id))
    history = dict(hand.tables)
    adam = torch.optim.Adam(weights.values(), lr=0.01, weight_decay=5e-4, foreach=False)
    total = 0.0
    for epoch in (1, 2, 3):
        order = chunk_order(config.seed, epoch, num_chunks, kind="shuffled")
        before, total = dict(history), 0.0
        for low, high in pairwise(step_bounds(num_chunks, steps)):
            group = order[low:high]
            # Chunks of other steps come later than the group: it reads their histories.
            own = Epoch(
                chunk_id,
                [*group, *(c for c in order if c not in group)],
                config.history.cross_chunk_gradient,
                (config.seed, epoch),
                config.model.dropout,
                strata_of(graph),
            )
            rows = torch.from_numpy(np.isin(chunk_id, group))
            logits = hand.logits(weights, before, own)
            nodes = hand.train[rows[hand.train]]
            for layer, table in hand.tables.items():
                before[layer] = torch.where(rows[:, None], table, before[layer])
            if not len(nodes):
                continue
            loss = functional.cross_entropy(logits[nodes], hand.labels[nodes])
            adam.zero_grad()
            torch.autograd.backward(loss)
            adam.step()
            total += float(loss.detach()) * len(nodes) / len(hand.train)
        history = before
    return total


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["gcn", "gat", "gcnii"])
def test_epochs_in_steps_equal_the_same_by_hand(name: str, steps: int) -> None:
    graph = woven(is_directed=True)
    config = settings(name, steps_per_epoch=steps, dropout=0.3)
    chunk_id = striped(graph, 5)
    run = pipeline(graph, config, chunk_id)
    weights = {key: weight.requires_grad_() for key, weight in weights_of(run).items()}
    expected = by_steps(graph, config, weights, chunk_id)
    assert losses(run, 3)[-1] == pytest.approx(expected, rel=0, abs=1e-10)
    for key, weight in weights_of(run).items():
        torch.testing.assert_close(weight, weights[key].detach(), rtol=0, atol=1e-9, msg=key)


def lone_trainer() -> Graph:
    """A ring of 8 whose only training node is 0."""
    edges = [(i, (i + 1) % 8) for i in range(8)]
    rows = np.random.default_rng(1).random((8, 3)).astype(np.float32)
    both = [*edges, *((b, a) for a, b in edges)]
    return graph_of(8, both, features=rows, train_mask=np.arange(8) == 0)


def test_a_step_without_training_nodes_only_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("gcn", steps_per_epoch=4, dropout=0.0, order="fixed")
    run = pipeline(lone_trainer(), config, [0, 0, 1, 1, 2, 2, 3, 3])
    steps: list[int] = []
    step = run._optimizer.step

    def spy() -> None:
        steps.append(1)
        step()

    monkeypatch.setattr(run._optimizer, "step", spy)
    before = {index: table.values.clone() for index, table in tables_of(run).items()}
    assert len(losses(run, 3)) == 3
    assert len(steps) == 3  # one of four steps in each epoch has something to learn
    for index, table in tables_of(run).items():
        changed = (table.values != before[index]).any(dim=1)
        assert changed[2:].any(), index  # rows of the other steps saw the new weights


def test_the_plain_loop_has_one_step() -> None:
    with pytest.raises(UserError, match=r"`training.steps_per_epoch` \(=2\) must be 1 for"):
        reference(woven(), settings(steps_per_epoch=2))


def test_more_steps_than_chunks_are_refused() -> None:
    options = ["training.steps_per_epoch=5", "partition.num_chunks=4"]
    with pytest.raises(UserError, match=r"`training.steps_per_epoch` \(=5\) must be at most"):
        load_config(None, options)


@pytest.mark.parametrize("name", ["gat", "gcnii"])
def test_steps_are_bit_equal_for_any_number_of_virtual_stages(name: str) -> None:
    graph = woven()
    once, *others = (
        losses(
            pipeline(
                graph, settings(name, virtual_stages=v, steps_per_epoch=3), striped(graph, 4)
            ),
            4,
        )
        for v in (1, 2, 5)
    )
    assert all(other == once for other in others)


EXTRAS = ["training.steps_per_epoch=3", "training.clip_norm=0.1", "training.optimizer=sgd"]
KEPT = [
    "history.strata=16",
    "history.dropout=false",
    "history.momentum=0.1",
    "history.predict=linear",
    "history.max_drift=0.2",
    "history.refresh_every=3",
    "history.late_gradient=0.5",
]


def test_steps_and_clipping_in_real_processes(pool: ProcessPool, tmp_path: Path) -> None:
    ring = [(i, (i + step) % 40) for i in range(40) for step in (1, 7)]
    graph = write_graph(tmp_path / "ring.npz", both_ways(ring), num_nodes=40)
    save_partition(graph, tmp_path / "ring", num_chunks=8, num_ways=2, method="random")
    run = [
        f"data.name={tmp_path / 'ring.npz'}",
        f"partition.path={tmp_path / 'ring'}",
        "partition.num_chunks=8",
        "model.num_layers=6",
        "model.hidden_channels=8",
        "model.dtype=float64",
        "training.epochs=4",
        "training.lr=0.1",
        "model.dropout=0.2",
        *EXTRAS,
        *KEPT,
    ]
    shapes = {"111": (1, 1, 1), "221": (2, 2, 1), "212": (2, 1, 2)}
    table = {
        name: [
            *run,
            f"parallel.num_stages={s}",
            f"parallel.virtual_stages={v}",
            f"parallel.num_ways={w}",
        ]
        for name, (s, v, w) in shapes.items()
    }
    table["whole"] = [*table["212"], "training.steps_per_epoch=1"]
    table["plain"] = [*table["212"], *(f"{key}={value}" for key, value in PLAIN.items())]
    results = train_all(pool, tmp_path / "runs", table)
    assert differing(results["111"], results["221"]) == []
    assert largest_difference(results["111"], results["212"]) < 1e-9
    check_bytes(*(results[name].comm_bytes[0] for name in ("212", "whole", "plain")))


PLAIN = {
    "history.dropout": "true",
    "history.momentum": 0,
    "history.predict": "null",
    "history.max_drift": "null",
    "history.refresh_every": 0,
}


def check_bytes(
    in_steps: Mapping[str, int], whole: Mapping[str, int], plain: Mapping[str, int]
) -> None:
    """Rows travel once an epoch, sums of gradients once a step, kept rows once more."""
    assert in_steps["gradient"] == 3 * whole["gradient"] > 0
    for kind in ("boundary", "carried", "halo"):
        assert in_steps[kind] == whole[kind] > 0
    # Mirrors of fresh rows and of gradients; the graph is undirected, so they are as many. Every
    # node has four readers: sums of 3 strata in 8 chunks of 6 tables, to the other way and back,
    # of drift and of what is owed for it.
    drift = 2 * 8 * 3 * 6 * 8 * 8
    assert in_steps["halo"] == (plain["halo"] - 2 * drift) * 3 // 2 + 3 * drift
    assert in_steps["boundary"] == plain["boundary"]
