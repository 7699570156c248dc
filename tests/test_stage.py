"""One chunk through some layers: its gradients against the same forward written by hand."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import ByHand, Epoch, strata_of
from drawn import cut, graph_of, woven
from one_process import (
    gradients_of,
    layers_of,
    losses,
    pipeline,
    settings,
    striped,
    tables_of,
    weights_of,
)
from torch import Tensor

from gnnpipe.cell import Cells, build_cells
from gnnpipe.graph import Graph
from gnnpipe.models.io import InputLayer, OutputLayer
from gnnpipe.models.layer import GraphView, Layer
from gnnpipe.runs import PipelineRun
from gnnpipe.stage import Flow, Stage
from gnnpipe.view import View
from gnnpipe.way import way_graph

HAND_WRITTEN = ["gcn", "gat", "gcnii"]


def step_by_hand(
    run: PipelineRun, graph: Graph, name: str, epoch: Epoch
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step, read off the run's weights and tables before it."""
    weights = {key: weight.requires_grad_() for key, weight in weights_of(run).items()}
    node_id = torch.from_numpy(cut(graph, list(epoch.chunk_id)).node_id)
    history = {}
    for index, table in tables_of(run).items():
        history[index] = torch.empty_like(table.values)
        history[index][node_id] = table.values
    loss = ByHand(graph, name, num_layers=3).loss(weights, history, epoch)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return float(loss.detach()), dict(zip(weights, gradients, strict=True))


def check_step(
    graph: Graph,
    chunk_id: Sequence[int],
    *,
    name: str = "gcn",
    factor: float = 1.0,
    dropout: float = 0.0,
) -> None:
    """One step from random histories, in a random order, against the hand-written one."""
    config = settings(name, dropout=dropout, cross_chunk_gradient=factor)
    run = pipeline(graph, config, chunk_id)
    generator = torch.Generator().manual_seed(1)
    for table in tables_of(run).values():
        table.values.normal_(generator=generator)
        table.recount()
    order = torch.randperm(max(chunk_id) + 1, generator=generator).tolist()
    stream = (config.seed, 5) if dropout else None
    epoch = Epoch(chunk_id, order, factor, stream, dropout, strata_of(graph))
    loss, gradients = step_by_hand(run, graph, name, epoch)
    assert run.engine.train_step(5, order) == pytest.approx(loss, abs=1e-12)
    found = gradients_of(run)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("is_directed", [False, True])
@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_gradients_are_autograd_of_the_forward_that_ran(
    name: str, is_directed: bool, dropout: float
) -> None:
    graph = woven(is_directed=is_directed, is_weighted=name != "gat")
    check_step(graph, striped(graph, 4), name=name, dropout=dropout)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_factor_multiplies_gradients_of_fresh_edges_between_chunks(
    name: str, factor: float
) -> None:
    graph = woven(is_directed=True)
    check_step(graph, striped(graph, 4), name=name, dropout=0.3, factor=factor)


#  0 - 1 - 2   3 - 4   5    2 and 4 have self-loops, 5 is isolated; 0 and 3 train
ISLANDS = [(0, 1), (1, 2), (3, 4)]


def islands() -> Graph:
    edges = [*ISLANDS, *((b, a) for a, b in ISLANDS), (2, 2), (4, 4)]
    return graph_of(6, edges, features=np.eye(6, 3, dtype=np.float32) + 0.5)


@pytest.mark.parametrize("name", HAND_WRITTEN)
@pytest.mark.parametrize(
    "chunk_id",
    [
        pytest.param([0, 0, 0, 1, 1, 0], id="no edge between chunks"),
        pytest.param([0, 1, 1, 0, 0, 0], id="a chunk without training nodes"),
        pytest.param([0, 1, 0, 1, 0, 1], id="every edge between chunks"),
        pytest.param([0, 0, 0, 0, 0, 1], id="a chunk of one isolated node"),
        pytest.param([0, 0, 1, 0, 0, 0], id="a chunk of one node with a self-loop"),
        pytest.param([3, 1, 4, 0, 2, 5], id="every node a chunk"),
    ],
)
def test_odd_chunks_are_no_exception(chunk_id: list[int], name: str) -> None:
    check_step(islands(), chunk_id, name=name, factor=2.0, dropout=0.3)


