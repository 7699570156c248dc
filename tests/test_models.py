"""Layers against torch_geometric's own convolutions, and models as lists that can be cut."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.utils import softmax

from gnnpipe.errors import UserError
from gnnpipe.full_graph import FullGraph, FullGraphView
from gnnpipe.graph import Graph
from gnnpipe.kernels import SparseRows
from gnnpipe.models import build_layers
from gnnpipe.models.gat import GATLayer, edge_softmax
from gnnpipe.models.gcn import GCNLayer
from gnnpipe.models.gcnii import GCNIILayer
from gnnpipe.models.gin import GINLayer
from gnnpipe.models.io import InputLayer
from gnnpipe.models.layer import GraphView, Layer
from gnnpipe.models.resgcn import ResGCNLayer
from gnnpipe.models.sage import SAGELayer

PLAIN = ["gcn", "sage", "gin", "gat", "gcnii", "resgcn+"]
"""The models that are an input layer, convolutions of one width and an output layer."""

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
GRAPHS = ["directed", "undirected", "self_loops", "weighted", "parallel", "edgeless"]


def random_edges(kind: str, num_nodes: int, seed: int) -> Tensor:
    """Edges among all nodes but the last three: those are isolated."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(num_nodes - 3, (2, 4 * num_nodes), generator=generator)
    ends = distinct(ends[:, ends[0] != ends[1]])
    if kind == "edgeless":
        return ends[:, :0]
    if kind == "undirected":
        return distinct(torch.cat([ends, ends.flip(0)], dim=1))
    if kind == "parallel":
        return torch.cat([ends, ends[:, ::2]], dim=1)
    loops = torch.arange(0, num_nodes, 3).repeat(2, 1)
    return ends if kind == "directed" else torch.cat([loops, ends], dim=1)


def distinct(edges: Tensor) -> Tensor:
    return cast(Tensor, torch.unique(edges, dim=1))


