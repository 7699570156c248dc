"""Exact inference from the weights of a run directory, in one process.

On the run's own graph, or on another one with the same features: a changed or a larger one.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gnnpipe import chunk
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.config import Config, from_dict, load_config, to_dict
from gnnpipe.configured import layers_between
from gnnpipe.console import working
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.interchange import write_rows
from gnnpipe.models import end_widths
from gnnpipe.models.foreign import EdgeFacts, adapt
from gnnpipe.models.layer import Layer
from gnnpipe.run_directory import CONFIG_FILE, PARTITION_DIR, WEIGHTS_DIR, WHOLE_PARTITION_DIR
from gnnpipe.runs import PipelineRun
from gnnpipe.state import named_state
from gnnpipe.trainer import cut_graph, load_data, set_threads
from gnnpipe.weights import check_weights, load_weights
from gnnpipe.world import World

PREDICTIONS_FILE = "predictions.npy"


class Source(NamedTuple):
    """Which trained model, on which graph."""

    run_dir: str
    weights: str = "best"
    """``best`` or ``last``."""
    layers: Sequence[nn.Module] | None = None
    """The modules that were trained, if not the configured model's."""
    graph: Graph | None = None
    """Another graph with the same features; None is the run's own."""


class Loaded(NamedTuple):
    """A trained model on its graph."""

    run: PipelineRun
    chunked: ChunkedGraph
    metadata: dict[str, str]


def evaluate_run(
    run_dir: str,
    *,
    weights: str = "best",
    layers: Sequence[nn.Module] | None = None,
    graph: Graph | None = None,
) -> dict[str, Any]:
    """Evaluates saved weights exactly.

    Args:
        run_dir: a run directory.
        weights: ``best`` or ``last``.
        layers: what ``Trainer(layers=...)`` was given, if it was.
        graph: evaluates on this one instead of the run's own.

    Returns:
        ``weights``, the ``epoch`` they are from, and ``accuracy`` of each split.

    Raises:
        UserError: the directory lacks sound weights or a sound partition.
    """
    loaded = _load(Source(run_dir, weights, layers, graph))
    epoch = int(loaded.metadata["epoch"]) if "epoch" in loaded.metadata else None
    with working("evaluating"):
        return {"weights": weights, "epoch": epoch, "accuracy": loaded.run.evaluate()}


def predict_run(
    run_dir: str,
    *,
    weights: str = "best",
    out: str | None = None,
    has_node_ids: bool = False,
    layers: Sequence[nn.Module] | None = None,
    graph: Graph | None = None,
) -> Path:
    """Writes the class scores of every node.

    Args:
        run_dir: a run directory.
        weights: ``best`` or ``last``.
        out: the file, ``.npy`` or ``.parquet``; None is ``predictions.npy`` in the run directory.
        has_node_ids: put the ids into an ``.npy`` file too, see
            :func:`gnnpipe.interchange.write_rows`; a Parquet file always has them.
        layers: as :func:`evaluate_run` takes them.
        graph: likewise.

    Returns:
        Path of the file: logits ``[N, num_classes]`` in the data set's node order.
    """
    scores = score_rows(Source(run_dir, weights, layers, graph))
    path = Path(run_dir) / PREDICTIONS_FILE if out is None else Path(out)
    if has_node_ids or path.suffix == ".parquet":
        _whole(path, lambda temporary: write_rows(temporary, scores))
    else:
        _whole(path, lambda temporary: np.save(temporary, scores, allow_pickle=False))
    return path


def score_rows(source: Source, *, is_embedding: bool = False) -> NDArray[Any]:
    """Class scores of every node, or what the last layer makes them from.

    Args:
        source: model and graph.
        is_embedding: the rows that enter the last layer instead of the scores.

    Returns:
        ``[N, width]`` in the graph's own node order.
    """
    loaded = _load(source)
    engine, entering = loaded.run.engine, []
    last = engine.stages[0].layers[-1].layer

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        entering.append(inputs[0])

    with last.register_forward_pre_hook(note), working("predicting"):
        scores = engine.infer()
    rows = entering[0] if is_embedding else scores
    assert isinstance(rows, Tensor)
    ordered: NDArray[Any] = np.empty(tuple(rows.shape), rows.cpu().numpy().dtype)
    ordered[loaded.chunked.node_id] = rows.cpu().numpy()
    return ordered


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file under another name first, so that it is there whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(source: Source) -> Loaded:
    """Rebuilds a run in this one process and gives it the saved weights."""
    directory = Path(source.run_dir)
    config = _alone(load_config(str(directory / CONFIG_FILE)))
    tensors, metadata = load_weights(directory / WEIGHTS_DIR / f"{source.weights}.safetensors")
    set_threads(config, 1)
    chunked = _in_one_piece(source.graph) if source.graph else _graph(config, directory)
    layers = _layers(config, chunked, source, tensors)
    shapes = {name: tensor.shape for name, tensor in named_state(list(enumerate(layers))).items()}
    check_weights(tensors, shapes)
    world = World(0, 1, device=torch.device("cpu"), store=None)
    run = PipelineRun(config, chunked, world=world, layers=layers)
    run.load_weights(tensors)
    return Loaded(run, chunked, metadata)


def _layers(
    config: Config, chunked: ChunkedGraph, source: Source, tensors: dict[str, Tensor]
) -> Sequence[Layer]:
    """The model, as wide at its ends as the weights, whatever classes the graph shows."""
    if source.layers is not None:
        facts = EdgeFacts.of(chunked)
        return adapt(source.layers, in_channels=chunked.num_features, facts=facts)
    widths = end_widths(config.model.name, config.model.num_layers, tensors)
    if widths[0] != chunked.num_features:
        raise UserError(
            f"`graph` (={chunked.num_features} features) must have the {widths[0]} that the model "
            "was trained on; make its features the same way"
        )
    return layers_between(config, *widths)


def _alone(config: Config) -> Config:
    """The same run as a single process without histories."""
    values = to_dict(config)
    values["parallel"] = {}
    values["history"] = {}
    return from_dict(values)


def _graph(config: Config, directory: Path) -> ChunkedGraph:
    """The partition that the run used; the reference has none and loads its data again."""
    whole = directory / WHOLE_PARTITION_DIR  # of an inductive run, beside the training part
    own = whole if whole.exists() else directory / PARTITION_DIR
    path = config.partition.path or own
    if Path(path).exists():
        return chunk.load(path)
    return cut_graph(load_data(config), config)


def _in_one_piece(graph: Graph) -> ChunkedGraph:
    """A graph as a single chunk, which inference needs no more of."""
    ids = np.zeros(graph.num_nodes, np.int32)
    return chunk.cut(graph, ids, ids, num_ways=1, method="contiguous", seed=0)
