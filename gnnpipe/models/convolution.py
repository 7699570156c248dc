"""The frame that the plain models share: dropout, convolution, ReLU."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from gnnpipe.models.layer import GraphView, Layer
from gnnpipe.models.norm import NoNorm, Norm


class Convolution(Layer):
    """A convolution between dropout and ReLU.

    ``forward(x) = relu(norm(convolve(dropout(x))))``: what neighbours read is already dropped out.
    Without a norm it is the identity.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        dropout: probability of a zero in the input, in [0, 1).
    """

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dropout = dropout
        self.norm: Norm = NoNorm()

    @property
    def input_lies_in_table(self) -> bool:
        """Whether what is dropped out is what is aggregated."""
        return self.aggregates_input

    @abstractmethod
    def convolve(self, x: Tensor, graph: GraphView) -> Tensor:
        """The convolution alone: ``[num_rows, in_channels]`` to ``[num_rows, out_channels]``."""

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Drops out, convolves and rectifies the rows."""
        h = self.convolve(graph.dropout(x, self.dropout), graph)
        return graph.relu(graph.normalise(h, self.norm))

    def reset_parameters(self) -> None:
        """The norm becomes the plain one; subclasses draw their weights besides."""
        self.norm.reset_parameters()

    def norm_numbers(self, num_rows: int) -> int:
        """What a norm keeps of one chunk, in numbers: its input."""
        return 0 if isinstance(self.norm, NoNorm) else num_rows * self.out_channels


def glorot(weight: Tensor) -> None:
    """Fills ``[..., a, b]`` uniformly within ``sqrt(6 / (a + b))``, as torch_geometric does.

    torch's own ``xavier_uniform_`` counts the leading dimensions of attention vectors too.
    """
    bound = math.sqrt(6.0 / (weight.size(-2) + weight.size(-1)))
    with torch.no_grad():
        weight.uniform_(-bound, bound)
