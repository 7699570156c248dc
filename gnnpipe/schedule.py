"""Pipeline schedules as data: one list of actions for each rank of the pipeline.

One engine interprets the lists and one simulator predicts them, so a new schedule is a
function that returns lists. Backwards run in exactly the reverse of the forwards (gradients
of fresh rows flow from later chunks to earlier ones), which rules out 1F1B: no backward can
start before the last forward of its stage.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise
from math import ceil, floor
from typing import Literal, NamedTuple

from gnnpipe.errors import UserError
from gnnpipe.order import step_bounds


class ScheduleError(ValueError):
    """A schedule that cannot run, or that would not compute one whole step."""


class Action(NamedTuple):
    """One unit of work. Prints as ``1F0``: stage 1, forward, chunk 0.

    A backward is one action, ``B``, or two: ``I`` makes the gradient of the stage's input, ``G``
    those of its weights. The chunk is its position in the epoch's order, so a schedule is the same
    every epoch.
    """

    stage_index: int
    kind: Literal["F", "B", "I", "G"]
    chunk_index: int

    def __repr__(self) -> str:
        return f"{self.stage_index}{self.kind}{self.chunk_index}"


Schedule = list[list[Action]]


def fill_drain(
    num_stages: int, num_chunks: int, virtual_stages: int = 1, *, steps: int = 1
) -> Schedule:
    """Lists all forwards, then all backwards in reverse order.

    The last rank turns around at once; the others wait for it. 2 stages, 3 chunks::

        clock   0    1    2    3    4    5    6    7
        rank 0  0F0  0F1  0F2  .    .    0B2  0B1  0B0
        rank 1  .    1F0  1F1  1F2  1B2  1B1  1B0  .

    With virtual stages a rank does all chunks of its first stage, then all of its next
    (breadth first), so the same wait is paid once for more, smaller actions. 2 virtual stages::

        clock   0    1    2    3    4    5    6    7    8    9    10   11   12   13
        rank 0  0F0  0F1  0F2  2F0  2F1  2F2  .    .    2B2  2B1  2B0  0B2  0B1  0B0
        rank 1  .    1F0  1F1  1F2  3F0  3F1  3F2  3B2  3B1  3B0  1B2  1B1  1B0  .

    The bubble is ``(S - 1) / (v C + S - 1)`` when ``C >= S`` and all actions of a kind take
    equally long.

    Several steps follow one another, each with its own fill and drain, so the bubble is that of
    ``C / steps`` chunks. 2 stages, 3 chunks, 2 steps::

        clock   0    1    2    3    4    5    6    7    8    9
        rank 0  0F0  0F1  .    .    0B1  0B0  0F2  .    .    0B2
        rank 1  .    1F0  1F1  1B1  1B0  .    .    1F2  1B2  .

    Args:
        num_stages: Ranks of the pipeline ``S``.
        num_chunks: Chunks ``C`` of the epoch.
        virtual_stages: Stages ``v`` of each rank; stage ``s`` lives on rank ``s % S``.
        steps: Optimizer steps of the epoch, see :func:`step_bounds`.

    Returns:
        For each rank of the pipeline its actions, in order.

    Raises:
        UserError: A number is below 1.
    """
    _check_positive(num_stages=num_stages, num_chunks=num_chunks, virtual_stages=virtual_stages)
    schedule = []
    for rank in range(num_stages):
        stages = range(rank, num_stages * virtual_stages, num_stages)
        actions = []
        for first, last in pairwise(step_bounds(num_chunks, steps)):
            forwards = [Action(s, "F", k) for s in stages for k in range(first, last)]
            actions += forwards + [Action(s, "B", k) for s, _, k in reversed(forwards)]
        schedule.append(actions)
    return schedule


def split_backward(
    num_stages: int, num_chunks: int, virtual_stages: int = 1, *, steps: int = 1
) -> Schedule:
    """Lists what :func:`fill_drain` does, every backward in two halves.

    The rank before waits for the gradient of a stage's input alone, so that goes first, and the
    gradients of the weights are made while it travels (Zero Bubble, Qi et al., arXiv 2401.10241).
    Filling and draining take ``(S - 1) (F + I)`` instead of ``(S - 1) (F + I + G)``. 2 stages, 3
    chunks::

        clock   0    1    2    3    4    5    6    7    8    9    10
        rank 0  0F0  0F1  0F2  .    .    0I2  0G2  0I1  0G1  0I0  0G0
        rank 1  .    1F0  1F1  1F2  1I2  1G2  1I1  1G1  1I0  1G0  .
    """
    return [
        [half for action in actions for half in _halves(action)]
        for actions in fill_drain(num_stages, num_chunks, virtual_stages, steps=steps)
    ]


def _halves(action: Action) -> list[Action]:
    if action.kind == "F":
        return [action]
    return [action._replace(kind="I"), action._replace(kind="G")]


ScheduleName = Literal["fill_drain", "split_backward"]

SCHEDULES: Mapping[ScheduleName, Callable[..., Schedule]] = {
    "fill_drain": fill_drain,
    "split_backward": split_backward,
}
"""By the name that a configuration gives."""

KINDS: Mapping[ScheduleName, str] = {"fill_drain": "FB", "split_backward": "FIG"}
"""Kinds of the actions of each; the gradient that another rank waits for comes second."""


def split_layers(costs: Sequence[float], num_stages: int) -> list[int]:
    """Cuts a list of layers into stages of consecutive layers, as evenly as possible.

    Exact: no other cut has a cheaper dearest stage. Of equal cuts it takes one that gives the
    first stages more.

    Args:
        costs: Cost of each layer, ``[L]``, in any unit, not negative.
        num_stages: Number of stages, virtual ones included.

    Returns:
        Number of layers of each stage, ``[num_stages]``, each at least 1.

    Raises:
        UserError: There are more stages than layers, or no stage.
    """
    _check_positive(num_stages=num_stages)
    num_layers = len(costs)
    if num_stages > num_layers:
        raise UserError(
            f"`num_stages` (={num_stages}) must be at most the number of layers (={num_layers});"
            " use fewer stages or more layers"
        )
    assert all(cost >= 0 for cost in costs), f"a layer's cost is negative or NaN: {costs}"
    total = list(accumulate(costs, initial=0.0))  # total[n]: cost of the first n layers

    @cache
    def best(first: int, stages: int) -> tuple[float, list[int]]:
        """Cost of the dearest stage, and all sizes, for layers ``first ..`` in ``stages``."""
        if stages == 1:
            return total[-1] - total[first], [num_layers - first]
        dearest, minus_size = min(
            (max(total[first + size] - total[first], best(first + size, stages - 1)[0]), -size)
            for size in range(1, num_layers - first - stages + 2)
        )
        return dearest, [-minus_size, *best(first - minus_size, stages - 1)[1]]

    return best(0, num_stages)[1]


class Span(NamedTuple):
    """When one action ran."""

    action: Action
    start_s: float
    end_s: float


class Timeline(NamedTuple):
    """What every rank did when: the result of :func:`simulate`."""

    ranks: list[list[Span]]
    held_up_s: float = 0.0
    """By how much all actions together took longer because they shared links."""

    @property
    def makespan_s(self) -> float:
        """End of the last action."""
        return max((span.end_s for spans in self.ranks for span in spans), default=0.0)

    @property
    def busy_s(self) -> list[float]:
        """Time that each rank spends in actions, ``[ranks]``."""
        return [sum(span.end_s - span.start_s for span in spans) for spans in self.ranks]

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time: ``1 - busy / (ranks * makespan)``."""
        if self.makespan_s == 0:
            return 0.0
        return 1 - sum(self.busy_s) / (len(self.ranks) * self.makespan_s)


