"""The deep models: exact at one chunk, the same for any stages, and each preset learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import woven
from one_process import losses, pipeline, reference, settings, striped, weights_of

from gnnpipe.config import PRESETS, from_dict
from gnnpipe.errors import UserError
from gnnpipe.full_graph import FullGraph, FullGraphView
from gnnpipe.models import build_layers
from gnnpipe.models.reversible import ReversibleLayer
from gnnpipe.trainer import Trainer

ZOO = ["deepergcn", "jknet", "appnp", "dagnn", "transformer", "dgmlp", "revgnn"]


@pytest.mark.parametrize("name", ZOO)
def test_one_chunk_equals_the_reference(name: str) -> None:
    graph, config = woven(is_directed=True), settings(name, virtual_stages=3)
    run, plain = pipeline(graph, config), reference(graph, config)
    assert losses(run, 5) == pytest.approx(losses(plain, 5), rel=0, abs=1e-9)
    assert run.evaluate() == plain.evaluate()


@pytest.mark.parametrize("name", ZOO)
def test_losses_do_not_depend_on_the_stages(name: str) -> None:
    graph = woven()
    one, three = (
        pipeline(graph, settings(name, virtual_stages=v), striped(graph, 4)) for v in (1, 3)
    )
    assert losses(one, 3) == losses(three, 3)
    weights = weights_of(three)
    assert all(torch.equal(weight, weights[key]) for key, weight in weights_of(one).items())


@pytest.mark.parametrize("name", ZOO)
def test_preset_trains_on_the_digits(name: str, tmp_path: Path) -> None:
    assert name in PRESETS
    values: dict[str, Any] = {
        "preset": name,
        "partition": {"num_chunks": 4},
        "training": {"epochs": 30, "lr": 0.01},
        "run": {"dir": str(tmp_path), "tensorboard": False, "threads": 1},
    }
    summary = Trainer(from_dict(values)).fit()
    assert summary["val_at_best"] > 0.5  # ten classes


@torch.no_grad()
def test_reversible_layers_can_be_computed_backwards() -> None:
    graph, torch_rng = woven(is_directed=True), torch.Generator().manual_seed(0)
    full = FullGraph(graph, dtype=torch.float64)
    x = first = torch.randn(graph.num_nodes, 8, generator=torch_rng, dtype=torch.float64)
    layers = [ReversibleLayer(8, dropout=0.5).double() for _ in range(20)]
    views = [FullGraphView(full, "gcn", stream=(0, 1, i)) for i in range(20)]
    for layer, view in zip(layers, views, strict=True):
        x = layer(x, view)
    assert float((x - first).abs().max()) > 0.1
    for i, layer in reversed(list(enumerate(layers))):
        x = layer.inverse(x, FullGraphView(full, "gcn", stream=(0, 1, i)))
    assert torch.allclose(x, first, atol=1e-10)
    with pytest.raises(UserError, match="`model.hidden_channels` .=7. must be even"):
        ReversibleLayer(7)


def test_decoupled_depth_is_half_hops_and_carries_one_tensor() -> None:
    layers = build_layers(
        "dgmlp",
        in_channels=5,
        hidden_channels=8,
        out_channels=3,
        num_layers=7,
        dropout=0.0,
        options={},
    )
    assert [layer.operator for layer in layers] == ["none", *["gcn"] * 4, *["none"] * 4]
    assert {layer.carried_channels(n) for layer in layers for n in layer.writes} == {8}


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="`heads` .=3. must divide `hidden_channels`"):
        build_layers(
            "transformer",
            in_channels=2,
            hidden_channels=8,
            out_channels=2,
            num_layers=1,
            dropout=0.0,
            options={"heads": 3},
        )
