"""What a configuration names: the layers of a model, the task, how weights change."""

from typing import Any

import torch
from scipy import sparse

from gnnpipe.chunk import ChunkedGraph
from gnnpipe.config import Config
from gnnpipe.graph import Graph
from gnnpipe.link_task import Link
from gnnpipe.models import build_layers
from gnnpipe.models.layer import Layer
from gnnpipe.optimizer import Updates
from gnnpipe.tasks import Task, make_task


def model_layers(config: Config, graph: Graph | ChunkedGraph) -> list[Layer]:
    """Builds the configured model for a graph, without storage: shapes, but no memory."""
    features: Any = graph.features  # scipy ships no types
    row_entries = features.nnz / graph.num_nodes if sparse.issparse(features) else None
    return layers_between(config, graph.num_features, graph.num_classes, row_entries=row_entries)


def layers_between(
    config: Config, in_channels: int, out_channels: int, *, row_entries: float | None = None
) -> list[Layer]:
    """Builds the configured model between two widths, without storage.

    Args:
        config: the run.
        in_channels: number of features.
        out_channels: number of classes.
        row_entries: mean number of stored features of a node; None for dense ones.
    """
    model = config.model
    with torch.device("meta"):
        return build_layers(
            model.name,
            in_channels=in_channels,
            hidden_channels=model.hidden_channels,
            out_channels=out_channels,
            num_layers=model.num_layers,
            dropout=model.dropout,
            options=model.options,
            row_entries=row_entries,
        )


def configured_task(config: Config, graph: Graph | ChunkedGraph) -> Task:
    """The task that the configuration names, on the labels or pairs that the graph has."""
    if config.task.kind == "link":
        return Link(graph, seed=config.seed, metric=config.task.link_metric)
    task, smoothing = config.task, config.training.label_smoothing
    return make_task(task.kind, graph, class_weight=task.class_weight, smoothing=smoothing)


def configured_updates(config: Config) -> Updates:
    """How the configuration wants weights to change."""
    return Updates(*(getattr(config.training, name) for name in Updates._fields))
