"""Ways to run, what the planner says of each, and which one to take."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gnnpipe.errors import UserError
from gnnpipe.memory import FeatureCounts, MemoryBytes
from gnnpipe.schedule import ScheduleName, Timeline
from gnnpipe.volume import MirrorCounts

TIE = 1.02
"""Settings within this factor are as quick; the simplest of them is taken."""


class Setting(NamedTuple):
    """One way to run."""

    num_stages: int
    num_ways: int
    num_chunks: int
    virtual_stages: int
    schedule: ScheduleName = "fill_drain"

    @property
    def num_ranks(self) -> int:
        """Processes."""
        return self.num_stages * self.num_ways


class WayShape(NamedTuple):
    """What a number of ways does to a graph."""

    mirrors: MirrorCounts
    interior_share: float
    """Share of edges whose target reads no other way: what a halo can hide behind."""
    busiest: float = 1.0
    """Rows that the way with the most sends or receives, over the mean way's."""
    loads: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    """Rows and edges of each way, over the mean way's: the others wait for the slowest."""


def alike(num_chunks: int) -> list[tuple[float, float]]:
    """Chunks of equal rows and edges."""
    return [(1.0, 1.0)] * num_chunks


class GraphShape(NamedTuple):
    """The counts that costs depend on."""

    num_nodes: int
    num_edges: int
    features: FeatureCounts
    is_symmetric: bool
    ways: Callable[[int], WayShape]
    chunks: Callable[[int], Sequence[tuple[float, float]]] = alike
    """Rows and edges of each chunk, over the mean chunk's; a pipeline waits for the largest."""
    num_strata: int = 16
    """Orders of magnitude of its degrees."""


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


def settings(
    num_ranks: int,
    *,
    num_layers: int,
    chunks: Sequence[int],
    num_nodes: int,
    schedules: Sequence[ScheduleName] = ("fill_drain",),
) -> Iterator[Setting]:
    """All settings for exactly ``num_ranks`` ranks, and one rank alone.

    Args:
        num_ranks: ranks.
        num_layers: layers of the model, input and output included.
        chunks: numbers of chunks to try; a single stage always tries 1, which is exact.
        num_nodes: nodes of the graph, at least one for each chunk of each way.
        schedules: to try where there is a pipeline.
    """
    yield Setting(1, 1, 1, 1)
    if num_ranks == 1:
        return
    for S in (S for S in range(1, num_ranks + 1) if num_ranks % S == 0):
        W = num_ranks // S
        for C in sorted({1, *chunks} if S == 1 else set(chunks)):
            for v in (1, 2, 4) if S > 1 else (1,):
                if v * S <= num_layers and num_nodes >= C * W:
                    for schedule in schedules if S > 1 else schedules[:1]:
                        yield Setting(S, W, C, v, schedule)


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
