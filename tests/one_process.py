"""Pipelines that run whole in this process, and the plain loop they are compared with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from drawn import cut
from torch import Tensor

from gnnpipe.config import Config, from_dict
from gnnpipe.configured import model_layers
from gnnpipe.graph import Graph
from gnnpipe.history import Table
from gnnpipe.models import build_layers
from gnnpipe.models.layer import Layer
from gnnpipe.reference_run import ReferenceRun
from gnnpipe.runs import PipelineRun
from gnnpipe.sections import TrainingConfig
from gnnpipe.stage import LocalLayer
from gnnpipe.world import World

CPU = torch.device("cpu")
TRAINING = {
    key: value
    for key, value in dataclasses.asdict(TrainingConfig()).items()
    if key not in ("lr", "weight_decay")
}
MODELS = ["gcn", "sage", "gin", "gat", "gcnii", "resgcn+"]


def settings(name: str = "gcn", *, seed: int = 7, **changes: Any) -> Config:
    """A small model in float64 with dropout; ``changes`` are keys of any section.

    Args:
        name: the model.
        seed: of weights, orders and masks.
        **changes: keys that are unique among the sections, such as ``period=3``;
            ``keeps_dropout`` and ``history_momentum`` are the history's own.
    """
    values: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 3,
            "hidden_channels": 8,
            "dropout": 0.5,
            "dtype": "float64",
            "norm": None,
            "aggregator": None,
        },
        "training": {"lr": 0.01, "weight_decay": 5e-4} | TRAINING,
        "kernels": {"backend": "auto"},
        "memory": {"mode": "keep"},
        "parallel": {
            "virtual_stages": 1,
            "layers_per_stage": None,
            "order_of_actions": "fill_drain",
        },
        "history": {
            "period": 1,
            "warm_start": "exact",
            "order": "shuffled",
            "cross_chunk_gradient": 2.0,
            "keeps_dropout": True,
            "history_momentum": 0.0,
            "predict": None,
            "max_drift": None,
            "refresh_every": 0,
            "correct_every": None,
            "strata": 16,
            "late_gradient": 0.0,
            "late_gradient_momentum": 0.0,
            "history_dtype": None,
        },
    }
    values["model"] |= {"name": name} | ({"heads": 2} if name == "gat" else {})
    for key, value in changes.items():
        (section,) = [section for section in values.values() if key in section]
        section[key] = value
    parallel, history = values["parallel"], values["history"]
    parallel["schedule"] = parallel.pop("order_of_actions")
    history["dropout"] = history.pop("keeps_dropout")
    history["momentum"] = history.pop("history_momentum")
    history["dtype"] = history.pop("history_dtype")
    return from_dict({"seed": seed, **values})


def one_layer_model(name: str) -> list[Layer]:
    with torch.device("meta"):
        return build_layers(
            name,
            in_channels=5,
            hidden_channels=8,
            out_channels=3,
            num_layers=1,
            dropout=0.0,
            options={"heads": 2} if name == "gat" else {},
        )


def pipeline(
    graph: Graph,
    config: Config,
    chunk_id: Sequence[int] | None = None,
    *,
    layers: Sequence[Layer] | None = None,
) -> PipelineRun:
    """A run with its first history; without ``chunk_id`` the graph is one chunk."""
    chunked = cut(graph, [0] * graph.num_nodes if chunk_id is None else list(chunk_id))
    world = World(0, 1, device=CPU, store=None)
    model = model_layers(config, chunked) if layers is None else layers
    run = PipelineRun(config, chunked, world=world, layers=model)
    run.warm_start()
    return run


def reference(graph: Graph, config: Config) -> ReferenceRun:
    return ReferenceRun(config, graph, device=CPU)


def losses(run: PipelineRun | ReferenceRun, epochs: int) -> list[float]:
    return [run.train_epoch(epoch) for epoch in range(1, epochs + 1)]


def striped(graph: Graph, num_chunks: int) -> list[int]:
    """Neighbours in number lie in different chunks, so that most edges cross."""
    return [node % num_chunks for node in range(graph.num_nodes)]


def layers_of(run: PipelineRun) -> list[LocalLayer]:
    return [local for _, stage in sorted(run.engine.stages.items()) for local in stage.layers]


def tables_of(run: PipelineRun) -> dict[int, Table]:
    """The training tables by layer index."""
    found = {local.layer_index: local.table for local in layers_of(run)}
    return {index: table for index, table in found.items() if table is not None}


def weights_of(run: PipelineRun | ReferenceRun) -> dict[str, Tensor]:
    weights = run.weights()
    assert weights is not None
    return {name: weight.clone() for name, weight in weights.items()}


def gradients_of(run: PipelineRun) -> dict[str, Tensor]:
    """Parameter gradients by the name that files give the parameter."""
    return {
        f"layers.{local.layer_index}.{name}": parameter.grad.clone()
        for local in layers_of(run)
        for name, parameter in local.layer.named_parameters()
        if parameter.grad is not None
    }
