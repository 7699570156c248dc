"""Norms over nodes: torch's own with one chunk, and what is fresh of which chunk with several."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_geometric.nn as pyg
from combinations import (
    both_ways,
    largest_difference,
    save_partition,
    train_all,
    write_npz,
)
from drawn import woven
from hypothesis import given, settings
from hypothesis import strategies as st
from one_process import losses, pipeline, reference, striped, weights_of
from one_process import settings as configured
from process_pool import Job, ProcessPool
from resuming import forked, ring_run, write_ring
from resuming import losses as losses_of
from torch import Tensor, nn
from torch.nn import functional

from gnnpipe.config import Config, load_config
from gnnpipe.errors import UserError
from gnnpipe.inference import predict_run
from gnnpipe.interchange import to_pyg
from gnnpipe.models import OPTIONS
from gnnpipe.models.norm import GraphNorm, NodeNorm, make_norm
from gnnpipe.moments import Moments
from gnnpipe.order import chunk_order
from gnnpipe.pretrained import PretrainedModel, plain_model
from gnnpipe.trainer import Trainer

pytestmark = pytest.mark.timeout(250)

WIDTH = 3
NORMED = [name for name, options in OPTIONS.items() if "norm" in options]


def alone(numbers: Tensor) -> Tensor:
    """The sum over one way."""
    return numbers


def normed(name: str, norm: str, **changes: Any) -> Config:
    return configured(name, norm=norm, **changes)


# --- one norm


def one_chunk(kind: str, dtype: torch.dtype) -> tuple[NodeNorm, nn.Module, Moments]:
    """A norm with weights that are not the plain ones, torch's or PyG's twin, what it knows."""
    norm = make_norm("batch" if kind == "batch" else "graph", WIDTH)
    assert isinstance(norm, NodeNorm)
    twin: nn.Module = nn.BatchNorm1d(WIDTH) if kind == "batch" else pyg.GraphNorm(WIDTH)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in norm.parameters():
            weight.copy_(torch.rand(WIDTH, generator=generator) + 0.5)
    twin.load_state_dict(norm.state_dict())
    norm, twin = norm.to(dtype), twin.to(dtype)
    return norm, twin, Moments("norm", norm, num_chunks=1, add_up=alone)


@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("kind", ["batch", "graph"])
def test_one_chunk_equals_torchs_norm(
    kind: str, dtype: torch.dtype, tolerance: float, shift: float
) -> None:
    norm, twin, moments = one_chunk(kind, dtype)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        rows = torch.randn(40, WIDTH, generator=generator).to(dtype) + shift
        slope = torch.randn(40, WIDTH, generator=generator).to(dtype)
        ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
        out, wanted = moments.train(ours, 0), twin(theirs)
        torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
        norm.zero_grad()
        twin.zero_grad()
        torch.autograd.backward(out, slope)
        torch.autograd.backward(wanted, slope)
        pairs = [(ours.grad, theirs.grad)]
        pairs += [(norm.get_parameter(k).grad, p.grad) for k, p in twin.named_parameters()]
        for ours_grad, theirs_grad in pairs:
            torch.testing.assert_close(ours_grad, theirs_grad, rtol=tolerance, atol=40 * tolerance)
        moments.end_step()
        for key, value in twin.state_dict().items():
            torch.testing.assert_close(norm.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Rows of each chunk, and the order of each epoch."""
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    orders = st.permutations(range(len(sizes)))
    return sizes, draw(st.lists(orders, min_size=1, max_size=3))


@settings(max_examples=60, deadline=None)
@given(shapes(), st.sampled_from(["batch", "graph"]), st.booleans())
def test_a_chunk_is_normalised_by_itself_the_earlier_and_the_last_known_others(
    shape: tuple[list[int], list[list[int]]], kind: str, is_warm: bool
) -> None:
    sizes, orders = shape
    norm, _, moments = one_chunk(kind, torch.float64)
    moments.sums = moments.sums.new_zeros((len(sizes), 2 * WIDTH + 1))
    generator = torch.Generator().manual_seed(len(sizes))
    known: dict[int, Tensor] = {}
    ends = np.cumsum([0, *sizes])
    if is_warm:
        rows = torch.randn(int(ends[-1]), WIDTH, generator=generator).double()
        moments.warmed = [slice(int(a), int(b)) for a, b in pairwise(ends)]
        known = {c: rows[part] for c, part in enumerate(moments.warmed)}
        expect(norm, known, moments.infer(rows), list(known))
    for order in orders:
        for chunk in order:
            rows = torch.randn(sizes[chunk], WIDTH, generator=generator).double()
            own = rows.clone().requires_grad_()
            out = moments.train(own, chunk)
            known[chunk] = rows.clone().requires_grad_()
            wanted = expect(norm, known, out, [chunk])
            slope = torch.randn(out.shape, generator=generator).double()
            (by_hand,) = torch.autograd.grad(wanted, known[chunk], slope)
            (found,) = torch.autograd.grad(out, own, slope)
            torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-9)
            known[chunk] = rows
            again = moments.train(rows, chunk)  # a forward that is run again
            assert torch.equal(again.detach(), out.detach())
        before = {key: value.clone() for key, value in norm.state_dict().items()}
        moments.end_step()
        if kind == "batch":
            total = torch.cat(list(known.values()))
            wanted = 0.9 * before["running_mean"] + 0.1 * (
                total.mean(dim=0) if len(total) else torch.zeros(WIDTH)
            )
            torch.testing.assert_close(norm.state_dict()["running_mean"], wanted)
            assert norm.state_dict()["num_batches_tracked"] == before["num_batches_tracked"] + 1


