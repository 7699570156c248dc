"""Ranks and places in the pipeline."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnnpipe.mesh import Mesh


def test_ranks_are_numbered_stage_by_stage() -> None:
    mesh = Mesh(num_stages=3, num_ways=2)
    assert [[mesh.rank_of(s, w) for w in range(2)] for s in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert mesh.world_size == 6


@given(st.integers(1, 9), st.integers(1, 9))
def test_rank_and_place_are_inverse(num_stages: int, num_ways: int) -> None:
    mesh = Mesh(num_stages, num_ways)
    places = [(mesh.stage_rank(rank), mesh.way(rank)) for rank in range(mesh.world_size)]
    assert [mesh.rank_of(*place) for place in places] == list(range(mesh.world_size))


def test_virtual_stages_go_round_the_stage_ranks() -> None:
    mesh = Mesh(num_stages=2, num_ways=4)
    assert [mesh.home(stage) for stage in range(6)] == [0, 1, 0, 1, 0, 1]
    assert list(mesh.stages_of(0, virtual_stages=3)) == [0, 2, 4]
    assert list(mesh.stages_of(1, virtual_stages=3)) == [1, 3, 5]


def test_places_outside_the_mesh_are_refused() -> None:
    mesh = Mesh(num_stages=2, num_ways=2)
    with pytest.raises(AssertionError, match="stage rank 2 is not in Mesh"):
        mesh.rank_of(2, 0)
    with pytest.raises(AssertionError, match="way 2 is not in Mesh"):
        mesh.rank_of(0, 2)
    for ask in (mesh.stage_rank, mesh.way):
        with pytest.raises(AssertionError, match="rank 4 is not in Mesh"):
            ask(4)
