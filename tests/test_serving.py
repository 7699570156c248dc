"""A trained model away from its run: other graphs, a few nodes, plain torch_geometric."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import woven
from pyarrow import parquet
from torch import nn
from torch_geometric import nn as pyg

from gnnpipe.config import PRESETS, from_dict
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.inference import Source, evaluate_run, predict_run, score_rows
from gnnpipe.interchange import to_pyg
from gnnpipe.metrics import read_metrics
from gnnpipe.models.foreign import from_pyg
from gnnpipe.models.plain import PLAIN
from gnnpipe.pretrained import PretrainedModel, load_into, plain_model
from gnnpipe.subgraph import induced, neighbourhood
from gnnpipe.trainer import Trainer

H = 8


def sparse_ring(num_nodes: int = 60, *, is_directed: bool = False) -> Graph:
    """A ring, so that few nodes see little of it, with chords here and there."""
    node = np.arange(num_nodes)
    edges = np.stack((node, (node + 1) % num_nodes))
    edges = np.concatenate((edges, [[0, 9, 30], [5, 3, 20]]), axis=1)
    if not is_directed:
        edges = np.concatenate((edges, edges[::-1]), axis=1)
    draw = np.random.default_rng(0)
    weight = np.ones(edges.shape[1], np.float32) if is_directed else None
    return Graph.from_edge_index(
        edges,
        edge_weight=weight,
        features=draw.random((num_nodes, 5), dtype=np.float32),
        labels=node % 3,
        train_mask=node % 2 == 0,
        val_mask=node % 4 == 1,
        test_mask=node % 4 == 3,
    )


def train(
    graph: Graph, folder: Path, model: dict[str, Any], layers: Sequence[nn.Module] | None = None
) -> str:
    values = {
        "partition": {"num_chunks": 3, "method": "contiguous"},
        "model": {"num_layers": 3, "hidden_channels": H, "dtype": "float64", **model},
        "training": {"epochs": 2},
        "run": {"dir": str(folder / "run"), "tensorboard": False, "threads": 1},
    }
    Trainer(from_dict(values), graph=graph, layers=layers).fit()
    return str(folder / "run")


def own_layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(5, H), nn.ReLU(), pyg.GCNConv(H, H), nn.Tanh(), pyg.TAGConv(H, 3, K=2)]


def options_of(name: str) -> dict[str, Any]:
    return {"name": name} | ({"heads": 2} if name in ("gat", "transformer") else {})


@pytest.mark.parametrize("name", PLAIN)
def test_plain_torch_geometric_gives_the_runs_scores(name: str, tmp_path: Path) -> None:
    graph = woven(is_weighted=name == "gcnii")
    run = train(graph, tmp_path, options_of(name))
    data = to_pyg(graph)
    with torch.no_grad():
        weight = None if graph.edge_weight is None else data.edge_weight.double()
        plain = plain_model(run)(data.x.double(), data.edge_index, weight)
    assert np.abs(plain.numpy() - np.load(predict_run(run))).max() < 1e-9


def test_models_without_a_plain_twin_are_refused(tmp_path: Path) -> None:
    run = train(woven(), tmp_path, {"name": "dagnn"})
    with pytest.raises(UserError, match="`model.name` .=dagnn. must be one of gcn"):
        plain_model(run)


def test_weights_load_into_the_users_own_plain_model(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model: nn.Module = pyg.GraphSAGE(5, H, num_layers=3, out_channels=3, jk="cat")
        return model

    graph, fresh = woven(), make()
    run = train(graph, tmp_path, {}, from_pyg(make()))
    load_into(from_pyg(fresh), run)
    data = to_pyg(graph)
    with torch.no_grad():
        scores = fresh.double().eval()(data.x.double(), data.edge_index)
    wanted = np.load(predict_run(run, layers=from_pyg(make())))
    assert np.abs(scores.numpy() - wanted).max() < 1e-9


@pytest.mark.parametrize("name", ["gcn", "sage", "gat", "gcnii", "appnp", "dagnn"])
@pytest.mark.parametrize("is_directed", [False, True])
def test_a_few_nodes_get_the_scores_of_full_inference(
    name: str, is_directed: bool, tmp_path: Path
) -> None:
    graph = sparse_ring(is_directed=is_directed)
    model = PretrainedModel.from_pretrained(train(graph, tmp_path, options_of(name)))
    assert model.num_hops == 3
    nodes = [7, 41, 7]
    taken = neighbourhood(graph, np.array(nodes), model.num_hops + 1)
    assert taken.size < graph.num_nodes / 2
    assert torch.allclose(model.predict(graph, nodes), model(graph)[nodes], atol=1e-12)


def test_own_layers_are_evaluated_and_served(tmp_path: Path) -> None:
    graph = sparse_ring()
    run = train(graph, tmp_path, {}, own_layers())
    record = read_metrics(Path(run) / "metrics.jsonl")[-1]
    found = evaluate_run(run, weights="last", layers=own_layers())
    assert found["accuracy"] == record["accuracy"]
    model = PretrainedModel.from_pretrained(run, layers=own_layers())
    scores = np.load(predict_run(run, layers=own_layers()))
    assert np.abs(model.predict(graph, [3, 50]).numpy() - scores[[3, 50]]).max() < 1e-9
    with pytest.raises(UserError, match="weights must hold `layers.0.*load the weights of this"):
        load_into([nn.Linear(5, H), pyg.GATConv(H, 3)], run)


def test_a_larger_graph_is_predicted_and_evaluated(tmp_path: Path) -> None:
    small, large = woven(), woven(40)
    run = train(small, tmp_path, {"name": "gcn"})
    wanted = PretrainedModel.from_pretrained(run)(large)
    scores = np.load(predict_run(run, graph=large, out=str(tmp_path / "large.npy")))
    assert np.abs(scores - wanted.numpy()).max() < 1e-9
    right = wanted.argmax(1).numpy() == large.labels
    accuracy = evaluate_run(run, graph=large)["accuracy"]
    assert accuracy["test"] == right[large.test_mask & (large.labels >= 0)].mean()
    wider = replace(small, features=np.ones((small.num_nodes, 6), np.float32))
    with pytest.raises(UserError, match=r"`graph` .=6 features. must have the 5"):
        predict_run(run, graph=wider)


def test_embeddings_are_what_the_last_layer_reads(tmp_path: Path) -> None:
    graph = woven()
    run = train(graph, tmp_path, {"name": "sage"})
    rows = score_rows(Source(run), is_embedding=True)
    last = plain_model(run).last
    scores = last(torch.from_numpy(rows)).detach().numpy()
    assert np.abs(scores - score_rows(Source(run))).max() < 1e-12


def test_predictions_are_written_with_node_ids(tmp_path: Path) -> None:
    run = train(woven(), tmp_path, {"name": "gcn"})
    scores = np.load(predict_run(run))
    table = parquet.read_table(predict_run(run, out=str(tmp_path / "scores.parquet")))
    assert table.column("node_id").to_pylist() == list(range(len(scores)))
    assert np.array_equal(table.column("2").to_numpy(), scores[:, 2])
    back = np.load(predict_run(run, out=str(tmp_path / "ids.npy"), has_node_ids=True))
    assert np.array_equal(back["values"], scores)
    assert {file.name for file in tmp_path.iterdir()} == {"run", "scores.parquet", "ids.npy"}


def test_nodes_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    graph = sparse_ring(is_directed=True)
    model = PretrainedModel.from_pretrained(train(graph, tmp_path, {"name": "gcn"}))
    for nodes in ([60], [-1], []):
        with pytest.raises(UserError, match="`nodes` .=.* must be ids from 0 to 59"):
            model.predict(graph, nodes)
    cheb = [nn.Linear(5, H), pyg.ChebConv(H, 3, K=2)]
    run = train(graph, tmp_path / "cheb", {}, cheb)
    with pytest.raises(UserError, match="out-degrees of a directed graph"):
        PretrainedModel.from_pretrained(run, layers=cheb).predict(graph, [3])


def test_induced_graph_keeps_what_is_among_its_nodes() -> None:
    graph = woven(is_directed=True, is_weighted=True)
    nodes = np.array([0, 3, 4, 7, 11, 20])
    part = induced(graph, nodes)
    dense = np.zeros((2, graph.num_nodes, graph.num_nodes))
    for number, each in enumerate((graph, part)):
        target = np.repeat(np.arange(each.num_nodes), np.diff(each.indptr))
        assert each.edge_weight is not None
        dense[number, target, each.indices] = each.edge_weight
    assert np.array_equal(dense[1, :6, :6], dense[0][np.ix_(nodes, nodes)])
    assert np.array_equal(part.labels, graph.labels[nodes])


def test_every_deep_model_can_be_loaded_without_a_graph(tmp_path: Path) -> None:
    graph = woven()
    for preset in set(PRESETS) - {"gnnpipe-paper", "many-steps"}:
        name = str(PRESETS[preset]["model"]["name"])
        run = train(graph, tmp_path / preset, options_of(name))
        scores = PretrainedModel.from_pretrained(run)(graph)
        assert np.abs(scores.numpy() - np.load(predict_run(run))).max() < 1e-9
