"""Exact gradients in some epochs, and what they leave for those in between."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from combinations import (
    both_ways,
    differing,
    largest_difference,
    save_partition,
    train_all,
    write_npz,
)
from drawn import woven
from one_process import layers_of, losses, pipeline, settings, striped, weights_of
from process_pool import ProcessPool
from torch import Tensor, nn

from gnnpipe.config import from_dict, to_dict
from gnnpipe.correction import Correction
from gnnpipe.errors import UserError
from gnnpipe.follower import curves
from gnnpipe.links import link_graph
from gnnpipe.metrics import read_metrics
from gnnpipe.runs import PipelineRun

PLAIN = {"cross_chunk_gradient": 1.0}


def gradients_of(run: PipelineRun) -> dict[str, Tensor]:
    return {
        f"{local.layer_index}.{name}": parameter.grad.clone()
        for local in layers_of(run)
        for name, parameter in local.layer.named_parameters()
        if parameter.grad is not None
    }


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- exact gradients


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("gcn", "sage", "gin", "gat", "gcnii", "resgcn+", "jknet")),
        ("gcnii", {"mode": "recompute"}),
        ("gat", {"mode": "recompute"}),
        ("gcnii", {"virtual_stages": 2}),
        ("gcnii", {"order_of_actions": "split_backward"}),
        ("gcnii", {"late_gradient": 1.0, "late_gradient_momentum": 0.5}),
        ("gcnii", {"keeps_dropout": False, "history_momentum": 0.3}),
        ("gcnii", {"period": 3}),
    ],
)
def test_corrected_in_every_epoch_weights_are_those_of_full_graph_training(
    name: str, options: dict[str, Any]
) -> None:
    graph = woven(is_directed=True)
    exact = pipeline(graph, settings(name))
    run, plain = (
        pipeline(graph, settings(name, correct_every=every, **options), striped(graph, 4))
        for every in (1, None)
    )
    wanted, found = losses(exact, 5), losses(run, 5)
    assert gap(weights_of(run), weights_of(exact)) < 1e-10
    # The epochs themselves read histories all the same.
    assert found != pytest.approx(wanted)
    losses(plain, 5)
    assert gap(weights_of(plain), weights_of(exact)) > 1e-4


def test_links_have_exact_gradients_too() -> None:
    graph = link_graph(woven(), channels=8)
    config = from_dict({**to_dict(settings("gcn", correct_every=1)), "task": {"kind": "link"}})
    exact, run = pipeline(graph, config), pipeline(graph, config, striped(graph, 4))
    losses(exact, 4)
    losses(run, 4)
    assert gap(weights_of(run), weights_of(exact)) < 1e-10


def test_one_chunk_needs_no_correction() -> None:
    graph = woven()
    run, plain = (pipeline(graph, settings("gcn", correct_every=n)) for n in (1, None))
    assert run.correction is None
    assert losses(run, 3) == losses(plain, 3)


def test_an_exact_gradient_is_no_part_of_the_staleness() -> None:
    graph = woven()
    found = []
    for every in (1, None):
        config = settings("gcnii", correct_every=every, refresh_every=1)
        run = pipeline(graph, config, striped(graph, 4))
        run.train_epoch(1, is_measured=True)
        before = run.staleness()
        run.evaluate()
        assert run.staleness() == before
        found.append(before)
    assert found[0] == found[1] != [None] * 5


# --- what is kept in between


def corrected(every: int) -> tuple[Correction, Tensor]:
    layer = nn.Linear(3, 1, bias=False).double()
    correction = Correction([(2, layer)], num_layers=4, every=every, add_up=lambda sums: sums)
    return correction, layer.weight


def see(correction: Correction, weight: Tensor, found: Tensor, exact: Tensor) -> None:
    weight.grad = found.clone()
    correction.set_aside()
    assert not weight.grad.any()
    weight.grad += exact
    correction.take()
    assert torch.equal(weight.grad, exact)


def test_a_bias_that_stays_is_taken_away_and_another_is_left() -> None:
    g, bias = torch.randn(2, 1, 3, dtype=torch.float64)
    for factor, expected in ((1.0, 1.0), (2.0, 1.0), (0.25, 0.25), (0.0, 0.0), (-1.0, 0.0)):
        correction, weight = corrected(every=2)
        see(correction, weight, g, g + bias)
        assert correction.persistence == 0.0  # Nothing is known yet of how long it lasts.
        see(correction, weight, 3 * g, 3 * g + factor * bias)
        assert correction.persistence == pytest.approx(expected, abs=1e-12)
        weight.grad = g.clone()
        correction.apply(5)
        torch.testing.assert_close(weight.grad, g + expected**0.5 * factor * bias)


def test_persistence_is_the_least_squares_factor_of_pairs_of_differences() -> None:
    correction, weight = corrected(every=3)
    biases = torch.randn(6, 1, 3, dtype=torch.float64)
    for bias in biases:
        see(correction, weight, torch.ones(1, 3).double(), torch.ones(1, 3).double() + bias)
    pairs = [(a.flatten(), b.flatten()) for a, b in pairwise(biases)]
    weights = [0.5**age for age in range(5)][::-1]
    product = sum(w * float(a @ b) for w, (a, b) in zip(weights, pairs, strict=True))
    square = sum(w * float(a @ a) for w, (a, b) in zip(weights, pairs, strict=True))
    assert correction.persistence == pytest.approx(min(1.0, max(0.0, product / square)))


def test_a_bias_fades_with_its_age() -> None:
    correction, weight = corrected(every=4)
    zero, one = torch.zeros(1, 3).double(), torch.ones(1, 3).double()
    see(correction, weight, zero, 2 * one)
    see(correction, weight, zero, one)
    found = []
    for epoch in (9, 10, 11):
        weight.grad = zero.clone()
        correction.apply(epoch)
        found.append(float(weight.grad[0, 0]))
    assert found == pytest.approx([0.5**0.25, 0.5**0.5, 0.5**0.75])


def test_a_run_is_corrected_between_exact_gradients() -> None:
    # Weights stand still, and so does what an epoch lacks: the order of chunks is fixed.
    still: dict[str, Any] = {"lr": 1e-300, "dropout": 0.0, "order": "fixed", **PLAIN}
    graph = woven()
    exact = pipeline(graph, settings("gcnii", **still))
    run = pipeline(graph, settings("gcnii", correct_every=3, **still), striped(graph, 4))
    exact.train_epoch(1)
    wanted, is_exact = gradients_of(exact), []
    for epoch in range(1, 10):
        run.train_epoch(epoch)
        is_exact.append(gap(gradients_of(run), wanted) < 1e-12)
    assert is_exact == [False, False, True, False, False, *[True] * 4]


# --- ranks


def test_corrections_in_real_processes(pool: ProcessPool, tmp_path: Path) -> None:
    ring = [(i, (i + step) % 40) for i in range(40) for step in (1, 7)]
    graph = write_npz(tmp_path / "ring.npz", both_ways(ring), num_nodes=40)
    save_partition(graph, tmp_path / "ring", num_chunks=8, num_ways=2, method="random")
    run = [
        f"data.name={tmp_path / 'ring.npz'}",
        f"partition.path={tmp_path / 'ring'}",
        "partition.num_chunks=8",
        "model.num_layers=6",
        "model.hidden_channels=8",
        "model.dtype=float64",
        "model.dropout=0.2",
        "training.epochs=6",
        "history.correct_every=2",
    ]
    shapes = {"111": (1, 1, 1), "211": (2, 1, 1), "221": (2, 2, 1), "212": (2, 1, 2)}
    table = {
        name: [
            *run,
            f"model.name={model}",
            f"parallel.num_stages={s}",
            f"parallel.virtual_stages={v}",
            f"parallel.num_ways={w}",
        ]
        for model in ("gcnii", "gat")
        for name, (s, v, w) in ((f"{model}{key}", shape) for key, shape in shapes.items())
    }
    table["plain"] = [*table["gcnii111"], "history.correct_every=null"]
    results = train_all(pool, tmp_path / "runs", table)
    paths = [tmp_path / "runs" / name / "metrics.jsonl" for name in ("gcnii212", "plain")]
    lines = [read_metrics(path) for path in paths]
    found, without = ([line.get("persistence") for line in part] for part in lines)
    assert found[:-1] == [None] * 5
    shown = curves(lines[0][-1])["correction/persistence"]
    assert shown == found[-1]
    assert shown is not None
    assert 0.0 <= shown <= 1.0
    assert without == [None] * len(lines[1])
    for model in ("gcnii", "gat"):
        one = results[f"{model}111"]
        for name in ("211", "221"):
            assert differing(one, results[f"{model}{name}"]) == []
        assert largest_difference(one, results[f"{model}212"]) < 1e-9
    assert largest_difference(results["gcnii111"], results["plain"]) > 1e-6


# --- mistakes


def test_norms_of_columns_are_refused() -> None:
    for norm in ("batch", "graph"):
        config = settings("gcn", norm=norm, correct_every=2)
        with pytest.raises(UserError, match=r"`history.correct_every` \(=2\) must be null with"):
            pipeline(woven(), config, striped(woven(), 4))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("training", {"steps_per_epoch": 2}, r"`training.steps_per_epoch` 1 only, not with 2"),
        ("comm", {"gradient": "int8"}, r"`comm.gradient` fp32 only, not with int8"),
        ("kernels", {"cuda_graphs": True}, r"`kernels.cuda_graphs` false only, not with true"),
    ],
)
def test_what_does_not_go_together(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict({"history": {"correct_every": 5}, section: values})
    with pytest.raises(UserError, match=r"`history.correct_every` \(=0\) must be at least 1"):
        from_dict({"history": {"correct_every": 0}})
