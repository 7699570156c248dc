"""The reference loop against hand-written matrices, a scalar dropout and torch_geometric."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch_geometric.nn as pyg
from scipy import sparse
from torch import Tensor, nn

from gnnpipe.counter import GOLDEN_64, MASK_64, mix, stream_key
from gnnpipe.full_graph import FullGraph, FullGraphView, dropout_factor, row_keys
from gnnpipe.graph import Graph
from gnnpipe.models import build_layers
from gnnpipe.models.layer import Layer, Operator
from gnnpipe.reference import Reference

MASK_32 = (1 << 32) - 1


def line_graph(**changes: Any) -> Graph:
    """Edges 0 -> 1, 1 -> 1 (a self-loop), 2 -> 1 and 1 -> 2; node 3 is isolated."""
    fields: dict[str, Any] = {
        "labels": np.array([0, 1, 0, 1]),
        "num_classes": 2,
        "train_mask": np.array([True, True, False, False]),
        "val_mask": np.array([False, False, True, True]),
        "test_mask": np.zeros(4, dtype=bool),
        "features": np.eye(4, 3, dtype=np.float32) + 1.0,
        **changes,
    }
    return Graph.from_edge_index(np.array([[0, 1, 2, 1], [1, 1, 1, 2]]), **fields)


def random_graph(num_nodes: int = 40, *, is_sparse: bool = False, **changes: Any) -> Graph:
    """A directed graph with self-loops, separable a little by its features."""
    draw = np.random.default_rng(0)
    labels = draw.integers(3, size=num_nodes)
    features = (draw.random((num_nodes, 7)) < 0.3).astype(np.float32)
    features[np.arange(num_nodes), labels] += 1.0
    split = np.arange(num_nodes) % 3
    fields: dict[str, Any] = {
        "labels": labels,
        "num_classes": 3,
        "train_mask": split == 0,
        "val_mask": split == 1,
        "test_mask": split == 2,
        "features": sparse.csr_array(features) if is_sparse else features,
        **changes,
    }
    edges = np.unique(draw.integers(num_nodes - 2, size=(2, 4 * num_nodes)), axis=1)
    return Graph.from_edge_index(edges, **fields)


def model(name: str, *, dropout: float = 0.0, **options: float) -> list[Layer]:
    torch.manual_seed(0)
    sizes = {"in_channels": 7, "hidden_channels": 8, "out_channels": 3, "num_layers": 4}
    layers = build_layers(name, dropout=dropout, options=options, **sizes)
    return [layer.double() for layer in layers]


# --- operators


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("sum", [[0, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]),
        ("mean", [[0, 0, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0], [0, 1, 0, 0], [0, 0, 0, 0]]),
        # in-degrees with one self-loop each: 1, 3, 2, 1
        (
            "gcn",
            [[1, 0, 0, 0], [3**-0.5, 1 / 3, 6**-0.5, 0], [0, 6**-0.5, 1 / 2, 0], [0, 0, 0, 1]],
        ),
    ],
)
def test_operator_is_the_drawn_matrix(operator: Operator, expected: list[list[float]]) -> None:
    matrix = FullGraph(line_graph(), dtype=torch.float64).matrix(operator)
    torch.testing.assert_close(matrix.to_dense(), torch.tensor(expected, dtype=torch.float64))


def test_edge_weights_count_in_gcn_alone() -> None:
    full = FullGraph(line_graph(edge_weight=[1.0, 2.0, 1.0, 3.0]), dtype=torch.float64)
    # degrees: 1, 1 + 2 + 1 = 4, 3 + 1 = 4, 1
    gcn = [[1, 0, 0, 0], [0.5, 0.5, 0.25, 0], [0, 0.75, 0.25, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(full.matrix("gcn").to_dense(), torch.tensor(gcn).double())
    assert full.matrix("sum").to_dense()[1, 1] == 1.0
    assert full.matrix("mean").to_dense()[2, 1] == 1.0


def test_edges_are_sorted_by_target() -> None:
    full = FullGraph(line_graph(), dtype=torch.float64)
    assert full.edge_index("edges").tolist() == [[0, 1, 2, 1], [1, 1, 1, 2]]
    assert full.edge_index("edges_self").tolist() == [[0, 0, 2, 1, 1, 2, 3], [0, 1, 1, 1, 2, 2, 3]]


# --- dropout


def scalar_keep(key: int, ids: tuple[int, ...], column: int, p: float) -> bool:
    """The rule in Python's own integers."""
    r = key
    for part in ids:
        r = mix(((part * GOLDEN_64) & MASK_64) ^ r)
    z = (((r & MASK_32) ^ (column * 0x9E3779B9 & MASK_32)) + (r >> 32)) & MASK_32
    z = ((z ^ (z >> 16)) * 0x7FEB352D) & MASK_32
    z = ((z ^ (z >> 15)) * 0x846CA68B) & MASK_32
    return (z ^ (z >> 16)) >= round(p * 2**32)


