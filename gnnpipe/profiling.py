"""Measures what the planner needs to know of this machine: a few layers on a few chunks."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from gnnpipe.assembly import Plan, build_engine
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.comm import Comm, Groups
from gnnpipe.costs import ENTER, Line, Profile, role_of
from gnnpipe.engine import Engine
from gnnpipe.mesh import Mesh
from gnnpipe.models.layer import Layer
from gnnpipe.optimizer import Updates, make_optimizer
from gnnpipe.stage import Flow, Stage

NUM_ROUNDS = 3
"""Counted ones."""

Sample = tuple[float, float, float]
"""Rows, edges, seconds."""


def measure(
    graphs: Sequence[ChunkedGraph],
    layers: Callable[[], Sequence[Layer]],
    *,
    strata: int = 0,
    late_gradient: float = 0.0,
) -> Profile:
    """Times a short model, layer by layer, over all chunks.

    Args:
        graphs: one graph cut into different numbers of chunks.
        layers: makes the model on the meta device: an input layer, at least one convolution,
            an output layer.
        strata: most strata whose drift moves historical rows; 0 leaves them.
        late_gradient: factor on earlier epochs' gradients; above 0 they take their time.
    """
    samples: dict[str, list[Sample]] = defaultdict(list)
    step_s = 0.0
    for graph in graphs:
        step_s = _run(graph, layers(), samples, strata, late_gradient)
    lines = {name: _fit(values) for name, values in samples.items()}
    return Profile(lines, step_s, f"measured here, {torch.get_num_threads()} thread(s)")


def _run(
    graph: ChunkedGraph,
    layers: Sequence[Layer],
    samples: dict[str, list[Sample]],
    strata: int,
    late_gradient: float,
) -> float:
    """Adds the middle time of each (layer, chunk); returns the optimizer's per parameter."""
    like = torch.empty(0)
    comm = Comm(Mesh(1, 1), 0, groups=Groups(), like=like, timeout_s=60.0)
    count = len(layers)
    # A stage for each layer, whose calls are timed: what the engine will call, from outside.
    plan = Plan(
        seed=0,
        bounds=range(count + 1),
        virtual_stages=count,
        period=1,
        cross_chunk_gradient=1.0,  # Another factor costs a pass over late gradients.
        strata=strata,
        late_gradient=late_gradient,
    )
    engine = build_engine(graph, layers, plan=plan, comm=comm, like=like)
    stages = [engine.stages[index] for index in range(count)]
    parameters = [parameter for stage in stages for parameter in stage.parameters]
    optimizer = make_optimizer(parameters, Updates())
    found: dict[tuple[int, str, int], list[float]] = defaultdict(list)
    step_s = float("inf")
    for number in range(1 + NUM_ROUNDS):
        if number == 1:
            found.clear()  # The first round compiles.
        for is_split in (False, True):
            for stage in stages:
                stage.start_epoch(2 * number + is_split + 1)
                stage.start_step()
            _train(engine, stages, found, is_split=is_split)
            for stage in stages:
                stage.end_step()
                stage.end_epoch()
        start_s = time.perf_counter()
        optimizer.step()
        step_s = min(step_s, time.perf_counter() - start_s)
    for (index, kind, chunk), seconds in found.items():
        first, last = (int(graph.cell_ptr[c * graph.num_ways]) for c in (chunk, chunk + 1))
        edges = int(graph.indptr[last] - graph.indptr[first])
        sample = (last - first, edges, statistics.median(seconds))
        samples[f"{role_of(index, count)} {kind}"].append(sample)
    return step_s / max(1, sum(p.numel() for p in parameters))


def _train(
    engine: Engine,
    stages: Sequence[Stage],
    found: dict[tuple[int, str, int], list[float]],
    *,
    is_split: bool,
) -> None:
    """One epoch, in which every call of a stage is timed; forwards in the plain schedule only."""
    num_chunks = len(engine.inputs.targets)
    gradients = []
    for chunk in range(num_chunks):
        flow = Flow(engine.inputs.features[chunk], {})
        for index, stage in enumerate(stages):
            enter_s = time.perf_counter()
            stage.enter(chunk)
            start_s = time.perf_counter()
            flow = stage.forward(chunk, flow)
            if stage is stages[-1]:
                gradients.append(_loss_gradient(engine, chunk, flow))
            if not is_split:
                found[index, "F", chunk].append(time.perf_counter() - start_s)
                found[index, ENTER, chunk].append(start_s - enter_s)
    for chunk in reversed(range(num_chunks)):
        flow = Flow(gradients.pop(), {})
        for index, stage in reversed(list(enumerate(stages))):
            start_s = time.perf_counter()
            flow = stage.backward(chunk, flow, is_split=is_split)
            end_s = time.perf_counter()
            found[index, "I" if is_split else "B", chunk].append(end_s - start_s)
            if is_split:
                stage.finish_backward(chunk)
                found[index, "G", chunk].append(time.perf_counter() - end_s)


def _loss_gradient(engine: Engine, chunk: int, flow: Flow) -> torch.Tensor:
    """What the engine does with the last layer's result."""
    assert isinstance(flow.x, torch.Tensor)
    targets = engine.inputs.targets[chunk]
    labels, mask = targets.labels, targets.masks[0]
    return engine.inputs.task.loss(flow.x, labels, mask, total=max(1.0, float(mask.sum())))[1]


def _fit(samples: Sequence[Sample]) -> Line:
    """The line without negative terms that is off by the least share."""
    values: Any = np.array(samples, dtype=np.float64)
    rows, edges, seconds = values.T
    columns = np.stack((np.ones_like(rows), rows, edges), axis=1)
    scale = np.maximum(columns.max(axis=0), 1.0)
    constants, _ = nnls(columns / scale / seconds[:, None], np.ones_like(seconds))
    return Line(*(float(value) for value in constants / scale))
