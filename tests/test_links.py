"""Link prediction: held-out edges, seeded negatives, a loss over pairs of fresh rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import graph_of, woven
from one_process import losses, pipeline, reference, settings, striped, weights_of
from sklearn import metrics
from torch.nn import functional

from gnnpipe.config import Config, from_dict, to_dict
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.inference import Source, evaluate_run, score_rows
from gnnpipe.link_task import Link
from gnnpipe.links import link_graph
from gnnpipe.losses import Targets
from gnnpipe.metrics import read_metrics
from gnnpipe.order import chunk_order, step_bounds
from gnnpipe.trainer import Trainer

WIDTH = 8


def configured(**changes: Any) -> Config:
    return from_dict({**to_dict(settings("gcn", **changes)), "task": {"kind": "link"}})


def codes(graph: Graph) -> set[tuple[int, int]]:
    target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    return set(zip(graph.indices.tolist(), target.tolist(), strict=True))


@pytest.mark.parametrize("is_directed", [False, True])
def test_held_out_pairs_are_no_edges_in_any_direction(is_directed: bool) -> None:
    whole = woven(60, is_directed=is_directed, is_weighted=True)
    graph = link_graph(whole, channels=WIDTH)
    graph.validate()
    assert graph.pairs is not None
    assert graph.pair_split is not None
    before, after = codes(whole), codes(graph)
    asked = [[tuple(pair) for pair in graph.pairs[graph.pair_split == k]] for k in range(3)]
    assert set(asked[0]) <= after <= before
    for pair in (*asked[1], *asked[2]):
        assert pair in before
        assert pair not in after
        assert is_directed or pair[::-1] not in after
    loops = {pair for pair in before if pair[0] == pair[1]}
    held = len(asked[1]) + len(asked[2])
    assert len(after) == len(before) - held * (1 if is_directed else 2)
    assert len({*asked[0], *asked[1], *asked[2]}) * (1 if is_directed else 2) + len(loops) == len(
        before
    )
    assert len(asked[1]) == int(0.05 * sum(map(len, asked)))
    assert graph.edge_weight is not None
    assert len(graph.edge_weight) == graph.num_edges


def test_one_chunk_equals_the_plain_loop() -> None:
    graph = link_graph(woven(is_directed=True), channels=WIDTH)
    run, plain = (make(graph, configured(virtual_stages=2)) for make in (pipeline, reference))
    assert losses(run, 5) == pytest.approx(losses(plain, 5), rel=0, abs=1e-9)
    for split, figure in plain.evaluate().items():
        assert run.evaluate()[split] == pytest.approx(figure, rel=0, abs=1e-9)


def test_numbers_do_not_depend_on_the_stages() -> None:
    graph = link_graph(woven(), channels=WIDTH)
    one, three = (pipeline(graph, configured(virtual_stages=v), striped(graph, 4)) for v in (1, 3))
    assert losses(one, 3) == losses(three, 3)
    assert one.evaluate() == three.evaluate()
    weights = weights_of(three)
    assert all(torch.equal(weight, weights[key]) for key, weight in weights_of(one).items())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_step_counts_the_pairs_whose_ends_it_holds(steps: int) -> None:
    graph, chunk_id = link_graph(woven(), channels=WIDTH), np.arange(24) % 6
    # Weights stand still, so all that a step reads is exact, fresh or not.
    config = configured(steps_per_epoch=steps, dropout=0.0, lr=1e-30, weight_decay=0.0)
    run, plain = pipeline(graph, config, chunk_id.tolist()), reference(graph, configured())
    scores = plain.reference.evaluate()
    task = Link(graph, seed=config.seed)
    for epoch in (1, 2):
        order, bounds = chunk_order(config.seed, epoch, 6, kind="shuffled"), step_bounds(6, steps)
        step_of = np.searchsorted(bounds, np.argsort(order)[chunk_id], side="right")
        task.start_step(epoch)
        source, target = task._ends.T
        is_counted = torch.from_numpy(step_of)[source] == torch.from_numpy(step_of)[target]
        assert bool(is_counted.all()) == (steps == 1)
        dot = (scores[source] * scores[target]).sum(dim=1)
        each = functional.binary_cross_entropy_with_logits(
            dot, task._is_edge.to(dot), reduction="none"
        )
        wanted = float((each * is_counted).sum() / len(each))
        assert run.train_epoch(epoch) == pytest.approx(wanted, rel=0, abs=1e-12)


def test_steps_learn_links_and_do_not_depend_on_the_stages() -> None:
    graph = link_graph(woven(), channels=WIDTH)
    one, three = (
        pipeline(graph, configured(virtual_stages=v, steps_per_epoch=2), striped(graph, 4))
        for v in (1, 3)
    )
    assert losses(one, 4) == losses(three, 4)
    assert all(torch.equal(w, weights_of(three)[key]) for key, w in weights_of(one).items())


def test_pairs_across_chunks_count_and_reach_both_ends() -> None:
    graph = link_graph(woven(), channels=3)
    task = Link(graph, seed=4)
    scores = torch.randn(24, 3, dtype=torch.float64, requires_grad=True)
    wanted = task.whole_loss(scores, 1)
    whole = torch.autograd.grad(wanted, scores)[0]
    order = [(16, 24), (0, 8), (8, 16)]
    task.start_step(1)
    found = []
    for low, high in order:
        rows, everyone = torch.arange(low, high), torch.ones(high - low, dtype=torch.bool)
        found.append(task.loss(scores.detach()[rows], rows, everyone, total=24))
    assert float(sum(loss for loss, _ in found)) == pytest.approx(wanted.item(), abs=1e-12)
    for (low, high), (_, gradient) in zip(order, found, strict=True):
        torch.testing.assert_close(gradient, whole[low:high])


def test_negatives_are_new_every_epoch_and_the_same_for_any_numbering() -> None:
    graph = link_graph(woven(), channels=WIDTH)
    task = Link(graph, seed=4)
    scores = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(0))
    first, second = (float(task.whole_loss(scores, epoch)) for epoch in (1, 2))
    assert first != second
    assert first == float(Link(graph, seed=4).whole_loss(scores, 1))
    assert first != float(Link(graph, seed=5).whole_loss(scores, 1))
    chunked = pipeline(graph, configured(), striped(graph, 3)).engine.inputs.task
    assert isinstance(chunked, Link)
    new_order = np.argsort(np.array(striped(graph, 3)), kind="stable")
    # settings() has its own seed, 7
    again = float(Link(graph, seed=7).whole_loss(scores, 1))
    assert float(chunked.whole_loss(scores[new_order], 1)) == pytest.approx(again, abs=1e-6)


def test_loss_is_the_mean_over_pairs_and_their_negatives() -> None:
    graph = link_graph(woven(), channels=2)
    task = Link(graph, seed=0)
    assert graph.pairs is not None
    loss = task.whole_loss(torch.zeros(24, 2), 1)
    assert float(loss) == pytest.approx(np.log(2.0))
    train = torch.from_numpy(graph.pairs[graph.pair_split == 0])
    scores = torch.randn(24, 2)
    right = (scores[train[:, 0]] * scores[train[:, 1]]).sum(1)
    half = functional.softplus(-right).mean() / 2
    assert float(task.whole_loss(scores, 1)) > float(half)


def test_auc_is_sklearns_and_reciprocal_rank_is_one_for_the_first() -> None:
    graph = link_graph(woven(60), channels=60)
    targets = Targets(torch.arange(60), torch.zeros(3, 60, dtype=torch.bool))
    assert graph.pairs is not None
    scores = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
    task = Link(graph, seed=0)
    tested = graph.pairs[graph.pair_split == 2]
    rivals = task._negatives(len(tested) * 50, (1, 2)).view(-1, 50)
    ends = torch.from_numpy(tested)
    right = (scores[ends[:, 0]] * scores[ends[:, 1]]).sum(1)
    wrong = (scores[ends[:, 0]].unsqueeze(1) * scores[rivals]).sum(2)
    both = torch.cat((right, wrong[:, 0]))
    labels = [1] * len(right) + [0] * len(right)
    found = task.figures(task.tally(scores, targets))["test"]
    assert found == pytest.approx(metrics.roc_auc_score(labels, both.numpy()), abs=1e-6)
    rank = 1 + (wrong > right.unsqueeze(1)).sum(1) + 0.5 * (wrong == right.unsqueeze(1)).sum(1)
    mrr = Link(graph, seed=0, metric="mrr")
    assert mrr.figures(mrr.tally(scores, targets))["test"] == pytest.approx(
        float((1 / rank).mean()), abs=1e-6
    )


def test_real_links_are_found(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    config = from_dict(
        {
            "data": {"name": str(shared_data("cora.npz"))},
            "task": {"kind": "link"},
            "partition": {"num_chunks": 8},
            "model": {"name": "gcn", "num_layers": 1, "hidden_channels": 64, "dropout": 0.5},
            "parallel": {"virtual_stages": 2},
            "training": {"epochs": 30, "eval_every": 10, "weight_decay": 0.0},
            "run": {"dir": str(tmp_path / "run"), "tensorboard": False, "threads": 1},
        }
    )
    summary = Trainer(config).fit()
    assert summary["metric"] == "auc"
    assert summary["test_at_best"] > 0.8  # chance is 0.5
    record = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert evaluate_run(config.run.dir, weights="last")["accuracy"] == record["accuracy"]
    assert score_rows(Source(config.run.dir)).shape == (2708, 64)


def test_what_cannot_be_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a graph of at least 20 edges, not 3"):
        link_graph(graph_of(4, [(0, 1), (1, 2), (2, 3)]), channels=2)
    with pytest.raises(UserError, match="`task.kind` .=link. needs held-out pairs"):
        Link(woven(), seed=0)
    with pytest.raises(UserError, match="`parallel.num_ways` .=2. must be 1 with `task.kind`"):
        from_dict({"task": {"kind": "link"}, "parallel": {"num_ways": 2}})
