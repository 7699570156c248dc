"""The pipeline as a whole, in one process: what its numbers equal and what they depend on."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from by_hand import strata_of
from drawn import cut, graph_of, woven
from one_process import (
    MODELS,
    layers_of,
    losses,
    one_layer_model,
    pipeline,
    reference,
    settings,
    striped,
    tables_of,
    weights_of,
)

from gnnpipe.assembly import initialise
from gnnpipe.config import Config
from gnnpipe.engine import Cut, Engine, cut_before, cuts_of
from gnnpipe.graph import Graph
from gnnpipe.models import build_layers
from gnnpipe.order import chunk_order
from gnnpipe.runs import PipelineRun
from gnnpipe.state import named_state

# --- one chunk is exact full-graph training


def check_equals_reference(graph: Graph, config: Config, *, epochs: int = 20) -> None:
    run, plain = pipeline(graph, config), reference(graph, config)
    assert losses(run, epochs) == pytest.approx(losses(plain, epochs), rel=0, abs=1e-9)
    for key, weight in weights_of(plain).items():
        torch.testing.assert_close(weights_of(run)[key], weight, rtol=0, atol=1e-9, msg=key)
    assert run.evaluate() == plain.evaluate()


@pytest.mark.parametrize("is_directed", [False, True])
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_one_chunk_equals_full_graph(name: str, is_sparse: bool, is_directed: bool) -> None:
    graph = woven(is_sparse=is_sparse, is_directed=is_directed)
    check_equals_reference(graph, settings(name, virtual_stages=1 if is_directed else 3))


@pytest.mark.parametrize("is_directed", [False, True])
@pytest.mark.parametrize("name", ["gcn", "gcnii"])
def test_one_chunk_equals_full_graph_with_edge_weights(name: str, is_directed: bool) -> None:
    graph = woven(is_weighted=True, is_directed=is_directed)
    assert graph.is_directed == is_directed
    check_equals_reference(graph, settings(name, virtual_stages=2))


@pytest.mark.parametrize("name", MODELS)
def test_one_chunk_equals_full_graph_in_single_precision(name: str) -> None:
    graph, config = woven(is_sparse=True), settings(name, dtype="float32", virtual_stages=2)
    run, plain = pipeline(graph, config), reference(graph, config)
    assert {p.dtype for p in weights_of(run).values()} == {torch.float32}
    assert losses(run, 5) == pytest.approx(losses(plain, 5), rel=0, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("edges", [[(0, 1), (0, 1), (1, 1), (2, 0), (2, 0), (2, 0)], []])
def test_parallel_edges_and_none_at_all_equal_full_graph(
    edges: list[tuple[int, int]], name: str
) -> None:
    rows = np.random.default_rng(0).random((6, 3)).astype(np.float32)
    check_equals_reference(graph_of(6, edges, features=rows), settings(name), epochs=4)


# --- what the numbers do not depend on


def compositions(total: int) -> list[list[int]]:
    """All ways to cut ``total`` layers into stages, such as [1, 3, 1]."""
    rest = [[first, *more] for first in range(1, total) for more in compositions(total - first)]
    return [[total], *rest]


@pytest.mark.parametrize("name", ["gat", "gcnii", "resgcn+"])
def test_losses_and_weights_are_bit_equal_for_every_cut_into_stages(name: str) -> None:
    graph = woven(is_directed=True)
    outcomes = []
    for sizes in compositions(5):
        config = settings(name, dtype="float32", virtual_stages=len(sizes), layers_per_stage=sizes)
        run = pipeline(graph, config, striped(graph, 3))
        assert [len(stage.layers) for stage in run.engine.stages.values()] == sizes
        outcomes.append((losses(run, 3), weights_of(run)))
    assert len(outcomes) == 16
    for other, weights in outcomes[1:]:
        assert other == outcomes[0][0]
        assert all(torch.equal(weights[key], weight) for key, weight in outcomes[0][1].items())


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_bit_equal_for_any_number_of_virtual_stages(name: str) -> None:
    graph = woven()
    once, *others = (
        losses(pipeline(graph, settings(name, virtual_stages=v), striped(graph, 4)), 4)
        for v in (1, 2, 4, 5)
    )
    assert all(other == once for other in others)


def test_every_epoch_has_its_own_order_drawn_from_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[int]] = []
    train_step = Engine.train_step

    def spy(self: Engine, epoch: int, order: Sequence[int], **how: bool) -> float:
        seen.append(list(order))
        return train_step(self, epoch, order, **how)

    monkeypatch.setattr(Engine, "train_step", spy)
    graph = woven()
    run = pipeline(graph, settings(seed=3), striped(graph, 6))
    torch.manual_seed(99)  # no generator's state takes part
    losses(run, 4)
    assert seen == [chunk_order(3, epoch, 6, kind="shuffled") for epoch in (1, 2, 3, 4)]
    assert len({tuple(order) for order in seen}) == 4
    seen.clear()
    losses(pipeline(graph, settings(seed=3, order="fixed"), striped(graph, 6)), 2)
    assert seen == [[0, 1, 2, 3, 4, 5]] * 2


def test_two_runs_are_bit_equal_and_another_seed_is_not() -> None:
    graph = woven()
    torch.manual_seed(1)
    once = losses(pipeline(graph, settings("gat"), striped(graph, 4)), 5)
    torch.manual_seed(2)
    assert losses(pipeline(graph, settings("gat"), striped(graph, 4)), 5) == once
    other = losses(pipeline(graph, settings("gat", seed=8), striped(graph, 4)), 5)
    assert all(a != b for a, b in zip(once, other, strict=True))


def test_initial_weights_depend_on_seed_and_layer_index_only() -> None:
    graph, small = woven(), woven(12, is_sparse=True)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    weights = weights_of(pipeline(graph, settings("gcnii"), striped(graph, 4)))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    deep = settings("gcnii", num_layers=6, virtual_stages=4, dropout=0.1)
    others = weights_of(pipeline(small, deep, striped(small, 2)))
    shared = [f"layers.{i}.weight1" for i in (1, 2, 3)]
    for key in ["layers.0.lin.weight", "layers.0.lin.bias", *shared]:
        assert torch.equal(others[key], weights[key]), key
    assert not torch.equal(weights[shared[0]], weights[shared[1]])
    plain = weights_of(reference(graph, settings("gcnii")))
    assert all(torch.equal(plain[key], weight) for key, weight in weights.items())
    reseeded = weights_of(pipeline(graph, settings("gcnii", seed=8)))
    assert not any(torch.equal(reseeded[key], weights[key]) for key in shared)


def test_layers_with_weights_of_their_own_are_taken_as_they_are() -> None:
    graph, config = woven(), settings(num_layers=1)
    layers = [
        initialise(layer, seed=1234, index=index, like=torch.empty(0, dtype=torch.float64))
        for index, layer in enumerate(one_layer_model("gcn"))
    ]
    before = {key: value.clone() for key, value in named_state(list(enumerate(layers))).items()}
    run = pipeline(graph, config, layers=layers)
    assert all(torch.equal(weights_of(run)[key], value) for key, value in before.items())
    losses(run, 1)
    assert torch.equal(
        layers[0].get_parameter("lin.weight"), weights_of(run)["layers.0.lin.weight"]
    )
    assert not torch.equal(before["layers.0.lin.weight"], weights_of(run)["layers.0.lin.weight"])


# --- evaluation


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_exact_in_any_number_of_chunks(name: str) -> None:
    graph, config = woven(is_directed=True), settings(name, virtual_stages=3)
    run, plain = pipeline(graph, config, striped(graph, 4)), reference(graph, config)
    losses(run, 3)
    for key, weight in named_state(list(enumerate(plain.layers))).items():
        weight.copy_(weights_of(run)[key])
    logits = run.engine.infer()
    node_id = torch.from_numpy(cut(graph, striped(graph, 4)).node_id)
    expected = plain.reference.evaluate()
    assert logits is not None
    torch.testing.assert_close(logits, expected[node_id], rtol=1e-9, atol=1e-10)
    assert run.evaluate() == plain.evaluate()


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("name", ["gat", "gcnii"])
def test_evaluation_changes_no_later_number(name: str, period: int) -> None:
    graph, config = woven(), settings(name, period=period)
    undisturbed = losses(pipeline(graph, config, striped(graph, 4)), 6)
    run = pipeline(graph, config, striped(graph, 4))
    evaluated = []
    for epoch in range(1, 7):
        evaluated.append(run.train_epoch(epoch))
        before = {index: table.values.clone() for index, table in tables_of(run).items()}
        assert run.evaluate() == run.evaluate()
        after = tables_of(run)
        assert all(torch.equal(after[index].values, values) for index, values in before.items())
    assert evaluated == undisturbed


def test_accuracy_counts_labelled_nodes_of_each_split() -> None:
    graph, config = woven(), settings()
    run = pipeline(graph, config, striped(graph, 4))
    logits = run.engine.infer()
    chunked = cut(graph, striped(graph, 4))
    assert logits is not None
    right = (logits.argmax(1).numpy() == chunked.labels) & (chunked.labels >= 0)
    for split, mask in (("train", chunked.train_mask), ("val", chunked.val_mask)):
        total = (mask & (chunked.labels >= 0)).sum()
        assert total > 0
        assert run.evaluate()[split] == (right & mask).sum() / total


def test_a_split_without_labelled_nodes_has_no_accuracy() -> None:
    graph = graph_of(6, [(0, 1)], test_mask=np.zeros(6, bool), features=np.ones((6, 2)))
    assert pipeline(graph, settings(), [0, 1, 0, 1, 0, 1]).evaluate()["test"] is None


# --- what crosses a cut


def test_a_cut_carries_what_is_still_to_be_read() -> None:
    with torch.device("meta"):
        layers = build_layers(
            "gcnii",
            in_channels=5,
            hidden_channels=8,
            out_channels=3,
            num_layers=2,
            dropout=0.0,
            options={},
        )
    with_h0 = Cut(8, (("h0", 8),))
    assert [cut_before(layers, at) for at in (1, 2, 3)] == [with_h0, with_h0, Cut(8, ())]
    assert with_h0.items("F") == with_h0.items("B") == [(None, 8), ("h0", 8)]
    # Two ranks, four stages of a layer: the first has what it wrote, the second what it read.
    once = with_h0._replace(held=("h0",))
    assert cuts_of(layers, [0, 1, 2, 3, 4], num_ranks=2) == [None, with_h0, once, Cut(8, ())]
    assert once.items("F") == [(None, 8)]
    assert once.items("B") == with_h0.items("B")


def test_layers_with_one_operator_share_their_cells() -> None:
    graph = woven()
    run = pipeline(graph, settings("sage"), striped(graph, 3))
    cells = [local.cells for local in layers_of(run)]
    assert cells[1] is cells[2] is cells[3]
    assert cells[0] is cells[4]


def table_bytes_of(run: PipelineRun) -> list[int]:
    return [table.num_bytes for table in tables_of(run).values()]


def test_tables_hold_values_gradients_and_one_snapshot() -> None:
    graph = woven()
    one = 24 * 8 * 8  # nodes x channels x bytes
    assert table_bytes_of(pipeline(graph, settings(strata=0), striped(graph, 3))) == [2 * one] * 3
    frozen = pipeline(graph, settings(period=3, strata=0), striped(graph, 3))
    assert table_bytes_of(frozen) == [3 * one] * 3
    assert frozen.table_bytes == 9 * one
    moved = pipeline(graph, settings(), striped(graph, 3))
    # Sums of three chunks, drift, debts, and what a chunk adds, of each stratum.
    sums = (3 + 3) * (1 + max(strata_of(graph))) * 8 * 8
    assert table_bytes_of(moved) == [2 * one + sums] * 3


# --- staleness


@pytest.mark.parametrize("period", [1, 3])
def test_staleness_is_the_relative_change_of_each_table(period: int) -> None:
    graph = woven()
    run = pipeline(graph, settings("gat", period=period, virtual_stages=2), striped(graph, 4))
    losses(run, 3)
    before = {index: table.values.clone() for index, table in tables_of(run).items()}
    run.train_epoch(4, is_measured=True)
    expected = [
        float((table.values - before[index]).norm() / table.values.norm())
        for index, table in tables_of(run).items()
    ]
    assert run.engine.staleness(5) == pytest.approx(expected, rel=1e-12)
    assert len(expected) == 3


def test_measuring_staleness_changes_no_number() -> None:
    graph = woven()
    run = pipeline(graph, settings("gcnii"), striped(graph, 4))
    measured = [run.train_epoch(epoch, is_measured=epoch % 2 == 1) for epoch in (1, 2, 3, 4)]
    assert measured == losses(pipeline(graph, settings("gcnii"), striped(graph, 4)), 4)
