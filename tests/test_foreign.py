"""Modules of others through the pipeline: the same numbers as in plain torch_geometric."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch_geometric.nn as pyg
from combinations import read_run, save_partition
from drawn import woven
from foreign_cases import (
    ATTR,
    CASES,
    DEGREES,
    NUM_TYPES,
    Case,
    H,
    PlainModel,
    deep,
    graph_for,
    job_config,
    job_data,
    modules,
    plain_losses,
    two_tasks,
)
from one_process import losses, pipeline, settings, striped, weights_of
from process_pool import Job, ProcessPool
from torch import nn

from gnnpipe.datasets import from_pyg as graph_from_pyg
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.models.foreign import EdgeFacts, adapt, from_pyg
from gnnpipe.models.foreign.block import BlockLayer
from gnnpipe.models.foreign.hops import HopLayer, StackHopLayer
from gnnpipe.models.foreign.residual import ResidualLayer
from gnnpipe.models.gcn import GCNLayer
from gnnpipe.models.layer import Layer
from gnnpipe.reference import Reference
from gnnpipe.trainer import Trainer

DOCS = Path(__file__).resolve().parents[1] / "docs" / "convolutions.md"
BEGIN, END = "<!-- table: written by tests/test_foreign.py -->", "<!-- end of table -->"
TABLE_TOP = (
    "| convolution | adapter | takes | equal at C = 1 | tested with history |\n"
    "| --- | --- | --- | --- | --- |"
)


def adapted(parts: list[nn.Module], graph: Graph) -> list[Layer]:
    return adapt(copy.deepcopy(parts), in_channels=graph.num_features, facts=EdgeFacts.of(graph))


def case_modules(case: Case, graph: Graph) -> list[nn.Module]:
    return modules(case, graph.num_features, graph.num_classes)


@pytest.mark.parametrize("name", CASES)
def test_one_chunk_equals_plain_torch_geometric(name: str) -> None:
    case = CASES[name]
    graph = graph_for(case)
    parts = case_modules(case, graph)
    config = settings(virtual_stages=3)
    run = pipeline(graph, config, layers=adapted(parts, graph))
    plain = PlainModel(copy.deepcopy(parts), graph, case.takes)
    assert losses(run, 3) == pytest.approx(plain_losses(plain, graph, 3), rel=0, abs=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_losses_do_not_depend_on_the_stages(name: str) -> None:
    case = CASES[name]
    graph = graph_for(case)
    parts, found = case_modules(case, graph), []
    for stages in (1, 3):
        config = settings(virtual_stages=stages)
        chunk_id = striped(graph, 4)
        run = pipeline(graph, config, chunk_id, layers=adapted(parts, graph))
        found.append((losses(run, 2), weights_of(run)))
    assert found[0][0] == found[1][0]
    for key, weight in found[0][1].items():
        # RGATConv leaves weights that it does not use uninitialised.
        torch.testing.assert_close(
            found[1][1][key], weight, rtol=0, atol=0, equal_nan=True, msg=key
        )


def test_the_table_of_convolutions_in_the_docs_is_current() -> None:
    # GNNPIPE_WRITE_DOCS=1 writes it; equality at C = 1 is what the tests above check.
    lines = [TABLE_TOP]
    for name, case in CASES.items():
        graph = graph_for(case)
        layers = adapt([case.make()], in_channels=H, facts=EdgeFacts.of(graph))
        lines.append(f"| `{name}` | {adapter_name(layers)} | {takes(layers, case)} | yes | yes |")
    text = DOCS.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    current = f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}"
    if os.environ.get("GNNPIPE_WRITE_DOCS"):
        DOCS.write_text(current)
    assert text == current, "write it anew: GNNPIPE_WRITE_DOCS=1 pytest tests/test_foreign.py"


def adapter_name(layers: list[Layer]) -> str:
    inner = [layer.conv if isinstance(layer, ResidualLayer) else layer for layer in layers]
    blocks = [layer.kind for layer in inner if isinstance(layer, BlockLayer)]
    if blocks:
        return blocks[0]
    hops = sum(isinstance(layer, (HopLayer, StackHopLayer)) for layer in layers)
    return f"unrolled into {hops}"


def takes(layers: list[Layer], case: Case) -> str:
    if any(layer.operator in ("gcn", "sym", "laplacian") for layer in layers):
        return "edge weights"
    names = {"edge_weight": "edge weights", "edge_attr": "edge attributes"}
    names |= {"edge_type": "edge types", "signs": "edge signs", "x_0": "first rows"}
    return ", ".join(names[name] for name in sorted(case.takes)) or "-"


def test_edge_values_are_given_only_to_convolutions_made_for_them() -> None:
    facts = EdgeFacts(has_weight=True, attr_channels=ATTR, num_types=NUM_TYPES)
    plain, made = pyg.GATConv(H, H), pyg.GATConv(H, H, edge_dim=ATTR)
    gen = pyg.GENConv(H, H, norm="layer")  # takes attributes, but of its own width
    for conv, wanted in ((plain, ()), (made, ("edge_attr",)), (gen, ())):
        (layer,) = adapt([conv], in_channels=H, facts=facts)
        assert isinstance(layer, BlockLayer)
        assert layer.arguments == wanted


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mixed hops": (lambda: pyg.MixHopConv(H, H), "MixHopConv.* fits no adapter.*differs by"),
    "own normalisation": (lambda: pyg.PDNConv(H, H, ATTR, 4), "PDNConv.* fits no adapter"),
    "positions": (lambda: pyg.PointNetConv(), "needs `pos`, but the graph has no pos"),
    "attributes": (lambda: pyg.RGCNConv(H, H, 2), "cannot run|needs `edge_type`"),
    "signs": (lambda: pyg.SignedConv(H, H, True), "the graph has no signs"),
    "batch norm": (lambda: nn.BatchNorm1d(H), "holds a BatchNorm1d.*use nn.LayerNorm"),
    "hidden batch norm": (
        lambda: pyg.GINConv(nn.Sequential(nn.Linear(H, H), nn.BatchNorm1d(H))),
        "holds a BatchNorm1d",
    ),
    "graph norm": (lambda: pyg.LayerNorm(H), "must map each row by itself"),
    "direction": (lambda: pyg.SAGEConv(H, H, flow="target_to_source"), "must have flow="),
    "improved": (lambda: pyg.GCNConv(H, H, improved=True), "improved=True is not supported"),
    "edge dropout": (lambda: pyg.APPNP(2, 0.1, dropout=0.5), "APPNP.dropout.*drops edges"),
    "shared": (
        lambda: pyg.ARMAConv(H, H, num_layers=2, shared_weights=True),
        "would share weights between pipeline stages",
    ),
    "eigenvalue": (lambda: pyg.ChebConv(H, H, 2, normalization=None), "largest eigenvalue"),
    "no hops": (lambda: pyg.ChebConv(H, H, 1), "reads no neighbours"),
    "dense block": (lambda: deep(pyg.SAGEConv(H, H), "dense"), "block=dense is not supported"),
    "width": (lambda: nn.Linear(H + 1, H), "cannot run on rows of width 6"),
    "one number": (lambda: nn.Flatten(0), "must map each row by itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_no_adapter_is_refused_with_the_reason(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        adapt([make()], in_channels=H)


def test_a_pipeline_layer_of_another_width_is_refused() -> None:
    with pytest.raises(UserError, match="must take rows of width 6, not 8"):
        adapt([nn.Identity(), GCNLayer(8, 8)], in_channels=H)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_dropout_at_one_chunk_equals_the_reference(is_sparse: bool) -> None:
    # The same generator seeds, hence the same masks inside GATConv, and the same counters.
    graph = woven(is_sparse=is_sparse)
    torch.manual_seed(0)
    parts = [
        nn.Dropout(0.3),
        nn.Linear(5, H),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        pyg.GATConv(H, 3, heads=2, dropout=0.4),
        nn.Linear(H, 3),
    ]
    layers = [layer.double() for layer in adapted(parts, graph)]
    run = pipeline(graph, settings(virtual_stages=2), layers=copy.deepcopy(layers))
    plain = Reference(graph, layers, seed=7, lr=0.01, weight_decay=5e-4)
    expected = [plain.train_epoch(epoch) for epoch in range(1, 6)]
    assert losses(run, 5) == pytest.approx(expected, rel=0, abs=1e-9)
    assert len(set(expected)) == 5


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GCN": lambda: pyg.GCN(5, H, 3, 3, norm="layer_norm", norm_kwargs={"mode": "node"}),
    "GraphSAGE act first": lambda: pyg.GraphSAGE(
        5, H, 3, 3, act="elu", act_first=True, norm="layer_norm", norm_kwargs={"mode": "node"}
    ),
    "GIN": lambda: pyg.GIN(5, H, 2, 3, norm=None),
    "GAT": lambda: pyg.GAT(5, H, 2, 3, heads=2, v2=True),
    "EdgeCNN": lambda: pyg.EdgeCNN(5, H, 2, 3, norm=None),
    "PNA": lambda: pyg.PNA(
        5, H, 2, 3, aggregators=["mean", "max"], scalers=["identity"], deg=DEGREES
    ),
    "jk last": lambda: pyg.GCN(5, H, 3, 3, jk="last"),
    "jk cat": lambda: pyg.GCN(5, H, 4, 3, jk="cat"),
    "jk max": lambda: pyg.GraphSAGE(5, H, 4, 3, jk="max"),
    "jk lstm": lambda: pyg.GraphSAGE(5, H, 3, 3, jk="lstm"),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_equal_plain_torch_geometric(name: str) -> None:
    graph = woven(is_directed=True)
    torch.manual_seed(3)
    model = MODELS[name]().double()
    for part in model.modules():  # GIN's MLP has batch norms unless told otherwise
        if isinstance(part, pyg.MLP):
            part.norms = nn.ModuleList(nn.Identity() for _ in part.norms)
    twin = PlainModel([], graph, ())
    twin.parts.append(model)
    layers = adapt(copy.deepcopy(from_pyg(model)), in_channels=5, facts=EdgeFacts.of(graph))
    run = pipeline(graph, settings(virtual_stages=2), layers=layers)
    assert losses(run, 3) == pytest.approx(plain_losses(twin, graph, 3), rel=0, abs=1e-9)


def test_training_the_layers_trains_the_model_itself() -> None:
    graph = woven()
    model = pyg.GCN(5, H, 2, 3).double()
    before = [p.clone() for p in model.parameters()]
    layers = adapt(from_pyg(model), in_channels=5, facts=EdgeFacts.of(graph))
    losses(pipeline(graph, settings(), layers=layers), 1)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed)


def test_a_model_of_another_structure_is_refused() -> None:
    with pytest.raises(UserError, match="must be a basic GNN of torch_geometric.nn.models"):
        from_pyg(nn.Linear(2, 2))


def test_trainer_takes_modules_and_pyg_data_over_stages_and_ways(
    pool: ProcessPool, tmp_path: Path
) -> None:
    table = {"1x1": (1, 1), "3x1": (3, 1), "1x2": (1, 2), "2x2": (2, 2)}
    cut = tmp_path / "cut"
    save_partition(graph_from_pyg(job_data()), cut, num_chunks=4, num_ways=2)
    jobs = [
        Job(
            "foreign_job:train_job",
            stages * ways,
            {
                "num_stages": stages,
                "num_ways": ways,
                "directory": str(tmp_path / name),
                "partition": str(cut),
            },
        )
        for name, (stages, ways) in table.items()
    ]
    pool.run(jobs, timeout_s=120)
    runs = {name: read_run(tmp_path / name) for name in table}
    assert runs["1x1"].losses == runs["3x1"].losses
    assert runs["1x2"].losses == runs["2x2"].losses
    assert runs["1x1"].losses == pytest.approx(runs["1x2"].losses, rel=0, abs=1e-9)


def test_roc_auc_is_that_of_all_ways_together(pool: ProcessPool, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    save_partition(graph_from_pyg(two_tasks()), cut, num_chunks=4, num_ways=2)
    table = {"1x1": (1, 1), "2x2": (2, 2)}
    jobs = [
        Job(
            "foreign_job:auc_job",
            stages * ways,
            {
                "num_stages": stages,
                "num_ways": ways,
                "directory": str(tmp_path / name),
                "partition": str(cut),
            },
        )
        for name, (stages, ways) in table.items()
    ]
    pool.run(jobs, timeout_s=120)
    one, four = (read_run(tmp_path / name) for name in table)
    assert one.summary["metric"] == "roc_auc"
    assert four.accuracy[-1] == pytest.approx(one.accuracy[-1], rel=0, abs=1e-9)
    assert 0 < one.accuracy[-1]["val"] < 1


def test_a_list_that_does_not_fit_the_task_or_the_stages_is_refused(tmp_path: Path) -> None:
    data = job_data()
    config = job_config(1, 1, str(tmp_path))
    with pytest.raises(UserError, match="must give 3 scores for each node, not 4"):
        Trainer(config, graph=data, layers=[nn.Linear(5, 4)]).fit()
    config = job_config(1, 1, str(tmp_path / "2"), layers_per_stage=[34])
    with pytest.raises(UserError, match="must add up to the 1 layers"):
        Trainer(config, graph=data, layers=[nn.Linear(5, 3)]).fit()