# --- dropout


def cells_of(graph: Graph, chunk_id: list[int]) -> Cells:
    way = way_graph(cut(graph, chunk_id), way=0, num_ways=1)
    return build_cells(way, operator="edges_self", dtype=torch.float64, device=torch.device("cpu"))


def masks(graph: Graph, num_chunks: int) -> tuple[dict[int, list[float]], dict[object, object]]:
    """The second dropout mask of every node, and the third one's of every edge."""
    nodes: dict[int, list[float]] = {}
    edges: dict[object, object] = {}
    for cell in cells_of(graph, striped(graph, num_chunks)).chunks:
        view = View(cell, None, {}, key=(7, 1, 2))
        ones = torch.ones(cell.node_id.numel(), 9)
        view.dropout(ones, 0.5)
        nodes |= zip(cell.node_id.tolist(), view.dropout(ones, 0.5).tolist(), strict=True)
        assert cell.edges is not None
        source, target = cell.edges.source_id, cell.edges.target_id
        kept = view.edge_dropout(torch.ones(source.numel(), 4), 0.5)
        edges |= zip(
            zip(source.tolist(), target.tolist(), strict=True), kept.tolist(), strict=True
        )
    return nodes, edges


def test_dropout_masks_do_not_depend_on_chunks() -> None:
    graph = woven()
    nodes, edges = masks(graph, 1)
    assert len(nodes) == graph.num_nodes
    assert masks(graph, 4) == (nodes, edges)
    assert masks(graph, 24) == (nodes, edges)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_row_wise_layers_train_alike_in_any_number_of_chunks(is_sparse: bool) -> None:
    graph = woven(is_sparse=is_sparse)
    alike = [losses(pipeline(graph, settings(), striped(graph, count), layers=row_wise()), 5)
             for count in (1, 4, 24)]  # fmt: skip
    assert alike[1] == pytest.approx(alike[0], abs=1e-12)
    assert alike[2] == pytest.approx(alike[0], abs=1e-12)
    assert len(set(alike[0])) == 5


def row_wise() -> list[Layer]:
    with torch.device("meta"):
        return [
            InputLayer(5, 8, dropout=0.5),
            OutputLayer(8, 8, dropout=0.5),
            OutputLayer(8, 3, dropout=0.5),
        ]


# --- the order of work


def test_backward_runs_in_exactly_the_reverse_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    forward, backward = Stage.forward, Stage.backward

    def spy_forward(self: Stage, chunk_index: int, flow: Flow, **how: Any) -> Flow:
        seen.append(("F", self.layers[0].layer_index, chunk_index))
        return forward(self, chunk_index, flow, **how)

    def spy_backward(self: Stage, chunk_index: int, gradient: Flow, **how: Any) -> Flow:
        seen.append(("B", self.layers[0].layer_index, chunk_index))
        return backward(self, chunk_index, gradient, **how)

    monkeypatch.setattr(Stage, "forward", spy_forward)
    monkeypatch.setattr(Stage, "backward", spy_backward)
    graph = woven()
    config = settings(virtual_stages=2, layers_per_stage=[2, 3])
    run = pipeline(graph, config, striped(graph, 3))
    run.engine.train_step(1, [2, 0, 1])
    forwards = [("F", first, chunk) for first in (0, 2) for chunk in (2, 0, 1)]
    assert seen == forwards + [("B", first, chunk) for _, first, chunk in reversed(forwards)]