def random_graph(kind: str, *, num_nodes: int = 20, seed: int = 0) -> Graph:
    edges = random_edges(kind, num_nodes, seed)
    weight = None
    if kind == "weighted":
        weight = torch.rand(edges.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.1
    return Graph.from_edge_index(
        edges.numpy(),
        edge_weight=None if weight is None else weight.numpy(),
        name=kind,
        labels=torch.zeros(num_nodes, dtype=torch.int64).numpy(),
        num_classes=1,
        train_mask=torch.ones(num_nodes, dtype=torch.bool).numpy(),
        val_mask=torch.zeros(num_nodes, dtype=torch.bool).numpy(),
        test_mask=torch.zeros(num_nodes, dtype=torch.bool).numpy(),
        features=torch.zeros(num_nodes, 1).numpy(),
    )


def pyg_edges(graph: Graph, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    source = torch.from_numpy(graph.indices).long()
    count = torch.from_numpy(graph.indptr).diff()
    target = torch.arange(graph.num_nodes).repeat_interleave(count)
    weight = None if graph.edge_weight is None else torch.from_numpy(graph.edge_weight).to(dtype)
    return torch.stack([source, target]), weight


class Case(NamedTuple):
    """A layer of ours and the module of torch_geometric that it must equal."""

    layer: Callable[[], Layer]
    module: Callable[[], nn.Module]
    rename: Mapping[str, str] = MappingProxyType({})  # our parameter's name -> theirs
    reads_weight: bool = False


def mlp(in_channels: int, out_channels: int) -> nn.Module:
    layers = (nn.Linear(in_channels, out_channels), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(out_channels, out_channels))


def res_plus(channels: int) -> nn.Module:
    conv, norm = pyg.SAGEConv(channels, channels), nn.LayerNorm(channels)
    layer = pyg.DeepGCNLayer(conv, norm, nn.ReLU(), block="res+", dropout=0.0)
    return cast(nn.Module, layer)


GIN_NAMES = {f"{a}.{kind}": f"nn.{b}.{kind}" for a, b in (("first", 0), ("second", 2))
             for kind in ("weight", "bias")}  # fmt: skip
CASES = {
    "gcn narrowing": Case(lambda: GCNLayer(6, 4), lambda: pyg.GCNConv(6, 4), reads_weight=True),
    "gcn widening": Case(lambda: GCNLayer(4, 6), lambda: pyg.GCNConv(4, 6), reads_weight=True),
    "sage": Case(lambda: SAGELayer(6, 4), lambda: pyg.SAGEConv(6, 4)),
    "sage max": Case(
        lambda: SAGELayer(6, 4, aggregator="max"), lambda: pyg.SAGEConv(6, 4, aggr="max")
    ),
    "gin": Case(lambda: GINLayer(6, 4), lambda: pyg.GINConv(mlp(6, 4)), GIN_NAMES),
    "gin eps": Case(
        lambda: GINLayer(6, 4, train_eps=True),
        lambda: pyg.GINConv(mlp(6, 4), train_eps=True),
        GIN_NAMES,
    ),
    "gat": Case(lambda: GATLayer(6, 12, heads=3), lambda: pyg.GATConv(6, 4, heads=3)),
    "gat one head": Case(lambda: GATLayer(6, 4, heads=1), lambda: pyg.GATConv(6, 4)),
    "gcnii": Case(
        lambda: GCNIILayer(6, 3, alpha=0.2, theta=0.7),
        lambda: pyg.GCN2Conv(6, alpha=0.2, theta=0.7, layer=3),
        reads_weight=True,
    ),
    "resgcn+": Case(lambda: ResGCNLayer(6), lambda: res_plus(6)),
}


def twins(case: Case, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """Our layer and theirs with the same random weights, biases included."""
    layer, module = case.layer().to(dtype), case.module().to(dtype)
    theirs = dict(module.named_parameters())
    assert {case.rename.get(name, name) for name, _ in layer.named_parameters()} == set(theirs)
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter)
        theirs[case.rename.get(name, name)].data.copy_(parameter.data)
    return layer, module


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("name", CASES)
def test_convolution_equals_torch_geometric(name: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    graph, case = random_graph(kind), CASES[name]
    layer, module = twins(case, dtype)
    edge_index, weight = pyg_edges(graph, dtype)
    x, x0 = torch.randn(2, graph.num_nodes, layer.in_channels, dtype=dtype).requires_grad_()
    view = FullGraphView(FullGraph(graph, dtype=dtype), layer.operator, carried={"h0": x0})
    ours = layer(x, view) if name == "resgcn+" else layer.convolve(x, view)
    rows = (x, x0) if name == "gcnii" else (x,)
    theirs = module(*rows, edge_index, weight) if case.reads_weight else module(*rows, edge_index)
    tolerance: Any = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(ours, theirs, **tolerance)
    gradient = torch.randn_like(ours)
    ours_in = torch.autograd.grad(ours, [*rows, *layer.parameters()], gradient)
    order = dict(module.named_parameters())
    names = [case.rename.get(key, key) for key, _ in layer.named_parameters()]
    theirs_in = torch.autograd.grad(theirs, [*rows, *(order[key] for key in names)], gradient)
    torch.testing.assert_close(ours_in, theirs_in, **tolerance)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("gin")])
def test_initial_weights_equal_torch_geometric(name: str) -> None:
    layer, module = CASES[name].layer(), CASES[name].module()
    torch.manual_seed(7)
    layer.reset_parameters()
    torch.manual_seed(7)
    cast(Any, module).reset_parameters()
    for key, theirs in module.named_parameters():
        torch.testing.assert_close(layer.get_parameter(key), theirs)


class SpyView:
    """Records what a layer asks for; every node is its only neighbour."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.table_channels = 0
        self.values: dict[str, Tensor] = {}

    def aggregate(self, x: Tensor) -> Tensor:
        self.calls.append("aggregate")
        self.table_channels = x.shape[1]
        return x

    def gather(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append("gather")
        self.table_channels = x.shape[1]
        return x, torch.arange(x.shape[0]).repeat(2, 1)

    def dropout(self, x: Any, p: float) -> Any:
        self.calls.append(f"dropout {p}")
        return x

    def edge_dropout(self, alpha: Tensor, p: float) -> Tensor:
        self.calls.append(f"edge_dropout {p}")
        return alpha

    def edge_values(self, name: str) -> Tensor | None:
        self.calls.append(f"edge_values {name}")
        return None

    def foreign_seed(self) -> int | None:
        return None

    def normalise(self, x: Tensor, norm: nn.Module) -> Tensor:
        normed: Tensor = norm(x)
        return normed

    def relu(self, x: Tensor) -> Tensor:
        return x.relu()

    def attend(self, x_src: Tensor, logits: Any, p: float) -> Tensor:
        self.calls.append(f"edge_dropout {p}")
        return x_src

    def carry(self, name: str, value: Tensor) -> None:
        self.calls.append(f"carry {name}")
        self.values[name] = value

    def carried(self, name: str) -> Tensor:
        self.calls.append(f"carried {name}")
        return self.values[name]


def build(name: str, **changes: Any) -> list[Layer]:
    sizes = {"in_channels": 5, "hidden_channels": 8, "out_channels": 3, "num_layers": 2}
    arguments: dict[str, Any] = {**sizes, "dropout": 0.5, "options": {}, **changes}
    return build_layers(name, **arguments)


ASKED = {
    "gcn": ["dropout 0.5", "aggregate"],
    "sage": ["dropout 0.5", "aggregate"],
    "gin": ["dropout 0.5", "aggregate"],
    "gat": ["dropout 0.5", "gather", "edge_dropout 0.5"],
    "gcnii": ["dropout 0.5", "aggregate", "carried h0"],
    "resgcn+": ["dropout 0.5", "aggregate"],
}


@pytest.mark.parametrize("name", PLAIN)
def test_layers_ask_the_graph_in_the_documented_order(name: str) -> None:
    first, *middle, last = build(name)
    view, x = SpyView(), torch.randn(4, 5)
    x = first(x, view)
    assert view.calls == ["dropout 0.5", *(["carry h0"] if name == "gcnii" else [])]
    for layer in middle:
        view.calls.clear()
        x = layer(x, view)
        assert view.calls == ASKED[name]
        assert view.table_channels == layer.table_channels
    view.calls.clear()
    assert last(x, view).shape == (4, 3)
    assert view.calls == ["dropout 0.5"]


@pytest.mark.parametrize("name", PLAIN)
def test_model_can_be_cut_between_any_two_layers(name: str) -> None:
    layers = build(name, num_layers=5)
    assert len(layers) == 7
    assert [layer.in_channels for layer in layers] == [5, *[8] * 6]
    assert [layer.out_channels for layer in layers] == [*[8] * 6, 3]
    assert [layer.operator == "none" for layer in layers] == [True, *[False] * 5, True]
    written = {key for layer in layers for key in layer.writes}
    assert written == {key for layer in layers for key in layer.reads}
    assert all(layer.carried_channels(key) == 8 for layer in layers for key in layer.writes)


@pytest.mark.parametrize("name", PLAIN)
def test_meta_layers_are_complete_after_reset(name: str) -> None:
    options = {"train_eps": True} if name == "gin" else {}
    with torch.device("meta"):
        layers = build(name, options=options)
    for layer in layers:
        layer.to_empty(device="cpu")
        assert not list(layer.buffers())
        for parameter in layer.parameters():
            nn.init.constant_(parameter, float("nan"))
        layer.reset_parameters()
        assert all(parameter.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("name", PLAIN)
def test_weights_depend_on_the_global_generator_alone(name: str) -> None:
    def draw() -> list[Tensor]:
        torch.manual_seed(3)
        for layer in layers:
            layer.reset_parameters()
        return [parameter.detach().clone() for layer in layers for parameter in layer.parameters()]

    layers = build(name)
    assert all(torch.equal(a, b) for a, b in zip(draw(), draw(), strict=True))


def test_gcn_hands_out_the_narrower_tensor() -> None:
    assert GCNLayer(6, 4).table_channels == 4
    assert GCNLayer(4, 6).table_channels == 4


def test_activation_follows_the_convolution() -> None:
    layer, view = SAGELayer(4, 4), cast(GraphView, SpyView())
    x = torch.randn(5, 4)
    assert torch.equal(layer(x, view), layer.convolve(x, view).relu())


def test_input_layer_takes_sparse_rows() -> None:
    # rows: [0 2 0], [0 0 0], [1 0 3]
    indptr = torch.tensor([0, 1, 1, 3])
    indices = torch.tensor([1, 0, 2], dtype=torch.int32)
    sparse = SparseRows.from_csr(indptr, indices, torch.tensor([2.0, 1.0, 3.0]), 3)
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    layer, view = InputLayer(3, 4, writes=("h0",)), SpyView()
    h = layer(sparse, view)
    torch.testing.assert_close(h, layer(dense, SpyView()))
    assert view.values["h0"] is h


def test_sparse_features_weight_lies_as_their_product_reads_it() -> None:
    dense, sparse = InputLayer(3, 4), InputLayer(3, 4, row_entries=1.0)
    for layer in (dense, sparse):
        for _ in range(2):  # The numbers are the same, however the weight lies before.
            torch.manual_seed(0)
            layer.reset_parameters()
    assert torch.equal(dense.lin.weight, sparse.lin.weight)
    assert dense.lin.weight.is_contiguous()
    assert sparse.lin.weight.t().is_contiguous()
    rows = SparseRows.from_csr(
        torch.tensor([0, 1, 2]), torch.tensor([2, 0]).int(), torch.tensor([1.0, 3.0]), 3
    )
    sparse(rows, SpyView()).sum().backward()
    grad = sparse.lin.weight.grad
    assert grad is not None
    assert grad.t().is_contiguous()


def test_attention_of_two_edges_is_their_softmax() -> None:
    # 0 -> 0 and 1 -> 0 with logits ln 1 and ln 3; node 1 has its self-loop only
    logit = torch.tensor([[1.0], [3.0], [5.0]]).log()
    alpha = edge_softmax(logit, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(alpha, torch.tensor([[0.25], [0.75], [1.0]]))


def test_attention_survives_large_logits() -> None:
    logit = torch.tensor([[1000.0, -1000.0], [1001.0, -1000.0], [0.0, 7.0]])
    target = torch.tensor([0, 0, 2])
    alpha = edge_softmax(logit, target, 3)
    torch.testing.assert_close(alpha, softmax(logit, target, num_nodes=3))


def test_attention_is_dropped_by_edge() -> None:
    graph = random_graph("directed")
    layer = GATLayer(4, 4, heads=2, dropout=0.5)
    nn.init.zeros_(layer.att_src)  # equal attention: 1 / number of edges of the target
    nn.init.zeros_(layer.att_dst)
    full = FullGraph(graph, dtype=torch.float32)
    x = torch.randn(graph.num_nodes, 4)
    out = layer.convolve(x, FullGraphView(full, "edges_self", stream=(1, 2, 3)))
    source, target = full.edge_index("edges_self")
    alpha = 1.0 / target.bincount().float()[target].unsqueeze(1).expand(-1, 2)
    alpha = FullGraphView(full, "edges_self", stream=(1, 2, 3)).edge_dropout(alpha, 0.5)
    assert (alpha == 0.0).any()
    z = layer.lin(x).view(-1, 2, 2)
    expected = torch.zeros_like(z).index_add(0, target, alpha.unsqueeze(2) * z[source])
    torch.testing.assert_close(out, expected.flatten(1))


@pytest.mark.parametrize("name", PLAIN)
def test_cost_grows_with_nodes_and_edges(name: str) -> None:
    first, layer, _, last = build(name)
    assert layer.cost(100, 1000) < layer.cost(200, 1000) < layer.cost(200, 2000)
    assert 0.0 < first.cost(100, 1000) == first.cost(100, 2000)
    assert 0.0 < last.cost(100, 1000) == last.cost(100, 2000)


def test_cost_of_sparse_features_counts_stored_entries() -> None:
    dense, sparse = build("gcn")[0], build("gcn", row_entries=0.5)[0]
    assert dense.cost(100, 0) == pytest.approx(10.0 * sparse.cost(100, 0))


def test_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"`model\.name` \(=gnc\) is unknown; choose from gcn, sage"
    ):
        build("gnc")


def test_option_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"`model\.heads` is no option of gcn; its options: norm"):
        build("gcn", options={"heads": 2})


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_must_divide_the_width(heads: int) -> None:
    with pytest.raises(UserError, match=rf"`heads` \(={heads}\) must divide `hidden_channels`"):
        build("gat", options={"heads": heads})
