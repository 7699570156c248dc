"""JumpingKnowledge over a pipeline: what the layers gave is carried to the last one."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from gnnpipe.models.cost import dense_flops
from gnnpipe.models.foreign.run import dense, foreign, reset
from gnnpipe.models.layer import GraphView, Layer

JumpMode = Literal["cat", "max", "lstm"]
NAME = "jumps"


class CollectLayer(Layer):
    """Adds its rows to those that are carried, and hands them on unchanged.

    One carried tensor in all: side by side, or for ``max`` the largest so far.

    Args:
        mode: how they are joined in the end.
        channels: width of the rows.
        index: how many layers were collected before.
    """

    def __init__(self, mode: JumpMode, channels: int, index: int) -> None:
        super().__init__()
        self.mode, self.index = mode, index
        self.in_channels = self.out_channels = channels
        self.reads = (NAME,) if index else ()
        self.writes = (NAME,)

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Carries what is collected."""
        x = dense(x)
        if not self.index:
            graph.carry(NAME, x)
        elif self.mode == "max":
            before = graph.carried(NAME)
            graph.carry(NAME, torch.where(x > before, x, before))
        else:
            graph.carry(NAME, torch.cat((graph.carried(NAME), x), dim=1))
        return x

    def reset_parameters(self) -> None:
        """There are none."""

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """Next to nothing."""
        return 0.0

    def carried_channels(self, name: str) -> int:
        """Width of what is carried."""
        return self.out_channels * (1 if self.mode == "max" else self.index + 1)


class JumpLayer(Layer):
    """Joins what was collected; the rows themselves are the last of it.

    Args:
        mode: how.
        channels: width of one layer's rows.
        count: number of layers collected.
        module: torch_geometric's ``JumpingKnowledge``, needed for ``lstm``.
    """

    def __init__(
        self, mode: JumpMode, channels: int, count: int, *, module: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.mode, self.count = mode, count
        self.in_channels = channels
        self.out_channels = channels * count if mode == "cat" else channels
        self.reads = (NAME,)
        self.jk: Any = module if mode == "lstm" else None

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """The joined rows; x itself is among the carried."""
        jumps = graph.carried(NAME)
        if self.jk is None:
            return jumps
        with foreign(self.jk, graph):
            out: Tensor = self.jk(list(torch.split(jumps, self.in_channels, dim=1)))
        return out

    def reset_parameters(self) -> None:
        """Draws the LSTM's weights."""
        if self.jk is not None:
            reset(self.jk)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """A product with every weight."""
        weights = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return dense_flops(num_nodes, weights * self.count, 1)
