"""Predicts what an epoch of a setting takes: time, bubble, bytes and memory.

The prediction simulates the very schedule that the engine will run. An action lasts as long as
its layers on a mean chunk and the work on its messages, and waits for the halo of each layer as
far as interior rows do not hide it. Graph parallelism (one stage) and a single rank are settings
like any other, so a case that is too small, sparse or shallow for a pipeline gets one of those.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from gnnpipe.costs import Line, Links, Profile, role_of
from gnnpipe.memory import PLAIN, MemoryBytes, Storage, WayCounts, predict_memory_bytes
from gnnpipe.schedule import (
    KINDS,
    SCHEDULES,
    Action,
    ScheduleName,
    Timeline,
    simulate,
    split_layers,
)
from gnnpipe.setting import GraphShape, Prediction, Setting, WayShape, alike
from gnnpipe.shapes import LayerShape, gathers, num_parameters
from gnnpipe.volume import crossings, predict_comm_bytes


class _Sent(NamedTuple):
    """What one action sends."""

    num_messages: int
    num_bytes: float


class Planner:
    """Predicts settings for one model on one graph.

    Args:
        layers: the whole model.
        graph: its counts.
        profile: of the machine.
        links: the network.
        storage: how a rank holds its numbers.
        steps: optimizer steps of an epoch.
        cores: of a host, which its ranks share; None: enough.
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
        cores: int | None = None,
    ) -> None:
        self._cores = cores
        self._layers = layers
        self._graph = graph
        self._profile = profile
        self._links = links
        self._storage = storage
        self._steps = steps
        self._ways: dict[int, WayShape] = {}
        self._loads: dict[int, Sequence[tuple[float, float]]] = {}

    @property
    def schedules(self) -> Sequence[ScheduleName]:
        """Those that it can predict."""
        return self._profile.schedules

    def predict(self, setting: Setting) -> Prediction:
        """Simulates one epoch."""
        S, v = setting.num_stages, setting.virtual_stages
        costs = [self._layer_s(i, setting) for i in range(len(self._layers))]
        sizes = split_layers([sum(cost) for cost in costs], S * v)
        bounds = [sum(sizes[:stage]) for stage in range(S * v + 1)]
        steps = min(self._steps, setting.num_chunks)
        timeline = self._timeline(bounds, costs, setting, steps=steps)
        tails = [self._tail_s(bounds, costs, rank, setting) for rank in range(S)]
        ends = [spans[-1].end_s + tail for spans, tail in zip(timeline.ranks, tails, strict=True)]
        # Each step but the last is waited for as long as the slowest rank's.
        epoch_s = max(ends) + (steps - 1) * max(tails)
        kinds = KINDS[setting.schedule][:2]
        halo_s = sum(self._halo_s(i, k, setting) for i in range(len(self._layers)) for k in kinds)
        steps_s = sum(self._step_s(bounds, rank, setting) for rank in range(S))
        waits_s = setting.num_chunks * halo_s + timeline.held_up_s
        busy_s = sum(timeline.busy_s) + steps * steps_s - waits_s
        epoch_s = max(epoch_s, busy_s / S / self._core_share(setting))
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

    def _timeline(
        self,
        bounds: Sequence[int],
        costs: Sequence[Sequence[float]],
        setting: Setting,
        *,
        steps: int,
    ) -> Timeline:
        """When every action runs."""
        spent = {
            (stage, kind): sum(costs[i][number] for i in _of(bounds, stage))
            for stage in range(len(bounds) - 1)
            for number, kind in enumerate(KINDS[setting.schedule])
        }
        for stage in range(len(bounds) - 1):
            spent[stage, "F"] += self._enter_s(_of(bounds, stage), setting)
        loads = self._chunk_loads(setting)
        uneven = {key: self._uneven_s(_of(bounds, key[0]), key[1], setting) for key in spent}
        crossing = self._crossings(bounds, setting)
        is_local = self._links.ranks_per_host >= setting.num_ranks

        def duration(action: Action) -> float:
            # What comes in has the key of the stage that sends it.
            keys = (_before(action), action[:2])
            count = sum(crossing[key].num_messages for key in keys if key in crossing)
            more, denser = loads[action.chunk_index]
            rows_s, edges_s = uneven[action[:2]]
            uneven_s = (more - 1.0) * rows_s + (denser - 1.0) * edges_s
            return spent[action[:2]] + uneven_s + self._profile.message_s(count)

        def occupancy(action: Action) -> float:
            sent = crossing.get(action[:2])
            num_bytes = sent.num_bytes * loads[action.chunk_index][0] if sent else 0.0
            return self._links.seconds(num_bytes, is_local=is_local)

        def held_up(action: Action) -> float:
            layers, kind = _of(bounds, action.stage_index), action.kind
            return sum(
                self._halo_s(i, kind, setting, share=0.5) - self._halo_s(i, kind, setting)
                for i in (layers if kind != "G" else ())
            )

        return simulate(
            SCHEDULES[setting.schedule](
                setting.num_stages, setting.num_chunks, setting.virtual_stages, steps=steps
            ),
            duration,
            transfer=self._links.latency_s,
            occupancy=occupancy,
            held_up=cache(held_up),
            steps=steps,
        )

    def _moves(self, setting: Setting) -> bool:
        """Whether historical rows are read, and moved by their drift."""
        return setting.num_chunks > 1 and self._storage.strata > 0

    @property
    def _sums_of_strata(self) -> int:
        """Times that a chunk's strata are summed: when it arrives, goes back, is put back."""
        is_put_back = self._storage.kept_copies > 0 or self._storage.period > 1
        return 2 + is_put_back

    def _enter_s(self, layers: range, setting: Setting) -> float:
        """What a stage does before a mean chunk, on the slowest way."""
        has_tables = any(self._layers[index].operator != "none" for index in layers)
        if not has_tables or not self._moves(setting):
            return 0.0
        rows, edges = self._chunk(setting)
        loads = self._way(setting.num_ways).loads
        line = self._profile.enter
        return max(line.seconds(rows * more, edges * denser) for more, denser in loads)

    def _chunk_loads(self, setting: Setting) -> Sequence[tuple[float, float]]:
        """What each chunk has of rows and edges; without a pipeline only their sums count.

        Ways are taken to share every chunk as they share the graph.
        """
        C = setting.num_chunks
        if setting.num_stages == 1:
            return alike(C)
        if C not in self._loads:
            self._loads[C] = self._graph.chunks(C)
        return self._loads[C]

    def _uneven_s(self, layers: range, kind: str, setting: Setting) -> tuple[float, float]:
        """What of some layers' time on a mean chunk is due to its rows, and to its edges."""
        slowest = [self._slowest(index, kind, setting) for index in layers]
        rows_s = sum(line.per_row_s * rows for line, rows, _ in slowest)
        return rows_s, sum(line.per_edge_s * edges for line, _, edges in slowest)

    def _core_share(self, setting: Setting) -> float:
        """Cores for each rank of the fullest host, at most 1."""
        here = min(setting.num_ranks, self._links.ranks_per_host)
        return 1.0 if self._cores is None else min(1.0, self._cores / here)

    def _layer_s(self, index: int, setting: Setting) -> list[float]:
        """Each kind of action of one chunk through one layer, the halo's wait included."""
        work_s, found = self._halo_work_s(index, setting), []
        for kind in KINDS[setting.schedule]:
            halo_s = 0.0 if kind == "G" else self._halo_s(index, kind, setting) + work_s
            found.append(self._compute_s(index, kind, setting) + halo_s)
        return found

    def _compute_s(self, index: int, kind: str, setting: Setting) -> float:
        """One layer on a mean chunk, on the slowest way."""
        line, rows, edges = self._slowest(index, kind, setting)
        return line.seconds(rows, edges)

    def _slowest(self, index: int, kind: str, setting: Setting) -> tuple[Line, float, float]:
        """A layer's line, and what the slowest way has of rows and edges of a mean chunk."""
        line, sizes = self._on_ways(index, kind, setting)
        return line, *max(sizes, key=lambda size: line.seconds(*size))

    def _on_ways(
        self, index: int, kind: str, setting: Setting
    ) -> tuple[Line, list[tuple[float, float]]]:
        """A layer's line, and what each way has of rows and edges of a mean chunk."""
        rows, edges = self._chunk(setting)
        line = self._profile.lines[f"{role_of(index, len(self._layers))} {kind}"]
        loads = self._way(setting.num_ways).loads
        return line, [(rows * more, edges * denser) for more, denser in loads]

    def _halo_bytes(self, index: int, setting: Setting) -> float:
        """What the busiest way sends, or receives, for one chunk in one layer and direction."""
        layer, W = self._layers[index], setting.num_ways
        if W == 1 or layer.operator == "none":
            return 0.0
        way = self._way(W)
        rows = (way.mirrors.incoming + way.mirrors.outgoing) / 2 / (W * setting.num_chunks)
        return rows * way.busiest * layer.table_channels * self._storage.element_bytes

    def _halo_work_s(self, index: int, setting: Setting) -> float:
        """Work of a rank on the messages of one chunk in one layer and direction."""
        num_bytes = self._halo_bytes(index, setting)
        num_messages = 2 * (setting.num_ways - 1)
        if self._moves(setting):  # Sums of drift and debt travel beside the rows.
            num_messages *= 2
        return self._profile.message_s(num_messages, num_bytes) if num_bytes else 0.0

    def _halo_s(self, index: int, kind: str, setting: Setting, *, share: float = 1.0) -> float:
        """How long one chunk waits for its halo in one layer.

        Beyond what interior rows hide, and what uneven ways do: the second slowest way sends
        its rows while the slowest still computes the layer before, and those two wait for each
        other in turn.

        Args:
            index: which layer.
            kind: of the action.
            setting: of the run.
            share: of the links' speed, while other messages travel.
        """
        num_bytes = self._halo_bytes(index, setting)
        if not num_bytes:
            return 0.0
        W = setting.num_ways
        is_local = self._links.ranks_per_host >= W
        travel_s = self._links.seconds(num_bytes, is_local=is_local) / share
        travel_s += self._links.latency_s
        line, sizes = self._on_ways(index, kind, setting)
        slowest = sorted(line.seconds(*size) for size in sizes)[-2:]
        hidden_s = (slowest[-1] - slowest[0]) / 2
        if not gathers(self._layers[index].operator):
            line = self._profile.lines[f"{role_of(index, len(self._layers))} F"]
            hidden_s += line.per_edge_s * self._chunk(setting)[1] * self._way(W).interior_share
        return max(0.0, travel_s - hidden_s)

    def _step_s(self, bounds: Sequence[int], rank: int, setting: Setting) -> float:
        """The optimizer's step of a rank."""
        stages = range(rank, setting.num_stages * setting.virtual_stages, setting.num_stages)
        held = [self._layers[i] for s in stages for i in _of(bounds, s)]
        return num_parameters(held) * self._profile.step_s_per_parameter

    def _tail_s(
        self,
        bounds: Sequence[int],
        costs: Sequence[Sequence[float]],
        rank: int,
        setting: Setting,
    ) -> float:
        """After a rank's last backward: what is left of the weight sums, and the optimizer.

        A layer's sum starts when its last backward has run, and follows those before it.
        """
        W = setting.num_ways
        step_s = self._step_s(bounds, rank, setting)
        if W == 1:
            return step_s
        is_local = self._links.ranks_per_host >= W
        end_s = link_s = 0.0
        for index in reversed(_of(bounds, rank)):
            end_s += sum(costs[index][1:])
            num_bytes = 2 * (W - 1) / W * num_parameters([self._layers[index]])
            num_bytes *= self._storage.element_bytes
            if num_bytes:
                sum_s = self._links.seconds(num_bytes, is_local=is_local)
                link_s = max(link_s, end_s) + sum_s + 2 * (W - 1) * self._links.latency_s
        return step_s + max(0.0, link_s - end_s)

    def _crossings(
        self, bounds: Sequence[int], setting: Setting
    ) -> dict[tuple[int, str], "_Sent"]:
        """What a stage's forward, and its backward, of one chunk sends on."""
        rows = self._chunk(setting)[0]
        found = {}
        cuts = crossings(self._layers, bounds=bounds, num_stages=setting.num_stages)
        row_bytes = rows * self._storage.element_bytes
        for stage, cut in enumerate(cuts):
            back = (stage + 1, KINDS[setting.schedule][1])
            sides = {(stage, "F"): cut.carried_forward, back: cut.carried_backward}
            for key, carried in sides.items():
                # Carried tensors are as wide as the rows beside them, or nearly.
                num_messages = 1 + round(carried / max(1, cut.boundary))
                found[key] = _Sent(num_messages, (cut.boundary + carried) * row_bytes)
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
            num_strata=min(self._graph.num_strata, self._storage.strata),
            sums_of_strata=self._sums_of_strata,
        )

    def _memory_bytes(self, bounds: Sequence[int], rank: int, setting: Setting) -> MemoryBytes:
        S, W, C, v, _ = setting
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
            num_strata=graph.num_strata,
        )
        return predict_memory_bytes(
            [self._layers[i] for s in range(rank, S * v, S) for i in _of(bounds, s)],
            is_first=rank == 0,
            num_cuts=(rank > 0) + (rank < S - 1),
            way=way,
            features=graph.features._replace(num_entries=entries and entries // W),
            num_chunks=C,
            storage=self._storage._replace(is_split=setting.schedule == "split_backward"),
        )

    def _chunk(self, setting: Setting) -> tuple[float, float]:
        """Rows and edges of a mean chunk of one way."""
        parts = setting.num_ways * setting.num_chunks
        return self._graph.num_nodes / parts, self._graph.num_edges / parts

    def _way(self, num_ways: int) -> WayShape:
        if num_ways not in self._ways:
            self._ways[num_ways] = self._graph.ways(num_ways)
        return self._ways[num_ways]


def _before(action: Action) -> tuple[int, str]:
    """The stage and kind of the action that sends an action its input."""
    return action.stage_index + (-1 if action.kind == "F" else 1), action.kind


def _of(bounds: Sequence[int], stage: int) -> range:
    return range(bounds[stage], bounds[stage + 1])
