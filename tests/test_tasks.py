"""Losses and figures of every kind of task, alone and through the pipeline."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from drawn import woven
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from one_process import losses, pipeline, reference, settings, striped, weights_of
from sklearn import metrics
from torch.nn import functional

from gnnpipe.auc import mean_roc_auc, roc_auc
from gnnpipe.config import Config, from_dict, to_dict
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.losses import Targets
from gnnpipe.tasks import MultiLabel, MultiTaskAuc, Regression, SingleLabel, make_task

NUM_TASKS = 4


@examples(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**31), st.integers(1, 8))
def test_roc_auc_equals_sklearns_ties_included(num_rows: int, seed: int, levels: int) -> None:
    draw = np.random.default_rng(seed)
    scores, labels = draw.integers(levels, size=num_rows) / 7, draw.integers(2, size=num_rows)
    ours = roc_auc(torch.from_numpy(scores), torch.from_numpy(labels))
    if len(set(labels.tolist())) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)


def ogb_rocauc(labels: np.ndarray[Any, Any], scores: np.ndarray[Any, Any]) -> float:
    """What ``ogb.nodeproppred.Evaluator`` computes for ogbn-proteins, in its words."""
    areas = []
    for i in range(labels.shape[1]):
        if np.sum(labels[:, i] == 1) > 0 and np.sum(labels[:, i] == 0) > 0:
            is_labeled = labels[:, i] == labels[:, i]
            areas.append(metrics.roc_auc_score(labels[is_labeled, i], scores[is_labeled, i]))
    return float(sum(areas) / len(areas))


def test_mean_roc_auc_is_ogbs_where_labels_are_missing() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(2, size=(50, 5)).astype(float)
    labels[draw.random(labels.shape) < 0.2] = np.nan
    labels[:, 3] = 1.0  # one class only: left out
    scores = draw.random(labels.shape)
    ours = mean_roc_auc(torch.from_numpy(scores), torch.from_numpy(labels))
    assert ours == pytest.approx(ogb_rocauc(labels, scores), abs=1e-12)
    assert mean_roc_auc(torch.zeros(2, 1), torch.ones(2, 1)) is None


def test_micro_f1_equals_sklearns_and_adds_up_over_ranks() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(30, 5, generator=draw)
    labels = (torch.rand(30, 5, generator=draw) < 0.3).float()
    masks = torch.stack([torch.arange(30) % 3 == i for i in range(3)])
    task = MultiLabel()
    parts = [
        task.tally(scores[rows], Targets(labels[rows], masks[:, rows]))
        for rows in (slice(0, 11), slice(11, 30))
    ]
    found = task.figures(parts[0] + parts[1])
    for split, mask in zip(("train", "val", "test"), masks, strict=True):
        wanted = metrics.f1_score(labels[mask], scores[mask] > 0, average="micro")
        assert found[split] == pytest.approx(wanted, abs=1e-12)
    assert task.figures(torch.zeros(3, 3))["val"] is None


def test_r2_equals_sklearns_and_adds_up_over_ranks() -> None:
    draw = np.random.default_rng(0)
    y, scores = draw.random((30, 3)), torch.from_numpy(draw.random((30, 3)))
    masks = torch.ones(3, 30, dtype=torch.bool)
    masks[2] = False
    task = Regression(3)
    parts = [
        task.tally(scores[rows], Targets(torch.from_numpy(y)[rows], masks[:, rows]))
        for rows in (slice(0, 7), slice(7, 30))
    ]
    found = task.figures(parts[0] + parts[1])
    assert found["train"] == pytest.approx(metrics.r2_score(y, scores.numpy()), abs=1e-12)
    assert found["test"] is None


def test_class_weights_are_torchs_weighted_mean() -> None:
    graph = woven()
    weight = [1.0, 2.5, 0.5]
    task = make_task("auto", graph, class_weight=weight)
    labels = task.labels_of(graph.labels, torch.empty(0))
    train = torch.from_numpy(graph.train_mask) & (labels >= 0)
    scores = torch.randn(graph.num_nodes, 3, dtype=torch.float64, requires_grad=True)
    loss, gradient = task.loss(scores, labels, train, total=task.normaliser(graph))
    wanted = functional.cross_entropy(
        scores[train], labels[train], torch.tensor(weight, dtype=torch.float64)
    )
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, scores)[0])


def test_balanced_weights_give_every_class_the_same_sum() -> None:
    graph = woven()
    task = make_task("auto", graph, class_weight="balanced")
    assert isinstance(task, SingleLabel)
    assert task.class_weight is not None
    train = graph.labels[graph.train_mask & (graph.labels >= 0)]
    counts = torch.from_numpy(np.bincount(train, minlength=3)).double()
    present = counts > 0
    sums = (counts * task.class_weight)[present]
    torch.testing.assert_close(sums, torch.full_like(sums, len(train) / int(present.sum())))
    assert task.normaliser(graph) == pytest.approx(len(train))


def several_labels(*, has_unknown: bool = True) -> Graph:
    graph = woven()
    draw = np.random.default_rng(1)
    labels = draw.integers(2, size=(graph.num_nodes, NUM_TASKS))
    if has_unknown:
        labels[draw.random(labels.shape) < 0.2] = -1
    return replace(graph, labels=labels, num_classes=NUM_TASKS)


def real_targets() -> Graph:
    graph = woven()
    draw = np.random.default_rng(1)
    labels = draw.standard_normal((graph.num_nodes, 2)).astype(np.float32)
    labels[draw.random(labels.shape) < 0.1] = np.nan
    return replace(graph, labels=labels, num_classes=2)


TASKS: dict[str, tuple[Callable[[], Graph], dict[str, Any]]] = {
    "multi_label": (several_labels, {}),
    "multi_task_auc": (several_labels, {"kind": "multi_task_auc"}),
    "regression": (real_targets, {}),
    "weighted": (woven, {"class_weight": [1.0, 2.0, 3.0]}),
    "balanced": (woven, {"class_weight": "balanced"}),
}


def configured(task: dict[str, Any], **changes: Any) -> Config:
    return from_dict({**to_dict(settings("gcn", **changes)), "task": task})


@pytest.mark.parametrize("name", TASKS)
def test_one_chunk_equals_the_reference(name: str) -> None:
    make, task = TASKS[name]
    graph, config = make(), configured(task, virtual_stages=2)
    graph.validate()
    run, plain = pipeline(graph, config), reference(graph, config)
    assert losses(run, 5) == pytest.approx(losses(plain, 5), rel=0, abs=1e-9)
    for split, figure in plain.evaluate().items():
        assert run.evaluate()[split] == pytest.approx(figure, rel=0, abs=1e-9)


@pytest.mark.parametrize("name", TASKS)
def test_losses_do_not_depend_on_the_stages(name: str) -> None:
    make, task = TASKS[name]
    graph = make()
    one, three = (
        pipeline(graph, configured(task, virtual_stages=v), striped(graph, 4)) for v in (1, 3)
    )
    assert losses(one, 3) == losses(three, 3)
    assert one.evaluate() == three.evaluate()
    weights = weights_of(three)
    assert all(torch.equal(weight, weights[key]) for key, weight in weights_of(one).items())


def test_auto_follows_the_labels() -> None:
    kinds = [
        make_task("auto", graph).kind for graph in (woven(), several_labels(), real_targets())
    ]
    assert kinds == ["single_label", "multi_label", "regression"]
    assert isinstance(make_task("multi_task_auc", several_labels()), MultiTaskAuc)


def test_tasks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="`task.kind` .=multi_label. must be single_label"):
        make_task("multi_label", woven())
    with pytest.raises(UserError, match="must be multi_label or multi_task_auc"):
        make_task("regression", several_labels())
    with pytest.raises(UserError, match="goes with single_label only"):
        make_task("auto", several_labels(), class_weight="balanced")
    with pytest.raises(UserError, match="must hold 3 numbers above 0"):
        make_task("auto", woven(), class_weight=[1.0, 0.0, 1.0])
