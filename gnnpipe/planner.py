"""Chooses stages, ways, chunks and virtual stages: predicts every setting, takes the quickest.

The prediction simulates the very schedule that the engine will run. An action lasts as long as
its layers on a mean chunk, and waits for the halo of each layer as far as interior rows do not
hide it. Graph parallelism (one stage) and a single rank are settings like any other, so a case
that is too small, sparse or shallow for a pipeline gets one of those.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from gnnpipe.costs import Links, Profile, role_of
from gnnpipe.errors import UserError
from gnnpipe.memory import (
    PLAIN,
    FeatureCounts,
    MemoryBytes,
    Storage,
    WayCounts,
    predict_memory_bytes,
)
from gnnpipe.schedule import Action, Timeline, fill_drain, simulate, split_layers
from gnnpipe.shapes import LayerShape, num_parameters
from gnnpipe.volume import MirrorCounts, crossings, predict_comm_bytes

TIE = 1.02
"""Settings within this factor are as quick; the simplest of them is taken."""


class Setting(NamedTuple):
    """One way to run."""

    num_stages: int
    num_ways: int
    num_chunks: int
    virtual_stages: int

    @property
    def num_ranks(self) -> int:
        """Processes."""
        return self.num_stages * self.num_ways


class WayShape(NamedTuple):
    """What a number of ways does to a graph."""

    mirrors: MirrorCounts
    interior_share: float
    """Share of edges whose target reads no other way: what a halo can hide behind."""


class GraphShape(NamedTuple):
    """The counts that costs depend on."""

    num_nodes: int
    num_edges: int
    features: FeatureCounts
    is_symmetric: bool
    ways: Callable[[int], WayShape]


class Prediction(NamedTuple):
    """What a setting would do."""

    setting: Setting
    sizes: list[int]
    """Layers of each stage, virtual ones included."""
    epoch_s: float
    bubble_fraction: float
    comm_bytes: dict[str, int]
    memory_bytes: int
    """Of the rank with the most."""
    timeline: Timeline
    memory: MemoryBytes
    """What that rank holds, by purpose."""


class Planner:
    """Predicts settings for one model on one graph.

    Args:
        layers: the whole model.
        graph: its counts.
        profile: of the machine.
        links: the network.
        storage: how a rank holds its numbers.
        steps: optimizer steps of an epoch.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        graph: GraphShape,
        *,
        profile: Profile,
        links: Links,
        storage: Storage = PLAIN,
        steps: int = 1,
    ) -> None:
        self._layers = layers
        self._graph = graph
        self._profile = profile
        self._links = links
        self._storage = storage
        self._steps = steps
        self._ways: dict[int, WayShape] = {}

    def predict(self, setting: Setting) -> Prediction:
        """Simulates one epoch."""
        S, v = setting.num_stages, setting.virtual_stages
        costs = [self._layer_s(i, setting) for i in range(len(self._layers))]
        sizes = split_layers([f + b for f, b in costs], S * v)
        bounds = [sum(sizes[:stage]) for stage in range(S * v + 1)]
        spent = [
            tuple(sum(part) for part in zip(*costs[low:high], strict=True))
            for low, high in pairwise(bounds)
        ]
        crossing = self._crossing_bytes(bounds, setting)

        def occupancy(action: Action) -> float:
            is_local = self._links.ranks_per_host >= setting.num_ranks
            return self._links.seconds(crossing.get(action[:2], 0.0), is_local=is_local)

        steps = min(self._steps, setting.num_chunks)
        timeline = simulate(
            fill_drain(S, setting.num_chunks, v, steps=steps),
            lambda action: spent[action.stage_index][action.kind == "B"],
            transfer=self._links.latency_s,
            occupancy=occupancy,
            steps=steps,
        )
        tail_s = steps * max(self._tail_s(bounds, rank, setting) for rank in range(S))
        epoch_s = timeline.makespan_s + tail_s
        halo_s = sum(self._halo_s(i, setting) for i in range(len(self._layers)))
        busy_s = sum(timeline.busy_s) + tail_s * S - 2 * setting.num_chunks * halo_s
        needs = [self._memory_bytes(bounds, rank, setting) for rank in range(S)]
        memory = max(needs, key=lambda need: need.total)
        return Prediction(
            setting,
            sizes,
            epoch_s,
            max(0.0, 1.0 - busy_s / (S * epoch_s)),
            self._comm_bytes(bounds, setting, steps=steps),
            memory.total,
            timeline,
            memory,
        )

    def _layer_s(self, index: int, setting: Setting) -> tuple[float, float]:
        """Forward and backward of one chunk through one layer, the halo's wait included."""
        rows, edges = self._chunk(setting)
        role = role_of(index, len(self._layers))
        halo_s = self._halo_s(index, setting)
        forward_s = self._profile.layer_s(role, "F", rows, edges)
        return forward_s + halo_s, self._profile.layer_s(role, "B", rows, edges) + halo_s

    def _halo_s(self, index: int, setting: Setting) -> float:
        """How long one chunk waits for its halo in one layer, beyond what interior rows hide."""
        layer, W = self._layers[index], setting.num_ways
        if W == 1 or layer.operator == "none":
            return 0.0
        way = self._way(W)
        rows = (way.mirrors.incoming + way.mirrors.outgoing) / 2 / (W * setting.num_chunks)
        num_bytes = rows * layer.table_channels * self._storage.element_bytes
        is_local = self._links.ranks_per_host >= W
        travel_s = self._links.seconds(num_bytes, is_local=is_local) + self._links.latency_s
        if layer.operator.startswith("edges"):
            return travel_s
        line = self._profile.lines[f"{role_of(index, len(self._layers))} F"]
        hidden_s = line.per_edge_s * self._chunk(setting)[1] * way.interior_share
        return max(0.0, travel_s - hidden_s)

    def _tail_s(self, bounds: Sequence[int], rank: int, setting: Setting) -> float:
        """After the last backward: what is left of the weight sums, and the optimizer."""
        S, W, _, v = setting
        held = [self._layers[i] for s in range(rank, S * v, S) for i in _of(bounds, s)]
        step_s = num_parameters(held) * self._profile.step_s_per_parameter
        if W == 1:
            return step_s
        num_bytes = 2 * (W - 1) / W * num_parameters(held) * self._storage.element_bytes
        is_local = self._links.ranks_per_host >= W
        sums_s = self._links.seconds(num_bytes, is_local=is_local)
        rows, edges = self._chunk(setting)
        hidden_s = sum(
            self._profile.layer_s(role_of(i, len(self._layers)), "B", rows, edges)
            for i in _of(bounds, rank)
        )
        return step_s + max(0.0, sums_s - hidden_s) + 2 * (W - 1) * self._links.latency_s

    def _crossing_bytes(
        self, bounds: Sequence[int], setting: Setting
    ) -> dict[tuple[int, str], float]:
        """Bytes of one chunk that a stage's forward, and its backward, sends on."""
        rows = self._chunk(setting)[0]
        found = {}
        cuts = crossings(self._layers, bounds=bounds, num_stages=setting.num_stages)
        for stage, cut in enumerate(cuts):
            forward, backward = cut.carried_forward, cut.carried_backward
            found[stage, "F"] = (cut.boundary + forward) * rows * self._storage.element_bytes
            found[stage + 1, "B"] = (cut.boundary + backward) * rows * self._storage.element_bytes
        return found

    def _comm_bytes(
        self, bounds: Sequence[int], setting: Setting, *, steps: int = 1
    ) -> dict[str, int]:
        return predict_comm_bytes(
            self._layers,
            bounds=bounds,
            num_stages=setting.num_stages,
            num_nodes=self._graph.num_nodes,
            num_ways=setting.num_ways,
            mirrors=self._way(setting.num_ways).mirrors,
            element_bytes=self._storage.element_bytes,
            steps=steps,
            recalled=self._storage.kept_copies > 0,
            num_chunks=setting.num_chunks,
        )

    def _memory_bytes(self, bounds: Sequence[int], rank: int, setting: Setting) -> MemoryBytes:
        S, W, C, v = setting
        graph, mirrors = self._graph, self._way(W).mirrors
        entries = graph.features.num_entries
        way = WayCounts(
            num_rows=graph.num_nodes // W,
            in_mirrors=mirrors.incoming // W,
            out_mirrors=mirrors.outgoing // W,
            num_edges=graph.num_edges // W,
            is_symmetric=graph.is_symmetric,
            largest_chunk=-(-graph.num_nodes // (W * C)),
            is_closed=W * C == 1,
        )
        return predict_memory_bytes(
            [self._layers[i] for s in range(rank, S * v, S) for i in _of(bounds, s)],
            is_first=rank == 0,
            num_cuts=(rank > 0) + (rank < S - 1),
            way=way,
            features=graph.features._replace(num_entries=entries and entries // W),
            num_chunks=C,
            storage=self._storage,
        )

    def _chunk(self, setting: Setting) -> tuple[float, float]:
        """Rows and edges of a mean chunk of one way."""
        parts = setting.num_ways * setting.num_chunks
        return self._graph.num_nodes / parts, self._graph.num_edges / parts

    def _way(self, num_ways: int) -> WayShape:
        if num_ways not in self._ways:
            self._ways[num_ways] = self._graph.ways(num_ways)
        return self._ways[num_ways]


def settings(
    num_ranks: int, *, num_layers: int, chunks: Sequence[int], num_nodes: int
) -> Iterator[Setting]:
    """All settings for exactly ``num_ranks`` ranks, and one rank alone.

    Args:
        num_ranks: ranks.
        num_layers: layers of the model, input and output included.
        chunks: numbers of chunks to try; a single stage always tries 1, which is exact.
        num_nodes: nodes of the graph, at least one for each chunk of each way.
    """
    yield Setting(1, 1, 1, 1)
    if num_ranks == 1:
        return
    for S in (S for S in range(1, num_ranks + 1) if num_ranks % S == 0):
        W = num_ranks // S
        for C in sorted({1, *chunks} if S == 1 else set(chunks)):
            for v in (1, 2, 4) if S > 1 else (1,):
                if v * S <= num_layers and num_nodes >= C * W:
                    yield Setting(S, W, C, v)


def choose(predictions: Sequence[Prediction], *, memory_bytes: float | None = None) -> Prediction:
    """The quickest setting that fits into memory; of equals the one with fewest parts.

    Raises:
        UserError: none fits.
    """
    fitting = [p for p in predictions if memory_bytes is None or p.memory_bytes <= memory_bytes]
    if not fitting:
        least = min(p.memory_bytes for p in predictions)
        raise UserError(
            f"`--memory-gb` (={(memory_bytes or 0) / 1e9:g}) must be at least {least / 1e9:.3g},"
            " what the smallest setting needs; use more ranks"
        )
    best_s = min(p.epoch_s for p in fitting)
    equal = [p for p in fitting if p.epoch_s <= best_s * TIE]
    return min(equal, key=lambda p: (p.setting.num_ranks, p.setting[2:], p.epoch_s))


def reason(best: Prediction, predictions: Sequence[Prediction]) -> str:
    """Why, in a sentence."""
    kinds = {
        "one rank": [p for p in predictions if p.setting.num_ranks == 1],
        "graph parallelism": [
            p for p in predictions if p.setting.num_stages == 1 and p.setting.num_ways > 1
        ],
        "a pipeline": [p for p in predictions if p.setting.num_stages > 1],
    }
    parts = [
        f"{name} {min(p.epoch_s for p in group) * 1e3:.4g} ms"
        for name, group in kinds.items()
        if group
    ]
    if best.setting.num_stages > 1:
        words = "the pipeline gains more than its warm-up and drain cost"
    elif best.setting.num_ranks > 1:
        words = "too little work or too few layers to fill a pipeline: graph parallelism"
    else:
        words = "too small for several ranks: messages would cost more than they save"
    return f"{words}; best of each: {', '.join(parts)}"


def _of(bounds: Sequence[int], stage: int) -> range:
    return range(bounds[stage], bounds[stage + 1])