def expect(norm: NodeNorm, known: dict[int, Tensor], out: Tensor, chunks: Sequence[int]) -> Tensor:
    """The chunks' rows as torch normalises everything that is known at once."""
    total = torch.cat(list(known.values()))
    places = torch.cat([torch.full((len(rows),), key) for key, rows in known.items()])
    centre = total.mean(dim=0) if len(total) else torch.zeros(WIDTH).double()
    if isinstance(norm, GraphNorm):
        centre = centre * norm.mean_scale.detach()
    c = total - centre
    var = (total - total.mean(dim=0)).square() if norm_is_batch(norm) else c.square()
    y = norm.weight.detach() * c / (var.mean(dim=0) + norm.eps).sqrt() + norm.bias.detach()
    wanted = torch.cat([y[places == key] for key in chunks])
    torch.testing.assert_close(out.detach(), wanted.detach(), rtol=0, atol=1e-9)
    return wanted


def norm_is_batch(norm: NodeNorm) -> bool:
    return isinstance(norm, nn.BatchNorm1d)


# --- models


@pytest.mark.parametrize("norm", ["batch", "graph"])
@pytest.mark.parametrize("name", NORMED)
def test_one_chunk_equals_the_plain_loop(name: str, norm: str) -> None:
    # Decay would feed rounding to biases before a norm: Adam makes much of a gradient of nothing.
    graph, config = woven(is_directed=True), normed(name, norm, weight_decay=0.0)
    run, plain = (make(graph, config) for make in (pipeline, reference))
    assert losses(run, 4) == pytest.approx(losses(plain, 4), rel=0, abs=1e-10)
    ours, theirs = weights_of(run), weights_of(plain)
    assert ours.keys() == theirs.keys()
    assert any(key.endswith("running_var") for key in ours) == (norm == "batch")
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=1e-7, msg=key)
    assert run.evaluate() == plain.evaluate()


@pytest.mark.parametrize("norm", ["batch", "graph"])
@pytest.mark.parametrize("changes", [{}, {"steps_per_epoch": 2}, {"warm_start": "zeros"}])
def test_losses_do_not_depend_on_the_stages(norm: str, changes: dict[str, Any]) -> None:
    graph = woven(is_directed=True)
    results = []
    for stages in (1, 2, 5):
        config = normed("gcnii", norm, dtype="float32", virtual_stages=stages, **changes)
        run = pipeline(graph, config, striped(graph, 4))
        results.append((losses(run, 5), weights_of(run), run.evaluate()))
    for found, weights, accuracy in results[1:]:
        assert (found, accuracy) == (results[0][0], results[0][2])
        assert all(torch.equal(weights[key], value) for key, value in results[0][1].items())


def test_layers_of_a_run_see_fresh_and_last_epochs_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Moments, int, Tensor, Tensor]] = []
    train: Callable[..., Tensor] = Moments.train

    def spy(self: Moments, x: Tensor, chunk: int) -> Tensor:
        out = train(self, x, chunk)
        calls.append((self, chunk, x.detach().clone(), out.detach().clone()))
        return out

    monkeypatch.setattr(Moments, "train", spy)
    graph = woven(is_directed=True)
    config = normed("gcn", "batch", warm_start="zeros", num_layers=2, steps_per_epoch=2)
    losses(pipeline(graph, config, striped(graph, 4)), 3)
    orders = [chunk_order(config.seed, epoch, 4, kind="shuffled") for epoch in (1, 2, 3)]
    assert [chunk for _, chunk, _, _ in calls[::2]] == [c for order in orders for c in order]
    known: dict[Moments, dict[int, Tensor]] = {}
    for moments, chunk, rows, out in calls:
        known.setdefault(moments, {})[chunk] = rows
        total = torch.cat([rows, *(r for c, r in known[moments].items() if c != chunk)])
        plain = functional.batch_norm(total, None, None, training=True)[: len(rows)]
        for ours, theirs in zip(out.T, plain.T, strict=True):  # up to the column's line
            line = torch.stack((theirs, torch.ones_like(theirs)), dim=1)
            fitted = line @ torch.linalg.lstsq(line, ours.unsqueeze(1)).solution
            torch.testing.assert_close(fitted.squeeze(1), ours, rtol=0, atol=1e-9)
    assert [len(chunks) for chunks in known.values()] == [4, 4]


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize(("name", "norm"), [("gcnii", "batch"), ("resgcn+", "graph")])
def test_forwards_that_run_again_change_no_bit(name: str, norm: str, num_chunks: int) -> None:
    graph, results = woven(is_directed=True), []
    for mode in ("keep", "recompute"):
        config = normed(name, norm, dtype="float32", steps_per_epoch=min(2, num_chunks), mode=mode)
        run = pipeline(graph, config, striped(graph, num_chunks))
        results.append((losses(run, 3), weights_of(run)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[1][1][key], value) for key, value in results[0][1].items())


def test_running_statistics_change_with_steps_only() -> None:
    graph = woven()
    run = pipeline(graph, normed("sage", "batch", steps_per_epoch=3), striped(graph, 6))
    assert {int(v) for k, v in weights_of(run).items() if k.endswith("tracked")} == {0}
    run.train_epoch(1)
    before = weights_of(run)
    run.evaluate()
    run.engine.infer(into_tables=True)
    after = weights_of(run)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {int(v) for k, v in after.items() if k.endswith("tracked")} == {3}


# --- ranks, checkpoints, export


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
