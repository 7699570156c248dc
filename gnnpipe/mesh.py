"""Which rank does what: pipeline stages times ways, numbered stage by stage."""

from typing import NamedTuple


class Mesh(NamedTuple):
    """The ranks of a run as a table, for example 3 stages x 2 ways::

                      way 0   way 1
        stage rank 0  rank 0  rank 1
        stage rank 1  rank 2  rank 3
        stage rank 2  rank 4  rank 5

    A *stage rank* is a place in the pipeline. With virtual stages it holds several stages:
    stage ``s`` lives on stage rank ``s % num_stages``.
    """

    num_stages: int  # places in the pipeline, virtual stages not counted
    num_ways: int  # ranks that share one stage's graph

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_stages * self.num_ways

    def rank_of(self, stage_rank: int, way: int) -> int:
        """The rank at one place of the table."""
        assert 0 <= stage_rank < self.num_stages, f"stage rank {stage_rank} is not in {self}"
        assert 0 <= way < self.num_ways, f"way {way} is not in {self}"
        return stage_rank * self.num_ways + way

    def stage_rank(self, rank: int) -> int:
        """The row of a rank: its place in the pipeline."""
        assert 0 <= rank < self.world_size, f"rank {rank} is not in {self}"
        return rank // self.num_ways

    def way(self, rank: int) -> int:
        """The column of a rank: its part of the graph."""
        assert 0 <= rank < self.world_size, f"rank {rank} is not in {self}"
        return rank % self.num_ways

    def home(self, stage_index: int) -> int:
        """The stage rank that holds a stage, virtual stages included."""
        return stage_index % self.num_stages

    def place(self, rank: int) -> str:
        """The way of a rank among how many, as checkpoints name what is one way's own."""
        return f"{self.way(rank)}of{self.num_ways}"

    def stages_of(self, stage_rank: int, *, virtual_stages: int) -> range:
        """The stages that a stage rank holds, first to last."""
        return range(stage_rank, self.num_stages * virtual_stages, self.num_stages)