def view(operator: Operator = "edges", *, graph: Graph | None = None) -> FullGraphView:
    full = FullGraph(graph or line_graph(), dtype=torch.float64)
    return FullGraphView(full, operator, stream=(5, 2, 1))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_equals_the_scalar_rule(p: float) -> None:
    graph_view, num_columns = view(), 50
    for site in range(2):
        kept = graph_view.dropout(torch.ones(4, num_columns), p)
        key = stream_key(5, 2, 1, site)
        for node in range(4):
            expected = [scalar_keep(key, (node,), c, p) for c in range(num_columns)]
            assert (kept[node] != 0.0).tolist() == expected
        torch.testing.assert_close(torch.unique(kept)[1:], torch.tensor([1.0 / (1.0 - p)]))


def test_edge_dropout_equals_the_scalar_rule() -> None:
    graph_view = view("edges_self")
    num_heads = 20
    graph_view.dropout(torch.ones(4, 1), 0.3)  # site 0
    kept = graph_view.edge_dropout(torch.ones(7, num_heads), 0.3)
    key = stream_key(5, 2, 1, 1)
    edges = [(0, 0), (0, 1), (2, 1), (1, 1), (1, 2), (2, 2), (3, 3)]  # source, target
    expected = [[scalar_keep(key, edge, head, 0.3) for head in range(num_heads)] for edge in edges]
    assert (kept != 0.0).tolist() == expected


def test_dropout_of_large_ids_equals_the_scalar_rule() -> None:
    ids = [2**31 - 1, 2**31, 2**40 + 3, 2**62 + 1]
    columns = torch.tensor([0, 1, 2**20])
    for key in (0, 2**63 - 1, 2**63, MASK_64):
        factor = dropout_factor(row_keys(key, torch.tensor(ids).unsqueeze(1)), columns, 0.5)
        expected = [[scalar_keep(key, (i,), c, 0.5) for c in columns.tolist()] for i in ids]
        assert (factor != 0.0).tolist() == expected


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 0.8])
def test_dropout_keeps_the_asked_fraction(p: float) -> None:
    factor = dropout_factor(row_keys(7, torch.arange(2000).unsqueeze(1)), torch.arange(100), p)
    assert (factor != 0.0).double().mean().item() == pytest.approx(1.0 - p, abs=0.005)
    assert (factor != 0.0).double().mean(0).sub(1.0 - p).abs().max() < 0.06  # each column
    assert factor.mean().item() == pytest.approx(1.0, abs=0.02)


def test_mask_of_some_nodes_is_theirs_in_any_order() -> None:
    nodes, columns = torch.randperm(500)[:60], torch.arange(33)
    everything = dropout_factor(row_keys(3, torch.arange(500).unsqueeze(1)), columns, 0.4)
    some = dropout_factor(row_keys(3, nodes.unsqueeze(1)), columns, 0.4)
    assert torch.equal(some, everything[nodes])


def test_sites_epochs_and_layers_have_their_own_masks() -> None:
    full = FullGraph(line_graph(), dtype=torch.float64)
    ones, masks = torch.ones(4, 40), []
    for stream in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]:
        graph_view = FullGraphView(full, "sum", stream=stream)
        masks += [graph_view.dropout(ones, 0.5), graph_view.dropout(ones, 0.5)]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_dropout_of_stored_entries_equals_dropout_of_the_dense_rows() -> None:
    full = FullGraph(random_graph(is_sparse=True), dtype=torch.float64)
    assert full.features.is_sparse
    dropped = view().dropout(full.features, 0.5)
    assert torch.equal(dropped.to_dense(), view().dropout(full.features.to_dense(), 0.5))


def test_evaluation_and_zero_probability_drop_nothing() -> None:
    full, x = FullGraph(line_graph(), dtype=torch.float64), torch.ones(4, 3)
    evaluating = FullGraphView(full, "edges")
    assert evaluating.dropout(x, 0.9) is x
    assert evaluating.edge_dropout(x, 0.9) is x
    assert view().dropout(x, 0.0) is x
    assert view().edge_dropout(x, 0.0) is x


# --- training


