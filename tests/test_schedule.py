"""Schedules as strings, the simulator against a longest path, and exact layer splits."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import combinations, pairwise, permutations
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnnpipe.errors import UserError
from gnnpipe.order import chunk_order, step_bounds
from gnnpipe.schedule import (
    SCHEDULES,
    Action,
    Schedule,
    ScheduleError,
    dependencies,
    draw,
    fill_drain,
    simulate,
    split_backward,
    split_layers,
    verify,
)

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 3))  # S, C, v


def parse(text: str) -> Schedule:
    """Reads what a schedule prints: a line for each rank."""
    lines = [line.split() for line in text.strip().splitlines()]
    kinds: dict[str, Literal["F", "B", "I", "G"]] = {"F": "F", "B": "B", "I": "I", "G": "G"}
    return [[Action(int(w[0]), kinds[w[1]], int(w[2:])) for w in ws] for ws in lines]


def texts(schedule: Schedule) -> list[list[str]]:
    return [[repr(action) for action in actions] for actions in schedule]


def one_second(action: Action) -> float:
    return 1.0


# --- the epoch's order


@given(st.integers(0, 2**63), st.integers(1, 10**6), st.integers(1, 64))
def test_shuffled_order_is_a_permutation_drawn_from_its_arguments_alone(
    seed: int, epoch: int, num_chunks: int
) -> None:
    order = chunk_order(seed, epoch, num_chunks, kind="shuffled")
    assert sorted(order) == list(range(num_chunks))
    assert order == chunk_order(seed, epoch, num_chunks, kind="shuffled")


def test_shuffled_order_is_the_same_in_another_process() -> None:
    code = "from gnnpipe.order import chunk_order; print(chunk_order(7, 3, 16, kind='shuffled'))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == str(chunk_order(7, 3, 16, kind="shuffled"))


def test_shuffled_order_changes_with_seed_and_epoch() -> None:
    orders = {
        tuple(chunk_order(s, e, 16, kind="shuffled")) for s in range(10) for e in range(1, 11)
    }
    assert len(orders) == 100


def test_shuffled_orders_are_uniform() -> None:
    counts = Counter(tuple(chunk_order(0, epoch, 4, kind="shuffled")) for epoch in range(1, 4801))
    assert set(counts) == set(permutations(range(4)))
    # 24 orders, 200 each; chi-square with 23 degrees of freedom, 1 in 10,000 is above 58.
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 58


def test_every_chunk_visits_every_position_equally_often() -> None:
    num_chunks, epochs = 16, 3200
    counts = Counter(
        place
        for epoch in range(1, epochs + 1)
        for place in enumerate(chunk_order(1, epoch, num_chunks, kind="shuffled"))
    )
    expected = epochs / num_chunks  # 200, standard deviation 14
    assert len(counts) == num_chunks**2
    assert all(abs(count - expected) < 5 * 14 for count in counts.values())


def test_fixed_order_counts_up() -> None:
    assert chunk_order(5, 9, 4, kind="fixed") == [0, 1, 2, 3]


def test_unknown_order_is_refused() -> None:
    with pytest.raises(UserError, match=r"`kind` \(='sorted'\) must be 'shuffled', "):
        chunk_order(0, 1, 4, kind="sorted")


@pytest.mark.parametrize("num_chunks", [2, 3, 8])
def test_antithetic_orders_make_each_pair_fresh_once_in_two_epochs(num_chunks: int) -> None:
    for epoch in (1, 3, 5):
        pair = [chunk_order(4, e, num_chunks, kind="antithetic") for e in (epoch, epoch + 1)]
        fresh = Counter(p for order in pair for p in combinations(order, 2))
        assert fresh == dict.fromkeys(permutations(range(num_chunks), 2), 1)
        assert pair[0] == chunk_order(4, epoch, num_chunks, kind="shuffled")


# --- fill-drain


def test_fill_drain_two_stages_three_chunks() -> None:
    expected = parse("""
        0F0 0F1 0F2 0B2 0B1 0B0
        1F0 1F1 1F2 1B2 1B1 1B0
    """)
    assert fill_drain(2, 3) == expected
    assert texts(expected)[1][:2] == ["1F0", "1F1"]


def test_fill_drain_two_ranks_two_virtual_stages_two_chunks() -> None:
    assert fill_drain(2, 2, 2) == parse("""
        0F0 0F1 2F0 2F1 2B1 2B0 0B1 0B0
        1F0 1F1 3F0 3F1 3B1 3B0 1B1 1B0
    """)


def test_fill_drain_one_stage_one_chunk() -> None:
    assert fill_drain(1, 1) == parse("0F0 0B0")


@pytest.mark.parametrize(
    ("schedule", "virtual_stages"), [(fill_drain, 1), (fill_drain, 2), (split_backward, 1)]
)
def test_the_drawings_in_the_documentation_are_what_is_simulated(
    schedule: Callable[..., Schedule], virtual_stages: int
) -> None:
    drawing = draw(simulate(schedule(2, 3, virtual_stages), one_second))
    documented = [line.strip() for line in (schedule.__doc__ or "").splitlines()]
    for line in drawing.splitlines():
        assert line in documented


@given(st.integers(1, 40), st.data())
def test_steps_cover_the_chunks_evenly(num_chunks: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, num_chunks))
    bounds = step_bounds(num_chunks, steps)
    sizes = [high - low for low, high in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, num_chunks, steps)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@pytest.mark.parametrize("steps", [0, 4])
def test_impossible_steps_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=rf"`steps` \(={steps}\) must be at least 1 and at most"):
        step_bounds(3, steps)


def test_fill_drain_two_steps_are_two_pipelines_in_a_row() -> None:
    assert fill_drain(2, 3, steps=2) == parse("""
        0F0 0F1 0B1 0B0 0F2 0B2
        1F0 1F1 1B1 1B0 1F2 1B2
    """)
    timeline = simulate(fill_drain(2, 3, steps=2), one_second, steps=2)
    documented = [line.strip() for line in (fill_drain.__doc__ or "").splitlines()]
    assert all(line in documented for line in draw(timeline).splitlines())
    # Fill and drain are paid in each step: (C / k + S - 1) slots each way instead of C + S - 1.
    whole = simulate(fill_drain(4, 8), one_second).makespan_s
    assert whole == 2 * (8 + 3)
    assert simulate(fill_drain(4, 8, steps=2), one_second, steps=2).makespan_s == 2 * 2 * (4 + 3)


def test_a_step_waits_for_the_weights_of_the_one_before() -> None:
    def needs(action: Action) -> list[str]:
        found = dependencies(action, num_stages=2, num_chunks=4, steps=2)
        return [repr(needed) for needed in found]

    assert needs(Action(0, "F", 2)) == ["0B0"]
    assert needs(Action(1, "F", 2)) == ["0F2", "1B0"]
    assert needs(Action(1, "F", 3)) == ["0F3", "1F2"]
    assert needs(Action(0, "B", 1)) == ["0F1", "1B1"]  # not 0B2, of the next step
    early = parse("0F0 0F1 0F2 0F3 0B1 0B0 0B3 0B2")
    with pytest.raises(ScheduleError, match="deadlocks: rank 0 waits at 0F2 for 0B0"):
        verify(early, num_chunks=4, steps=2)


@pytest.mark.parametrize("made", SCHEDULES.values())
@given(sizes=SIZES)
def test_every_schedule_computes_a_whole_step(
    made: Callable[..., Schedule], sizes: tuple[int, int, int]
) -> None:
    num_stages, num_chunks, virtual_stages = sizes
    for steps in {1, num_chunks, max(1, num_chunks // 2)}:
        schedule = made(num_stages, num_chunks, virtual_stages, steps=steps)
        verify(schedule, num_chunks=num_chunks, virtual_stages=virtual_stages, steps=steps)


@pytest.mark.parametrize("virtual_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 8])
def test_fill_drain_bubble_is_the_formula(num_stages: int, virtual_stages: int) -> None:
    S, v = num_stages, virtual_stages
    for C in (S, S + 1, 2 * S, 4 * S):
        timeline = simulate(fill_drain(S, C, v), one_second)
        busy, whole = Fraction(sum(timeline.busy_s)), Fraction(S * timeline.makespan_s)
        assert 1 - busy / whole == Fraction(S - 1, v * C + S - 1)
        assert timeline.bubble_fraction == pytest.approx((S - 1) / (v * C + S - 1), abs=1e-15)


def test_fill_drain_bubble_is_the_formula_when_backwards_take_twice_as_long() -> None:
    timeline = simulate(fill_drain(4, 8, 2), lambda a: 1.0 if a.kind == "F" else 2.0)
    assert timeline.bubble_fraction == pytest.approx(3 / (16 + 3), abs=1e-15)


def test_with_fewer_chunks_than_stages_virtual_stages_wait_for_each_other() -> None:
    timeline = simulate(fill_drain(4, 2, 2), one_second)
    assert timeline.bubble_fraction > 3 / (4 + 3)


@pytest.mark.parametrize(
    ("sizes", "name"),
    [((0, 1, 1), "num_stages"), ((1, 0, 1), "num_chunks"), ((1, 1, 0), "virtual_stages")],
)
def test_fill_drain_of_nothing_is_refused(sizes: tuple[int, int, int], name: str) -> None:
    with pytest.raises(UserError, match=rf"`{name}` \(=0\) must be at least 1; "):
        fill_drain(*sizes)


# --- the simulator


def test_unequal_durations_and_a_transfer_time() -> None:
    # 0F0 ends at 1 and arrives at 1.5; 1F1 could start at 2.5 but rank 1 is busy until 3.5.
    timeline = simulate(
        fill_drain(2, 2), lambda a: 2.0 if a.stage_index == 1 else 1.0, transfer=0.5
    )
    starts = [[span.start_s for span in spans] for spans in timeline.ranks]
    assert starts == [[0.0, 1.0, 8.0, 10.0], [1.5, 3.5, 5.5, 7.5]]
    assert timeline.makespan_s == 11.0
    assert timeline.busy_s == [4.0, 8.0]
    assert timeline.bubble_fraction == pytest.approx(1 - 12 / 22)


def test_an_action_shares_its_link_with_results_that_leave() -> None:
    # 0F0's result leaves from 1 to 2.5, so 0F1 ends at 2.5 instead of 2 and its own leaves from 3.
    def held_up(action: Action) -> float:
        return 0.5 if action == Action(0, "F", 1) else 0.0

    timeline = simulate(fill_drain(2, 2), one_second, occupancy=1.5, held_up=held_up)
    assert [span.start_s for span in timeline.ranks[1][:2]] == [2.5, 4.5]
    assert timeline.ranks[0][1].end_s == 2.5
    assert timeline.held_up_s == 0.5
    quick = simulate(fill_drain(2, 2), one_second, held_up=held_up)  # All have left by then.
    assert quick == simulate(fill_drain(2, 2), one_second)


def test_a_transfer_time_may_depend_on_the_sender() -> None:
    timeline = simulate(
        fill_drain(2, 1), one_second, transfer=lambda a: {"F": 0.25, "B": 0.5}[a.kind]
    )
    starts = [[span.start_s for span in spans] for spans in timeline.ranks]
    assert starts == [[0.0, 3.75], [1.25, 2.25]]


def test_results_stay_on_their_rank_without_a_transfer() -> None:
    timeline = simulate(fill_drain(1, 3, 2), one_second, transfer=100.0)
    assert timeline.makespan_s == 12
    assert timeline.bubble_fraction == 0


@settings(max_examples=50)
@given(SIZES, st.data())
def test_simulated_times_are_longest_paths(
    sizes: tuple[int, int, int], data: st.DataObject
) -> None:
    num_stages, num_chunks, virtual_stages = sizes
    schedule = fill_drain(*sizes)
    actions = [action for row in schedule for action in row]
    seconds = st.integers(0, 9)
    lasts = {action: data.draw(seconds) for action in actions}
    travels = {action: data.draw(seconds) for action in actions}
    before = {later: earlier for row in schedule for earlier, later in pairwise(row)}

    @cache
    def end(action: Action) -> int:
        needs = dependencies(action, num_stages=num_stages * virtual_stages, num_chunks=num_chunks)
        arrivals = [
            end(n) + travels[n] * ((n.stage_index - action.stage_index) % num_stages != 0)
            for n in needs
        ]
        own = [end(before[action])] if action in before else [0]
        return max(arrivals + own) + lasts[action]

    timeline = simulate(schedule, lasts.__getitem__, transfer=travels.__getitem__)
    assert {span.action: span.end_s for row in timeline.ranks for span in row} == {
        action: end(action) for action in actions
    }


def test_split_backward_two_ranks_two_virtual_stages() -> None:
    assert split_backward(2, 2, 2) == parse("""
        0F0 0F1 2F0 2F1 2I1 2G1 2I0 2G0 0I1 0G1 0I0 0G0
        1F0 1F1 3F0 3F1 3I1 3G1 3I0 3G0 1I1 1G1 1I0 1G0
    """)


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
def test_a_split_backward_saves_the_weight_gradients_of_the_drain(num_stages: int) -> None:
    S, C, lasts = num_stages, 16, {"F": 3.0, "B": 6.0, "I": 4.0, "G": 2.0}
    whole, split = (
        simulate(schedule(S, C), lambda action: lasts[action.kind])
        for schedule in (fill_drain, split_backward)
    )
    assert whole.makespan_s - split.makespan_s == (S - 1) * lasts["G"]
    assert split.bubble_fraction <= whole.bubble_fraction


def test_weights_gradients_are_not_sent() -> None:
    # Sending takes a rank's link as long as an action; a link used by G's would be the slowest.
    timeline = simulate(split_backward(2, 3), one_second, occupancy=1.0)
    assert timeline.makespan_s == 3 + 1 + 1 + 1 + 1 + 6


def test_what_each_action_reads() -> None:
    def needs(action: Action) -> list[str]:
        return [repr(n) for n in dependencies(action, num_stages=3, num_chunks=3)]

    assert needs(Action(0, "F", 0)) == []
    assert needs(Action(1, "F", 1)) == ["0F1", "1F0"]
    assert needs(Action(2, "B", 2)) == ["2F2"]
    assert needs(Action(1, "B", 1)) == ["1F1", "2B1", "1B2"]
    assert needs(Action(1, "I", 1)) == ["1F1", "2I1", "1I2"]
    assert needs(Action(1, "G", 1)) == ["1I1"]
    later = dependencies(Action(1, "F", 2), num_stages=2, num_chunks=3, steps=2, is_split=True)
    assert [repr(needed) for needed in later] == ["0F2", "1G0"]


def test_deadlock_names_where_each_rank_waits() -> None:
    schedule = parse("""
        0F0 0B0 0F1 0B1
        1F0 1F1 1B1 1B0
    """)
    with pytest.raises(
        ScheduleError,
        match=r"deadlocks: rank 0 waits at 0B0 for 1B0, rank 1 waits at 1F1 for 0F1$",
    ):
        simulate(schedule, one_second)


def test_deadlock_leaves_out_ranks_that_finish() -> None:
    with pytest.raises(ScheduleError, match=r"deadlocks: rank 1 waits at 1F0 for 0F0$"):
        simulate([[], *parse("1F0")], one_second)


def test_an_empty_schedule_takes_no_time() -> None:
    timeline = simulate([[], []], one_second)
    assert (timeline.makespan_s, timeline.bubble_fraction) == (0.0, 0.0)


# --- verify


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0F0 0F1 0B1 0B0 1F0\n1F0 1F1 1B1 1B0", r"rank 0 lists 1F0; its stages are \[0\]"),
        ("0F0 0F1 0B1 0B0 2F0\n1F0 1F1 1B1 1B0", r"rank 0 lists 2F0; its stages are \[0\]"),
        ("0F0 0B0\n1F0 1F1 1B1 1B0", r"stage 0 runs forwards of chunks \[0\]; each of the 2"),
        ("0F0 0F1 0F1 0B1 0B0\n1F0 1F1 1B1 1B0", r"stage 0 runs forwards of chunks \[0, 1, 1\]"),
        ("0F1 0F0 0B0 0B1\n1F1 1F0 1B0 1B1", r"stage 0 runs forwards of chunks \[1, 0\]"),
        ("0F0 0F1 0B1 0B0\n1F0 1F1 1B0 1B1", r"stage 1 runs backwards of chunks \[0, 1\]; they"),
        ("0F0 0F1 0B1 0B0\n1F0 1F1 1B1", r"stage 1 runs backwards of chunks \[1\]; they must be"),
        ("0F0 0F1 0I1 0G1 0I0\n1F0 1F1 1I1 1G1 1I0 1G0", r"backwards of chunks \[1\]; they"),
        ("0F0 0F1 0I1 0I0 0G0 0G1\n1F0 1F1 1I1 1G1 1I0 1G0", r"backwards .* \[0, 1\]"),
        ("0F0 0F1 0G1 0I1 0I0 0G0\n1F0 1F1 1I1 1G1 1I0 1G0", "rank 0 waits at 0G1 for 0I1"),
        ("0F0 0F1 0B1 0B0\n1F0 1B1 1F1 1B0", "deadlocks: .*rank 1 waits at 1B1 for 1F1"),
    ],
)
def test_verify_refuses(rows: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        verify(parse(rows), num_chunks=2)


def test_verify_wants_every_virtual_stage() -> None:
    with pytest.raises(
        ScheduleError, match=r"stage 1 runs forwards of chunks \[\]; each of the 2"
    ):
        verify(parse("0F0 0F1 0B1 0B0"), num_chunks=2, virtual_stages=2)


# --- drawing


def test_a_long_action_is_drawn_over_several_slots() -> None:
    timeline = simulate(fill_drain(2, 2), lambda a: 1.0 if a.kind == "F" else 2.0)
    assert draw(timeline).splitlines() == [
        "clock   0    1    2    3    4  5    6  7    8",
        "rank 0  0F0  0F1  .    .    .  0B1  -  0B0  -",
        "rank 1  .    1F0  1F1  1B1  -  1B0  -  .    .",
    ]


def test_a_slot_may_be_given() -> None:
    timeline = simulate(fill_drain(1, 2), one_second)
    assert draw(timeline, slot_s=2.0).splitlines() == ["clock   0    1", "rank 0  0F0  0B1"]


def test_slots_survive_rounding() -> None:
    timeline = simulate(fill_drain(2, 3), lambda a: 0.1)
    assert draw(timeline) == draw(simulate(fill_drain(2, 3), one_second))


def test_a_drawing_stays_within_120_slots() -> None:
    timeline = simulate(fill_drain(2, 3), lambda a: 1.0 if a.kind == "F" else 1e5)
    assert len(draw(timeline).splitlines()[0].split()) <= 122


def test_an_empty_timeline_is_drawn() -> None:
    assert draw(simulate([[]], one_second)) == "clock   0\nrank 0  ."


def test_actions_without_duration_are_drawn() -> None:
    assert draw(simulate(fill_drain(1, 1), lambda a: 0.0)) == "clock   0\nrank 0  0F0"


# --- splitting layers


def test_equal_layers_are_split_evenly() -> None:
    assert split_layers([1.0] * 34, 4) == [9, 9, 8, 8]


def test_a_dear_layer_stands_alone() -> None:
    assert split_layers([1, 1, 9, 1, 1], 3) == [2, 1, 2]


def test_one_stage_takes_all_layers() -> None:
    assert split_layers([1, 2, 3], 1) == [3]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_no_split_beats_the_one_found(costs: list[int], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))

    def dearest(sizes: list[int]) -> int:
        ends = [sum(sizes[: stage + 1]) for stage in range(len(sizes))]
        return max(sum(costs[end - size : end]) for end, size in zip(ends, sizes, strict=True))

    cuts = combinations(range(1, len(costs)), num_stages - 1)
    every = [[b - a for a, b in pairwise([0, *cut, len(costs)])] for cut in cuts]
    found = split_layers(costs, num_stages)
    assert found in every
    assert dearest(found) == min(map(dearest, every))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"`num_stages` \(=4\) must be at most .* layers \(=3\); "):
        split_layers([1, 1, 1], 4)


def test_no_stages_are_refused() -> None:
    with pytest.raises(UserError, match=r"`num_stages` \(=0\) must be at least 1; "):
        split_layers([1, 1, 1], 0)


@pytest.mark.parametrize("cost", [-1.0, float("nan")])
def test_impossible_costs_are_refused(cost: float) -> None:
    with pytest.raises(AssertionError, match="a layer's cost is negative or NaN"):
        split_layers([1.0, cost], 1)


def test_schedule_and_mesh_load_no_array_library() -> None:
    code = (
        "import sys, gnnpipe.schedule, gnnpipe.mesh, gnnpipe.counter;"
        "print(sorted({'numpy', 'torch', 'ray'} & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"