def simulate(
    schedule: Schedule,
    duration: Callable[[Action], float],
    *,
    transfer: float | Callable[[Action], float] = 0.0,
    occupancy: float | Callable[[Action], float] = 0.0,
    held_up: Callable[[Action], float] = lambda action: 0.0,
    steps: int = 1,
) -> Timeline:
    """Predicts when each action runs.

    An action starts when its rank is free and what it reads has arrived. Messages travel while
    ranks compute; those that leave one rank follow one another.

    Args:
        schedule: Actions of each rank, in order.
        duration: Seconds that an action takes.
        transfer: Seconds from the end of an action to its result's arrival on another rank, the
            same for all or given by the sending action. Within a rank results are there at once.
        occupancy: Seconds that the result keeps the sending rank's link busy, before
            ``transfer`` begins.
        held_up: Seconds by which an action takes longer if messages that it waits for while it
            runs share the link with earlier results, at most as long as those still take to leave.
            Its own result leaves later by as much.
        steps: Optimizer steps of the epoch.

    Raises:
        ScheduleError: The ranks wait for each other; names the action each of them waits at.
    """
    num_stages = 1 + max((a.stage_index for actions in schedule for a in actions), default=0)
    num_chunks = 1 + max((a.chunk_index for actions in schedule for a in actions), default=0)
    ranks: list[list[Span]] = [[] for _ in schedule]
    done: dict[Action, tuple[int, float]] = {}  # where and when an action ended
    homes = {a.stage_index: rank for rank, actions in enumerate(schedule) for a in actions}
    link_free_s = [0.0] * len(schedule)
    sent_s: dict[Action, float] = {}  # when a result has left its rank's link
    held_up_s = 0.0
    is_split = _is_split(schedule)

    def arrival_s(needed: Action, rank: int) -> float:
        source, end_s = done[needed]
        if source == rank:
            return end_s
        return sent_s[needed] + (transfer(needed) if callable(transfer) else transfer)

    def send(action: Action, rank: int, end_s: float) -> None:
        if action.kind == "G":
            return
        reader = action.stage_index + (1 if action.kind == "F" else -1)
        if homes.get(reader, rank) != rank:
            busy_s = occupancy(action) if callable(occupancy) else occupancy
            link_free_s[rank] = max(link_free_s[rank], end_s) + busy_s
            sent_s[action] = link_free_s[rank]

    while True:
        waiting = {}
        num_done = len(done)
        for rank, actions in enumerate(schedule):
            for action in actions[len(ranks[rank]) :]:
                needs = dependencies(
                    action,
                    num_stages=num_stages,
                    num_chunks=num_chunks,
                    steps=steps,
                    is_split=is_split,
                )
                missing = [needed for needed in needs if needed not in done]
                if missing:
                    waiting[rank] = f"rank {rank} waits at {action} for {missing[0]}"
                    break
                free_s = ranks[rank][-1].end_s if ranks[rank] else 0.0
                start_s = max([free_s, *(arrival_s(needed, rank) for needed in needs)])
                shared_s = min(max(0.0, link_free_s[rank] - start_s), held_up(action))
                link_free_s[rank] += shared_s
                held_up_s += shared_s
                end_s = start_s + duration(action) + shared_s
                ranks[rank].append(Span(action, start_s, end_s))
                done[action] = (rank, ranks[rank][-1].end_s)
                send(action, rank, ranks[rank][-1].end_s)
        if not waiting:
            return Timeline(ranks, held_up_s)
        if len(done) == num_done:
            raise ScheduleError(f"the schedule deadlocks: {', '.join(waiting.values())}")


