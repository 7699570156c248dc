"""Convolutions of torch_geometric that train through the pipeline, and a plain loop to compare."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_geometric.nn as pyg
from drawn import woven
from torch import Tensor, nn
from torch_geometric.data import Data

from gnnpipe.config import Config, from_dict
from gnnpipe.graph import Graph

H = 6
NUM_TYPES = 3
ATTR = 4


def mlp(fan_in: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(fan_in, H), nn.ReLU(), nn.Linear(H, H))


def deep(conv: nn.Module, block: str = "res+") -> nn.Module:
    layer: nn.Module = pyg.DeepGCNLayer(conv, nn.LayerNorm(H), nn.ReLU(), block, dropout=0.0)
    return layer


class Case(NamedTuple):
    """A convolution of width H to H, and what it takes beside x and edge_index."""

    make: Callable[[], nn.Module]
    takes: tuple[str, ...] = ()


DEGREES = torch.tensor([0, 3, 4, 5, 6, 2])
PNA = (["mean", "max", "std"], ["identity", "amplification"], DEGREES)
CASES = {
    "GCNConv": Case(lambda: pyg.GCNConv(H, H), ("edge_weight",)),
    "GCN2Conv": Case(lambda: pyg.GCN2Conv(H, 0.2, 0.5, 2), ("x_0", "edge_weight")),
    "SAGEConv mean": Case(lambda: pyg.SAGEConv(H, H)),
    "SAGEConv max": Case(lambda: pyg.SAGEConv(H, H, aggr="max")),
    "GINConv": Case(lambda: pyg.GINConv(mlp(H), train_eps=True)),
    "GINEConv": Case(lambda: pyg.GINEConv(mlp(H), edge_dim=ATTR), ("edge_attr",)),
    "GATConv": Case(lambda: pyg.GATConv(H, 3, heads=2)),
    "GATConv edge_dim": Case(lambda: pyg.GATConv(H, 3, heads=2, edge_dim=ATTR), ("edge_attr",)),
    "GATv2Conv": Case(lambda: pyg.GATv2Conv(H, 3, heads=2)),
    "GATv2Conv edge_dim": Case(
        lambda: pyg.GATv2Conv(H, 3, heads=2, edge_dim=ATTR), ("edge_attr",)
    ),
    "TransformerConv": Case(
        lambda: pyg.TransformerConv(H, 3, heads=2, edge_dim=ATTR), ("edge_attr",)
    ),
    "GENConv": Case(lambda: pyg.GENConv(H, H, aggr="softmax", learn_t=True, norm="layer")),
    "PNAConv": Case(lambda: pyg.PNAConv(H, H, *PNA)),
    "PNAConv edge_dim": Case(lambda: pyg.PNAConv(H, H, *PNA, edge_dim=ATTR), ("edge_attr",)),
    "APPNP": Case(lambda: pyg.APPNP(3, 0.1), ("edge_weight",)),
    "TAGConv": Case(lambda: pyg.TAGConv(H, H, K=3), ("edge_weight",)),
    "SGConv": Case(lambda: pyg.SGConv(H, H, K=2), ("edge_weight",)),
    "SSGConv": Case(lambda: pyg.SSGConv(H, H, alpha=0.1, K=2), ("edge_weight",)),
    "GraphConv": Case(lambda: pyg.GraphConv(H, H), ("edge_weight",)),
    "ARMAConv": Case(lambda: pyg.ARMAConv(H, H, num_stacks=2, num_layers=2), ("edge_weight",)),
    "ChebConv": Case(lambda: pyg.ChebConv(H, H, K=4), ("edge_weight",)),
    "EdgeConv": Case(lambda: pyg.EdgeConv(mlp(2 * H))),
    "ResGatedGraphConv": Case(lambda: pyg.ResGatedGraphConv(H, H)),
    "LEConv": Case(lambda: pyg.LEConv(H, H), ("edge_weight",)),
    "ClusterGCNConv": Case(lambda: pyg.ClusterGCNConv(H, H)),
    "SignedConv": Case(lambda: pyg.SignedConv(H, H // 2, first_aggr=True), ("signs",)),
    "RGCNConv": Case(lambda: pyg.RGCNConv(H, H, NUM_TYPES), ("edge_type",)),
    "RGATConv": Case(lambda: pyg.RGATConv(H, H, NUM_TYPES), ("edge_type",)),
    "FiLMConv": Case(lambda: pyg.FiLMConv(H, H, num_relations=NUM_TYPES), ("edge_type",)),
    "NNConv": Case(lambda: pyg.NNConv(H, H, nn.Linear(ATTR, H * H)), ("edge_attr",)),
    "CGConv": Case(lambda: pyg.CGConv(H, dim=ATTR), ("edge_attr",)),
    "GMMConv": Case(lambda: pyg.GMMConv(H, H, dim=ATTR, kernel_size=2), ("edge_attr",)),
    "MFConv": Case(lambda: pyg.MFConv(H, H)),
    "AGNNConv": Case(lambda: pyg.AGNNConv()),
    "FAConv": Case(lambda: pyg.FAConv(H), ("x_0",)),
    "LGConv": Case(lambda: pyg.LGConv(), ("edge_weight",)),
    "FeaStConv": Case(lambda: pyg.FeaStConv(H, H, heads=2)),
    "SuperGATConv": Case(lambda: pyg.SuperGATConv(H, H)),
    "DeepGCNLayer(GENConv)": Case(lambda: deep(pyg.GENConv(H, H, norm="layer"))),
    "DeepGCNLayer(GATConv, res)": Case(lambda: deep(pyg.GATConv(H, H), block="res")),
    "GeneralConv": Case(lambda: pyg.GeneralConv(H, H)),
}


def graph_for(case: Case, *, is_directed: bool = True) -> Graph:
    """A woven graph whose edges carry what the convolution takes."""
    is_weighted = "edge_weight" in case.takes
    graph = woven(is_directed=is_directed, is_weighted=is_weighted)
    draw = np.random.default_rng(5)
    extra: dict[str, Any] = {}
    if "edge_attr" in case.takes:
        extra["edge_attr"] = draw.random((graph.num_edges, ATTR), dtype=np.float32)
    if "edge_type" in case.takes or "signs" in case.takes:
        kinds = NUM_TYPES if "edge_type" in case.takes else 2
        extra["edge_type"] = draw.integers(kinds, size=graph.num_edges)
    return Graph(**{**vars(graph), **extra})


def modules(case: Case, in_channels: int, out_channels: int) -> list[nn.Module]:
    """Linear, ReLU, the convolution twice, Linear; float64."""
    torch.manual_seed(0)
    first, last = nn.Linear(in_channels, H), nn.Linear(H, out_channels)
    made = [first, nn.ReLU(), case.make(), nn.Tanh(), case.make(), last]
    return [module.double() for module in made]


class PlainModel(nn.Module):
    """The same modules as torch_geometric runs them, on the whole graph."""

    def __init__(self, parts: list[nn.Module], graph: Graph, takes: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        source = torch.from_numpy(graph.indices).long()
        count = torch.from_numpy(np.diff(graph.indptr))
        target = torch.arange(graph.num_nodes).repeat_interleave(count)
        self.edge_index = torch.stack((source, target))
        self.x = torch.from_numpy(graph.features).double()
        self.takes = takes
        self.edges = {
            name: torch.from_numpy(value)
            for name in ("edge_weight", "edge_attr", "edge_type")
            if (value := getattr(graph, name)) is not None
        }

    def forward(self) -> Tensor:
        x, x_0 = self.x, None
        for part in self.parts:
            is_graph = isinstance(part, (pyg.MessagePassing, pyg.DeepGCNLayer))
            if "edge_index" not in part.forward.__code__.co_varnames and not is_graph:
                x = part(x)
                continue
            x_0 = x if x_0 is None else x_0
            x = self.convolve(part, x, x_0)
        return x

    def convolve(self, conv: nn.Module, x: Tensor, x_0: Tensor) -> Tensor:
        edges = self.edge_index
        if "signs" in self.takes:
            kind = self.edges["edge_type"]
            return conv(x, edges[:, kind == 0], edges[:, kind == 1])  # type: ignore[no-any-return]
        given = {
            name: value.double() if value.is_floating_point() else value
            for name, value in self.edges.items()
            if name in self.takes
        }
        if isinstance(conv, pyg.DeepGCNLayer):
            return conv(x, edges)  # type: ignore[no-any-return]
        first = {"x_0": x_0} if "x_0" in self.takes else {}
        return conv(x, edge_index=edges, **first, **given)  # type: ignore[no-any-return]


def plain_losses(model: PlainModel, graph: Graph, epochs: int) -> list[float]:
    """Adam on the mean cross entropy of the labelled training nodes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4, foreach=False)
    labels = torch.from_numpy(graph.labels)
    train = torch.from_numpy(graph.train_mask & (graph.labels >= 0)).nonzero().squeeze(1)
    found = []
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model()[train], labels[train])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def job_data() -> Data:
    """A graph as torch_geometric has it, with weights and attributes on its edges."""
    graph = graph_for(Case(nn.Identity, ("edge_weight", "edge_attr")), is_directed=False)
    plain = PlainModel([], graph, ())
    masks = {
        m: torch.from_numpy(getattr(graph, m)) for m in ("train_mask", "val_mask", "test_mask")
    }
    edges = plain.edges
    y = torch.from_numpy(graph.labels)
    return Data(plain.x.float(), plain.edge_index, y=y, **edges, **masks)


