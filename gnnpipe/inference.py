"""Exact inference from the weights of a run directory, in one process."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gnnpipe import chunk
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.config import Config, from_dict, load_config, to_dict
from gnnpipe.run_directory import CONFIG_FILE, PARTITION_DIR, WEIGHTS_DIR
from gnnpipe.runs import PipelineRun, model_layers
from gnnpipe.state import named_state
from gnnpipe.trainer import cut_graph, load_data, set_threads
from gnnpipe.weights import check_weights, load_weights
from gnnpipe.world import World

PREDICTIONS_FILE = "predictions.npy"


class Loaded(NamedTuple):
    """A trained model on its graph."""

    run: PipelineRun
    chunked: ChunkedGraph
    metadata: dict[str, str]


def evaluate_run(run_dir: str, *, weights: str = "best") -> dict[str, Any]:
    """Evaluates saved weights exactly.

    Args:
        run_dir: a run directory.
        weights: ``best`` or ``last``.

    Returns:
        ``weights``, the ``epoch`` they are from, and ``accuracy`` of each split.

    Raises:
        UserError: the directory lacks sound weights or a sound partition.
    """
    loaded = _load(run_dir, weights)
    epoch = int(loaded.metadata["epoch"]) if "epoch" in loaded.metadata else None
    return {"weights": weights, "epoch": epoch, "accuracy": loaded.run.evaluate()}


def predict_run(run_dir: str, *, weights: str = "best", out: str | None = None) -> Path:
    """Writes the class scores of every node.

    Args:
        run_dir: a run directory.
        weights: ``best`` or ``last``.
        out: the file; None is ``predictions.npy`` in the run directory.

    Returns:
        Path of the ``.npy`` file: logits ``[N, num_classes]`` in the data set's node order.
    """
    loaded = _load(run_dir, weights)
    logits = loaded.run.engine.infer()
    assert logits is not None
    scores = np.empty(tuple(logits.shape), logits.cpu().numpy().dtype)
    scores[loaded.chunked.node_id] = logits.cpu().numpy()
    path = Path(run_dir) / PREDICTIONS_FILE if out is None else Path(out)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, scores, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _load(run_dir: str, weights: str) -> Loaded:
    """Rebuilds a run in this one process and gives it the saved weights."""
    directory = Path(run_dir)
    config = _alone(load_config(str(directory / CONFIG_FILE)))
    tensors, metadata = load_weights(directory / WEIGHTS_DIR / f"{weights}.safetensors")
    set_threads(config, 1)
    chunked = _graph(config, directory)
    layers = model_layers(config, chunked)
    shapes = {name: tensor.shape for name, tensor in named_state(list(enumerate(layers))).items()}
    check_weights(tensors, shapes)
    world = World(0, 1, device=torch.device("cpu"), store=None)
    run = PipelineRun(config, chunked, world=world, layers=layers)
    run.load_weights(tensors)
    return Loaded(run, chunked, metadata)


def _alone(config: Config) -> Config:
    """The same run as a single process without histories."""
    values = to_dict(config)
    values["parallel"] = {}
    values["history"] = {}
    return from_dict(values)


def _graph(config: Config, directory: Path) -> ChunkedGraph:
    """The partition that the run used; the reference has none and loads its data again."""
    path = config.partition.path or directory / PARTITION_DIR
    if Path(path).exists():
        return chunk.load(path)
    return cut_graph(load_data(config), config)