def test_an_epoch_must_not_end_before_its_backwards() -> None:
    graph = woven()
    run = pipeline(graph, settings(), striped(graph, 2))
    (stage,) = run.engine.stages.values()
    stage.start_epoch(1)
    stage.enter(0)
    stage.forward(0, Flow(torch.ones(12, 5, dtype=torch.float64), {}))
    with pytest.raises(AssertionError, match="chunks without a backward"):
        stage.end_epoch()


# --- carried tensors


class Writer(Layer):
    """Doubles the rows and carries them on under a name."""

    def __init__(self, *, writes: Sequence[str]) -> None:
        super().__init__()
        self.in_channels = self.out_channels = 3
        self.writes = tuple(writes)

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        for name in self.writes:
            graph.carry(name, 2.0 * x)
        return x

    def reset_parameters(self) -> None:
        pass

    def cost(self, num_nodes: int, num_edges: int) -> float:
        return 1.0


class Adder(Writer):
    """Adds what it reads to its rows."""

    def __init__(self, *, reads: Sequence[str], writes: Sequence[str] = ()) -> None:
        super().__init__(writes=writes)
        self.reads = tuple(reads)

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        x = super().forward(x, graph)
        for name in self.reads:
            x = x + graph.carried(name)
        return x


def carrying() -> list[Layer]:
    """Two readers of one tensor, one that nobody reads, and a name written again."""
    with torch.device("meta"):
        return [
            InputLayer(5, 3),
            Writer(writes=["a", "unread"]),
            Adder(reads=["a"]),
            Adder(reads=["a"], writes=["a"]),
            Adder(reads=["a"]),
            OutputLayer(3, 3),
        ]


@pytest.mark.parametrize("sizes", [[6], [2, 4], [1, 1, 1, 1, 1, 1], [3, 3], [4, 2]])
def test_carried_tensors_bring_their_gradient_back(sizes: list[int]) -> None:
    # x; x + 2x = 3x; 3x + 2x = 5x while a becomes 2 * 3x; 5x + 6x = 11x
    graph = woven()
    config = settings(num_layers=4, virtual_stages=len(sizes), layers_per_stage=sizes)
    run = pipeline(graph, config, striped(graph, 3), layers=carrying())
    weights = {key: weight.requires_grad_() for key, weight in weights_of(run).items()}
    hand = ByHand(graph, "gcn", num_layers=0)
    h = (hand.features @ weights["layers.0.lin.weight"].T + weights["layers.0.lin.bias"]).relu()
    logits = 11.0 * h @ weights["layers.5.lin.weight"].T + weights["layers.5.lin.bias"]
    loss = torch.nn.functional.cross_entropy(logits[hand.train], hand.labels[hand.train])
    expected = torch.autograd.grad(loss, list(weights.values()))
    assert run.engine.train_step(1, [1, 2, 0]) == pytest.approx(float(loss.detach()), abs=1e-12)
    for gradient, key in zip(expected, weights, strict=True):
        torch.testing.assert_close(gradients_of(run)[key], gradient, rtol=1e-10, atol=1e-10)


# --- inference


def test_inference_leaves_training_tables_alone() -> None:
    graph = woven()
    run = pipeline(graph, settings("gat"), striped(graph, 3))
    losses(run, 2)
    before = {index: table.values.clone() for index, table in tables_of(run).items()}
    run.engine.infer()
    for index, table in tables_of(run).items():
        assert torch.equal(table.values, before[index])
    run.engine.infer(into_tables=True)
    for index, table in tables_of(run).items():
        assert not torch.equal(table.values, before[index])


def test_row_wise_layers_have_no_table() -> None:
    graph = woven()
    run = pipeline(graph, settings(), striped(graph, 3))
    assert sorted(tables_of(run)) == [1, 2, 3]
    assert [local.layer_index for local in layers_of(run)] == [0, 1, 2, 3, 4]
    widths = [table.values.shape for table in tables_of(run).values()]
    assert all(math.prod(a) == math.prod(b) for a, b in pairwise(widths))