def job_config(
    num_stages: int,
    num_ways: int,
    directory: str,
    *,
    partition: str | None = None,
    layers_per_stage: list[int] | None = None,
    kind: str = "auto",
) -> Config:
    """Three epochs in four chunks, float64."""
    return from_dict(
        {
            "partition": {"num_chunks": 4, "method": "bfs", "path": partition},
            "model": {"dtype": "float64"},
            "task": {"kind": kind},
            "parallel": {
                "num_stages": num_stages,
                "num_ways": num_ways,
                "layers_per_stage": layers_per_stage,
            },
            "training": {"epochs": 3},
            "run": {"dir": directory, "tensorboard": False, "threads": 1, "timeout_s": 60},
        }
    )


def job_layers() -> list[nn.Module]:
    """Modules of every adapter."""
    torch.manual_seed(0)
    return [
        nn.Linear(5, H),
        nn.ReLU(),
        nn.Dropout(0.2),
        pyg.GATv2Conv(H, 3, heads=2, edge_dim=ATTR),
        nn.ELU(),
        pyg.GCNConv(H, H),
        pyg.PNAConv(H, H, *PNA),
        pyg.APPNP(3, 0.1),
        pyg.TAGConv(H, 3, K=2),
    ]


def two_tasks() -> Data:
    """The same graph with two labels for each node, some not known."""
    data = job_data()
    draw = torch.Generator().manual_seed(0)
    data.y = torch.randint(-1, 2, (data.num_nodes, 2), generator=draw)
    return data


def auc_layers() -> list[nn.Module]:
    """A small model with two scores."""
    torch.manual_seed(0)
    return [nn.Linear(5, H), nn.ReLU(), pyg.SAGEConv(H, H), nn.Linear(H, 2)]