def dependencies(
    action: Action, *, num_stages: int, num_chunks: int, steps: int = 1, is_split: bool = False
) -> list[Action]:
    """The actions whose results an action reads.

    A forward reads the previous stage's output and the rows of the chunk before (fresh values);
    a backward reads the next stage's gradient, what its forward kept, and the gradient rows
    that the chunk after it left; the gradients of weights read what the rest of their backward
    kept. The first forward of a step reads weights that the last backward of the step before has
    changed.
    """
    stage, kind, chunk = action
    bounds = step_bounds(num_chunks, steps)
    step = bisect_right(bounds, chunk) - 1
    first, end = bounds[step : step + 2]
    if kind == "F":
        needs = [Action(stage - 1, "F", chunk)] if stage else []
        if chunk > first:
            needs.append(Action(stage, "F", chunk - 1))
        elif step:
            needs.append(Action(stage, "G" if is_split else "B", bounds[step - 1]))
        return needs
    if kind == "G":
        return [Action(stage, "I", chunk)]
    needs = [Action(stage, "F", chunk)]
    if stage + 1 < num_stages:
        needs.append(Action(stage + 1, kind, chunk))
    if chunk + 1 < end:
        needs.append(Action(stage, kind, chunk + 1))
    return needs


def _is_split(schedule: Schedule) -> bool:
    return any(action.kind == "I" for actions in schedule for action in actions)