class PyGModel(nn.Module):
    """The frame written by hand around torch_geometric's modules, with the layers' weights."""

    def __init__(self, layers: list[Layer], convolutions: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 8).double(), nn.Linear(8, 3).double()
        self.convolutions = nn.ModuleList(convolutions).double()
        for layer, module in zip(layers, [self.first, *convolutions, self.last], strict=True):
            parameters = dict(layer.named_parameters())
            for key, theirs in module.named_parameters():
                ours = parameters[key] if key in parameters else parameters[f"lin.{key}"]
                theirs.data.copy_(ours.data)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = h0 = self.first(x).relu()
        for convolution in self.convolutions:
            rows = (h, h0) if isinstance(convolution, pyg.GCN2Conv) else (h,)
            h = convolution(*rows, edge_index).relu()
        return cast(Tensor, self.last(h))


PYG: dict[str, Callable[[int], nn.Module]] = {
    "gcn": lambda i: cast(nn.Module, pyg.GCNConv(8, 8)),
    "sage": lambda i: cast(nn.Module, pyg.SAGEConv(8, 8)),
    "gat": lambda i: cast(nn.Module, pyg.GATConv(8, 4, heads=2)),
    "gcnii": lambda i: cast(nn.Module, pyg.GCN2Conv(8, alpha=0.1, theta=0.5, layer=i)),
}


@pytest.mark.parametrize("name", PYG)
def test_training_equals_a_torch_geometric_loop(name: str) -> None:
    graph = random_graph()
    layers = model(name, **({"heads": 2} if name == "gat" else {}))
    theirs = PyGModel(layers, [PYG[name](i) for i in range(1, 5)])
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.01, weight_decay=5e-4)
    reference = Reference(graph, layers, seed=0, lr=0.01, weight_decay=5e-4)
    x = torch.from_numpy(cast(Any, graph.features)).double()
    target = torch.arange(40).repeat_interleave(torch.from_numpy(graph.indptr).diff())
    edge_index = torch.stack([torch.from_numpy(graph.indices).long(), target])
    labels, train = torch.from_numpy(graph.labels), torch.from_numpy(graph.train_mask)
    for epoch in range(1, 6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(theirs(x, edge_index)[train], labels[train])
        torch.autograd.backward(loss)
        optimizer.step()
        assert reference.train_epoch(epoch) == pytest.approx(loss.item(), abs=1e-9)
    torch.testing.assert_close(
        reference.evaluate(), theirs(x, edge_index).detach(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", ["gcn", "sage", "gin", "gat", "gcnii", "resgcn+"])
def test_training_learns_with_dropout(name: str) -> None:
    reference = Reference(random_graph(), model(name, dropout=0.2), seed=0, lr=0.01)
    losses = [reference.train_epoch(epoch) for epoch in range(1, 41)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def losses_of(graph: Graph, *, seed: int = 0, dropout: float = 0.5) -> list[float]:
    reference = Reference(graph, model("gcnii", dropout=dropout), seed=seed, lr=0.01)
    return [reference.train_epoch(epoch) for epoch in range(1, 4)]


def test_seed_decides_the_masks_alone() -> None:
    torch.manual_seed(99)
    once = losses_of(random_graph())
    torch.manual_seed(11)
    assert losses_of(random_graph()) == once
    assert losses_of(random_graph(), seed=1) != once
    assert losses_of(random_graph(), dropout=0.0) == losses_of(random_graph(), seed=1, dropout=0.0)


def test_sparse_features_train_as_dense_ones() -> None:
    assert losses_of(random_graph(is_sparse=True)) == pytest.approx(
        losses_of(random_graph()), abs=1e-12
    )


def test_unlabelled_training_nodes_do_not_count() -> None:
    labels = random_graph().labels.copy()
    labels[[0, 3, 6]] = -1  # all three in the training mask
    masked = np.arange(40) % 3 == 0
    masked[[0, 3, 6]] = False
    marked = random_graph(labels=labels)
    unmasked = random_graph(labels=labels, train_mask=masked)
    assert losses_of(marked) == losses_of(unmasked)


def test_accuracy_counts_labelled_nodes_of_each_split() -> None:
    graph = line_graph(labels=np.array([0, 1, 0, -1]))
    sizes = {"in_channels": 3, "hidden_channels": 4, "out_channels": 2, "num_layers": 1}
    layers = build_layers("gcn", dropout=0.0, options={}, **sizes)
    reference = Reference(graph, layers, seed=0, lr=0.1)
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert reference.accuracy(logits) == {"train": 0.5, "val": 1.0, "test": None}


def test_evaluation_is_repeatable_and_has_no_gradient() -> None:
    reference = Reference(random_graph(), model("gat", dropout=0.5, heads=2), seed=0, lr=0.01)
    logits = reference.evaluate()
    assert logits.shape == (40, 3)
    assert not logits.requires_grad
    assert torch.equal(logits, reference.evaluate())
