"""Histories and the gradient factor over whole steps: the published method, written by hand."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from by_hand import ByHand, Epoch, Tables, Weights, exact
from drawn import graph_of, woven
from one_process import (
    MODELS,
    gradients_of,
    losses,
    one_layer_model,
    pipeline,
    reference,
    settings,
    striped,
    tables_of,
    weights_of,
)
from torch import Tensor

from gnnpipe.config import Config
from gnnpipe.graph import Graph
from gnnpipe.models.io import InputLayer, OutputLayer
from gnnpipe.models.layer import GraphView, Layer, Operator
from gnnpipe.order import chunk_order

# --- exact histories make the forward exact


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_first_forward_from_exact_histories_is_exact(name: str, period: int) -> None:
    graph = woven(is_directed=True)
    config = settings(name, dropout=0.0, period=period, virtual_stages=2)
    plain = reference(graph, config).train_epoch(1)
    run = pipeline(graph, config, striped(graph, 4))
    assert run.train_epoch(1) == pytest.approx(plain, rel=0, abs=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_first_forward_from_zeros_is_not(name: str) -> None:
    graph, config = woven(), settings(name, dropout=0.0, warm_start="zeros")
    run = pipeline(graph, config, striped(graph, 4))
    assert all(not table.values.any() for table in tables_of(run).values())
    assert abs(run.train_epoch(1) - reference(graph, config).train_epoch(1)) > 1e-4


# --- whole epochs as the method has them


def by_the_method(
    graph: Graph, config: Config, weights: Weights, chunk_id: Sequence[int], num_epochs: int
) -> list[float]:
    """Losses of GNNPipe's published loop, its epochs ``e`` counted from 0; trains ``weights``.

    A are the tables, H the frozen snapshot: restored at the start of every epoch but each P-th,
    taken at the end of each P-th.
    """
    P, C = config.history.period, max(chunk_id) + 1
    hand = ByHand(graph, config.model.name, num_layers=config.model.num_layers)
    A: Tables = {}
    if config.history.warm_start == "exact":
        hand.logits(weights, {}, exact(chunk_id))
        A = hand.tables
    H = dict(A)
    adam = torch.optim.Adam(weights.values(), lr=0.01, weight_decay=5e-4, foreach=False)
    result = []
    for e in range(num_epochs):
        if e % P != 0:
            A = dict(H)
        order = chunk_order(config.seed, e + 1, C, kind="shuffled")
        epoch = Epoch(chunk_id, order, 2.0, (config.seed, e + 1), config.model.dropout)
        loss = hand.loss(weights, A, epoch)
        A = hand.tables
        if (e + 1) % P == 0:
            H = dict(A)
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        result.append(float(loss.detach()))
    return result


@pytest.mark.parametrize("warm_start", ["exact", "zeros"])
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("name", ["gcn", "gat", "gcnii"])
def test_epochs_equal_the_method_written_by_hand(name: str, period: int, warm_start: str) -> None:
    graph = woven(is_directed=True, is_weighted=name != "gat")
    config = settings(name, period=period, warm_start=warm_start, dropout=0.3, strata=0)
    chunk_id = striped(graph, 4)
    run = pipeline(graph, config, chunk_id)
    weights = {key: weight.requires_grad_() for key, weight in weights_of(run).items()}
    expected = by_the_method(graph, config, weights, chunk_id, 7)
    assert losses(run, 7) == pytest.approx(expected, rel=0, abs=1e-10)
    for key, weight in weights_of(run).items():
        torch.testing.assert_close(weight, weights[key].detach(), rtol=0, atol=1e-9, msg=key)


@pytest.mark.parametrize(
    ("warm_start", "seen"),
    [
        # epoch     1        2        3        4   5   6   7
        ("zeros", ["zero", "zero", "zero", "3", "3", "3", "6"]),
        ("exact", ["warm", "warm", "warm", "3", "3", "3", "6"]),
    ],
)
def test_period_freezes_histories(warm_start: str, seen: list[str]) -> None:
    graph = woven()
    run = pipeline(graph, settings(period=3, warm_start=warm_start), striped(graph, 4))
    (stage,) = run.engine.stages.values()
    table = tables_of(run)[2]
    known = {"zero": torch.zeros_like(table.values), "warm": table.values.clone()}
    for epoch, expected in enumerate(seen, start=1):
        stage.start_epoch(epoch)  # once more is harmless
        assert torch.equal(table.values, known[expected]), epoch
        run.train_epoch(epoch)
        known[str(epoch)] = table.values.clone()
    assert len({value.sum().item() for value in known.values()}) == (9 if seen[0] == "warm" else 8)


# --- the factor on gradients between chunks


def averaged_gradients(
    graph: Graph,
    chunk_id: Sequence[int],
    make_layers: Callable[[], list[Layer]],
    orders: Sequence[Sequence[int]],
) -> dict[str, Tensor]:
    """Mean gradients of a first step from exact histories, with factor 2, over chunk orders."""
    total: dict[str, Tensor] = {}
    for order in orders:
        run = pipeline(graph, settings(dropout=0.0, strata=0), chunk_id, layers=make_layers())
        run.engine.train_step(1, order)
        for key, gradient in gradients_of(run).items():
            total[key] = total.get(key, torch.zeros_like(gradient)) + gradient / len(orders)
    return total


@pytest.mark.parametrize("num_chunks", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_single_crossings_average_to_the_exact_gradient(name: str, num_chunks: int) -> None:
    graph = woven(is_directed=True)
    make_layers = partial(one_layer_model, name)
    chunk_id, orders = striped(graph, num_chunks), list(permutations(range(num_chunks)))
    plain = averaged_gradients(graph, striped(graph, 1), make_layers, [[0]])
    mean = averaged_gradients(graph, chunk_id, make_layers, orders)
    one = averaged_gradients(graph, chunk_id, make_layers, orders[:1])
    assert mean.keys() == plain.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(mean[key], gradient, rtol=1e-10, atol=1e-12, msg=key)
    assert not torch.allclose(one["layers.0.lin.weight"], plain["layers.0.lin.weight"], rtol=1e-3)


class Sum(Layer):
    """Nothing but the sum over the in-neighbours."""

    operator: Operator = "sum"
    in_channels = out_channels = table_channels = 2

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        return graph.aggregate(x)

    def reset_parameters(self) -> None:
        pass

    def cost(self, num_nodes: int, num_edges: int) -> float:
        return 1.0


class Pick(Sum):
    """The same sum through ``gather``."""

    operator: Operator = "edges"

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        rows, (source, target) = graph.gather(x)
        return torch.zeros_like(x).index_add(0, target, rows[source])


def sums(kind: type[Layer]) -> list[Layer]:
    with torch.device("meta"):
        return [InputLayer(2, 2), kind(), kind(), OutputLayer(2, 2)]


def share_of_exact_gradient(
    graph: Graph, chunk_id: list[int], kind: type[Layer], orders: Sequence[Sequence[int]]
) -> float:
    """Mean gradient of the first weight over orders, as a multiple of the exact one."""
    name = "layers.0.lin.weight"
    make_layers = partial(sums, kind)
    plain = averaged_gradients(graph, [0] * graph.num_nodes, make_layers, [[0]])[name]
    mean = averaged_gradients(graph, chunk_id, make_layers, orders)[name]
    at = plain.abs().argmax()
    share = float(mean.flatten()[at] / plain.flatten()[at])
    torch.testing.assert_close(mean, share * plain)
    return share


def only_trains(num_nodes: int, node: int, edges: list[tuple[int, int]]) -> Graph:
    rows = np.random.default_rng(5).random((num_nodes, 2)).astype(np.float32)
    return graph_of(num_nodes, edges, features=rows, train_mask=np.arange(num_nodes) == node)


@pytest.mark.parametrize("kind", [Sum, Pick])
def test_double_crossings_average_to_two_thirds(kind: type[Layer]) -> None:
    # 0 -> 1 -> 2, each its own chunk: fresh twice in one order of six, then times 2 * 2.
    chain = only_trains(3, 2, [(0, 1), (1, 2)])
    orders = list(permutations(range(3)))
    assert share_of_exact_gradient(chain, [0, 1, 2], kind, orders) == pytest.approx(2 / 3)
    assert share_of_exact_gradient(chain, [0, 1, 2], kind, [[0, 1, 2]]) == pytest.approx(4.0)
    assert share_of_exact_gradient(chain, [0, 0, 1], kind, [[0, 1]]) == pytest.approx(2.0)
    assert share_of_exact_gradient(chain, [0, 0, 1], kind, [[1, 0]]) == 0.0


@pytest.mark.parametrize("kind", [Sum, Pick])
def test_leaving_a_chunk_and_coming_back_has_no_gradient(kind: type[Layer]) -> None:
    # 0 <-> 1 in two chunks: whichever comes first, one of the two crossings is historical.
    pair = only_trains(2, 0, [(0, 1), (1, 0)])
    for order in ([0, 1], [1, 0]):
        assert share_of_exact_gradient(pair, [0, 1], kind, [order]) == 0.0