def verify(
    schedule: Schedule, *, num_chunks: int, virtual_stages: int = 1, steps: int = 1
) -> None:
    """Checks that a schedule computes one whole epoch, in an order that can run.

    Raises:
        ScheduleError: An action is misplaced, missing, repeated or out of order, or deadlocks.
    """
    num_ranks = len(schedule)
    bounds = step_bounds(num_chunks, steps)
    halves = "IG" if _is_split(schedule) else "B"
    reverse = [k for low, high in pairwise(bounds) for k in reversed(range(low, high))]
    for rank, actions in enumerate(schedule):
        stages = range(rank, num_ranks * virtual_stages, num_ranks)
        strays = [action for action in actions if action.stage_index not in stages]
        if strays:
            raise ScheduleError(f"rank {rank} lists {strays[0]}; its stages are {list(stages)}")
        for stage in stages:
            forwards = [k for s, kind, k in actions if (s, kind) == (stage, "F")]
            if forwards != list(range(num_chunks)):
                raise ScheduleError(
                    f"stage {stage} runs forwards of chunks {forwards}; each of the"
                    f" {num_chunks} must run exactly once, in order"
                )
            for wanted in halves:
                backwards = [k for s, kind, k in actions if (s, kind) == (stage, wanted)]
                if backwards != reverse:
                    raise ScheduleError(
                        f"stage {stage} runs backwards of chunks {backwards}; they must be"
                        f" exactly the forwards reversed, {reverse}"
                    )
    simulate(schedule, lambda action: 1.0, steps=steps)


def draw(timeline: Timeline, *, slot_s: float | None = None) -> str:
    """Draws a timeline: a row for each rank, a column for each slot of time.

    An action's name stands where it starts, ``-`` where it goes on, ``.`` where the rank idles
    (:func:`fill_drain` shows two). A slot is ``slot_s`` long: by default the shortest action, or
    a 120th of the whole where that is longer; the first of several starts in it is named.
    """
    lengths = [end_s - start_s for spans in timeline.ranks for _, start_s, end_s in spans]
    if slot_s is None:
        slot_s = max(min(lengths, default=1.0), timeline.makespan_s / 120) or 1.0
    num_slots = max(1, _slots(timeline.makespan_s, slot_s, round_up=True))
    rows = [["clock", *(str(slot) for slot in range(num_slots))]]
    for rank, spans in enumerate(timeline.ranks):
        cells = ["."] * num_slots
        for action, start_s, end_s in spans:
            first = min(_slots(start_s, slot_s), num_slots - 1)
            cells[first] = repr(action) if cells[first] in ".-" else cells[first]
            for slot in range(first + 1, _slots(end_s, slot_s, round_up=True)):
                cells[slot] = "-"
        rows.append([f"rank {rank}", *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(num_slots + 1)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _slots(time_s: float, slot_s: float, *, round_up: bool = False) -> int:
    """Whole slots in a time; a billionth of a slot is rounding, not time."""
    return ceil(time_s / slot_s - 1e-9) if round_up else floor(time_s / slot_s + 1e-9)


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"`{name}` (={value}) must be at least 1; ask for one or more")
