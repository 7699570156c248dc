"""Norms over nodes: torch's own with one chunk, and what is fresh of which chunk with several."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch_geometric.nn as pyg
from drawn import woven
from hypothesis import given, settings
from hypothesis import strategies as st
from one_process import losses, pipeline, reference, striped, weights_of
from one_process import settings as configured
from torch import Tensor, nn
from torch.nn import functional

from gnnpipe.config import Config
from gnnpipe.models.norm import GraphNorm, NodeNorm, make_norm
from gnnpipe.moments import Moments
from gnnpipe.order import chunk_order
from gnnpipe.sections import MODEL_OPTIONS

WIDTH = 3
NORMED = [name for name, options in MODEL_OPTIONS.items() if "norm" in options]


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


@settings(max_examples=60)
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


@pytest.mark.parametrize("norm", ["batch", "graph"])
def test_after_the_exact_start_chunks_are_normalised_as_the_whole(norm: str) -> None:
    graph, results = woven(is_directed=True), []
    for num_chunks in (1, 4):  # while weights stand still
        config = normed("gcn", norm, dropout=0.0, lr=1e-30, weight_decay=0.0)
        run = pipeline(graph, config, striped(graph, num_chunks))
        results.append(losses(run, 2))
    assert results[1] == pytest.approx(results[0], rel=0, abs=1e-12)


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
