"""The frame that the plain models share: dropout, convolution, ReLU."""

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gnnpipe.models.layer import GraphView, Layer
from gnnpipe.models.norm import NoNorm, Norm


class Affine(NamedTuple):
    """A convolution as ``relu(sums W + rows V + bias)``, so that it can be run by hand.

    ``rows`` are the dropped-out input and ``sums`` its aggregation, mixed with carried rows where
    there are any: ``lerp(sums, carried, share)``.
    """

    sums: Tensor
    """W as ``nn.Linear`` holds it, ``[out_channels, in_channels]``; with a beta as it stands in
    the product, ``[in_channels, out_channels]``."""
    rows: Tensor | None = None
    """V, ``[out_channels, in_channels]``."""
    bias: Tensor | None = None
    carried: str | None = None
    share: float = 0.0
    beta: float | None = None
    """The sums are multiplied with ``(1 - beta) I + beta W`` instead of W."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the parts that are learned."""
        parts = (self.sums, self.rows, self.bias)
        return [part for part in parts if isinstance(part, nn.Parameter)]

    @property
    def out_channels(self) -> int:
        """Width of the result."""
        return self.sums.shape[0 if self.beta is None else 1]

    def matrix(self) -> Tensor:
        """What the sums are multiplied with, ``[in_channels, out_channels]``."""
        if self.beta is None:
            return self.sums.t()
        mixed = self.sums * self.beta
        mixed.diagonal().add_(1.0 - self.beta)
        return mixed


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

    def affine(self) -> Affine | None:
        """:meth:`convolve` in parts, without the norm; None where it is more than that."""
        return None

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


def pre_activated(x: Tensor, norm: Norm, graph: GraphView) -> Tensor:
    """``relu(norm(x))``, of which the backward needs a bit of each number where there is a norm.

    Args:
        x: hidden rows, ``[num_rows, channels]``, which stay as they are.
        norm: which one.
        graph: what runs it.
    """
    h = graph.normalise(x, norm)
    return x.relu() if h is x else graph.relu(h)


def affine_of(layer: Layer) -> Affine | None:
    """How to run a layer by hand; None where its own code says more than its parts do."""
    kind = type(layer)
    if not isinstance(layer, Convolution) or kind.forward is not Convolution.forward:
        return None
    definers = [
        next(c for c in kind.__mro__ if name in vars(c)) for name in ("convolve", "affine")
    ]
    is_watched = bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
    is_plain = isinstance(layer.norm, NoNorm) and layer.aggregates_input and not layer.writes
    if definers[0] is not definers[1] or is_watched or not is_plain:
        return None
    affine = layer.affine()
    parts = () if affine is None else (affine.sums, affine.rows, affine.bias)
    return affine if all(isinstance(p, nn.Parameter | None) for p in parts) else None


def glorot(weight: Tensor) -> None:
    """Fills ``[..., a, b]`` uniformly within ``sqrt(6 / (a + b))``, as torch_geometric does.

    torch's own ``xavier_uniform_`` counts the leading dimensions of attention vectors too.
    """
    bound = math.sqrt(6.0 / (weight.size(-2) + weight.size(-1)))
    with torch.no_grad():
        weight.uniform_(-bound, bound)
