"""Measures what the planner needs to know of this machine: a few layers on a few chunks."""

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
from gnnpipe.costs import Line, Profile, role_of
from gnnpipe.mesh import Mesh
from gnnpipe.models.layer import Layer
from gnnpipe.stage import Flow, LocalLayer

NUM_ROUNDS = 3

Sample = tuple[float, float, float]
"""Rows, edges, seconds."""


def measure(graphs: Sequence[ChunkedGraph], layers: Callable[[], Sequence[Layer]]) -> Profile:
    """Times a short model, layer by layer, over all chunks.

    Args:
        graphs: one graph cut into different numbers of chunks.
        layers: makes the model on the meta device: an input layer, at least one convolution,
            an output layer.
    """
    samples: dict[str, list[Sample]] = defaultdict(list)
    step_s = 0.0
    for graph in graphs:
        step_s = _run(graph, layers(), samples)
    lines = {name: _fit(values) for name, values in samples.items()}
    return Profile(lines, step_s, f"measured here, {torch.get_num_threads()} thread(s)")


def _run(graph: ChunkedGraph, layers: Sequence[Layer], samples: dict[str, list[Sample]]) -> float:
    """Adds the quickest time of each (layer, chunk); returns the optimizer's per parameter."""
    like = torch.empty(0)
    comm = Comm(Mesh(1, 1), 0, groups=Groups(), like=like, timeout_s=60.0)
    plan = Plan(
        seed=0, bounds=[0, len(layers)], virtual_stages=1, period=1, cross_chunk_gradient=2.0
    )
    engine = build_engine(graph, layers, plan=plan, comm=comm, like=like)
    stage = engine.stages[0]
    clock = _Clock([local.layer for local in stage.layers])
    parameters = list(stage.parameters)
    optimizer = torch.optim.Adam(parameters, foreach=False)
    quickest: dict[tuple[int, str, int], float] = defaultdict(lambda: float("inf"))
    step_s = float("inf")
    for number in range(NUM_ROUNDS):
        stage.start_epoch(number + 1)
        gradients = []
        for chunk in range(graph.num_chunks):
            out = stage.forward(chunk, Flow(engine.inputs.features[chunk], {})).x
            assert isinstance(out, torch.Tensor)
            gradients.append(torch.ones_like(out))
            clock.book(quickest, "F", chunk)
        for chunk in reversed(range(graph.num_chunks)):
            clock.start()
            gradient = Flow(gradients.pop(), {})
            stage.backward(chunk, gradient, layer_done=clock.layer_done)
            clock.book(quickest, "B", chunk)
        stage.end_epoch()
        start_s = time.perf_counter()
        optimizer.step()
        step_s = min(step_s, time.perf_counter() - start_s)
    for (index, kind, chunk), seconds in quickest.items():
        first, last = (int(graph.cell_ptr[c * graph.num_ways]) for c in (chunk, chunk + 1))
        edges = int(graph.indptr[last] - graph.indptr[first])
        role = role_of(index, len(layers))
        samples[f"{role} {kind}"].append((last - first, edges, seconds))
    return step_s / max(1, sum(p.numel() for p in parameters))


class _Clock:
    """Times each layer's forward by hooks, its backward between two calls."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._times: list[tuple[int, float]] = []
        self._start_s = 0.0
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_: self.start())
            layer.register_forward_hook(lambda *_, index=index: self._stop(index))

    def start(self) -> None:
        self._start_s = time.perf_counter()

    def layer_done(self, local: LocalLayer) -> None:
        self._stop(local.layer_index)

    def book(self, quickest: dict[tuple[int, str, int], float], kind: str, chunk: int) -> None:
        for index, seconds in self._times:
            key = (index, kind, chunk)
            quickest[key] = min(quickest[key], seconds)
        self._times.clear()

    def _stop(self, index: int) -> None:
        now_s = time.perf_counter()
        self._times.append((index, now_s - self._start_s))
        self._start_s = now_s


def _fit(samples: Sequence[Sample]) -> Line:
    """The line without negative terms that is off by the least share."""
    values: Any = np.array(samples, dtype=np.float64)
    rows, edges, seconds = values.T
    columns = np.stack((np.ones_like(rows), rows, edges), axis=1)
    scale = np.maximum(columns.max(axis=0), 1.0)
    constants, _ = nnls(columns / scale / seconds[:, None], np.ones_like(seconds))
    return Line(*(float(value) for value in constants / scale))
