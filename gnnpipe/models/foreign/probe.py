"""Whether a convolution means the same on a block as on the whole graph: tried, not guessed.

A small graph that has what graphs have (self-loop, isolated node, sources of other degrees) is
convolved as a whole and as a block of its first rows; results and gradients must agree.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gnnpipe.models.foreign.block import EDGE_ARGUMENTS, BlockLayer, signs
from gnnpipe.models.foreign.facts import EdgeFacts
from gnnpipe.models.layer import EdgeValue, GraphView, Operator, Rows

NUM_NODES, NUM_OWN = 9, 5
# Sorted by target; 0 -> 0 is a self-loop, 8 has no in-edge, sources have 0 to 3 in-edges.
SOURCE = (0, 1, 6, 0, 5, 7, 1, 3, 6, 8, 2, 2, 4, 6, 0, 5, 7)
TARGET = (0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 5, 5, 6, 6, 6, 7)
TOLERANCE = 1e-7


class Sample(NamedTuple):
    """The small graph."""

    edge_index: Tensor
    values: dict[EdgeValue, Tensor]

    @staticmethod
    def draw(facts: EdgeFacts, generator: torch.Generator) -> "Sample":
        """Gives the edges the values that the real graph's have."""
        edge_index = torch.tensor([SOURCE, TARGET])
        num_edges = edge_index.shape[1]
        values: dict[EdgeValue, Tensor] = {}
        if facts.has_weight:
            values["weight"] = torch.rand(num_edges, generator=generator).double() + 0.5
        if facts.attr_channels:
            shape = (num_edges, facts.attr_channels)
            values["attr"] = torch.randn(shape, generator=generator).double()
        if facts.num_types:
            values["type"] = torch.arange(num_edges) % facts.num_types
        return Sample(edge_index, values)

    def of(self, is_kept: Tensor) -> "Sample":
        """Some of the edges."""
        values = {name: value[is_kept] for name, value in self.values.items()}
        return Sample(self.edge_index[:, is_kept], values)

    def normalised(self, operator: Operator) -> "Sample":
        """The edges with the weights of ``edges_gcn`` or ``edges_sym``."""
        source, target = self.edge_index
        weight = self.values.get("weight", torch.ones(source.numel()).double())
        if operator == "edges_gcn":
            is_loop, nodes = source == target, torch.arange(NUM_NODES)
            loop = torch.ones(NUM_NODES).double()
            loop[source[is_loop]] = weight[is_loop]
            source, target = (torch.cat((part[~is_loop], nodes)) for part in (source, target))
            weight = torch.cat((weight[~is_loop], loop))
        degree = torch.zeros(NUM_NODES).double().index_add(0, target, weight)
        scale = torch.where(degree > 0, degree.rsqrt(), 0.0)
        order = target.argsort(stable=True)
        edges = torch.stack((source, target))[:, order]
        return Sample(edges, {"weight": (scale[source] * weight * scale[target])[order]})


class _Block:
    """The view of the first rows, evaluation mode."""

    def __init__(self, sample: Sample, outside: Tensor, carried: Tensor) -> None:
        is_read = sample.edge_index[1] < NUM_OWN
        self._sample = sample.of(is_read)
        self._outside, self._carried = outside, carried

    def gather(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All rows outside are halo."""
        return torch.cat((x, self._outside)), self._sample.edge_index

    def edge_values(self, name: EdgeValue) -> Tensor | None:
        """Of the edges into the rows."""
        return self._sample.values.get(name)

    def foreign_seed(self) -> int | None:
        """Evaluation."""
        return None

    def carried(self, name: str) -> Tensor:
        """Rows of x_0."""
        return self._carried

    def dropout(self, x: Rows, p: float) -> Rows:
        """Evaluation."""
        return x

    def aggregate(self, x: Tensor) -> Tensor:
        """A block layer gathers."""
        raise AssertionError

    def edge_dropout(self, alpha: Tensor, p: float) -> Tensor:
        """Evaluation."""
        return alpha

    def normalise(self, x: Tensor, norm: nn.Module) -> Tensor:
        """A block layer has none."""
        raise AssertionError

    def relu(self, x: Tensor) -> Tensor:
        """Plain."""
        return x.relu()

    def attend(self, x_src: Tensor, logits: tuple[Tensor, Tensor], p: float) -> Tensor:
        """A block layer does its own."""
        raise AssertionError

    def largest(self, x_src: Tensor) -> Tensor:
        """A block layer does its own."""
        raise AssertionError

    def carry(self, name: str, value: Tensor) -> None:
        """A block layer carries nothing."""
        raise AssertionError


def whole_call(
    conv: nn.Module, x: Tensor, *, sample: Sample, arguments: tuple[str, ...]
) -> Tensor:
    """The convolution as torch_geometric runs it, on the whole small graph."""
    found = {a: sample.values[EDGE_ARGUMENTS[a]] for a in arguments if a in EDGE_ARGUMENTS}
    if "x_0" in arguments:
        found["x_0"] = first_rows(x)
    if "pos_edge_index" in arguments:
        is_positive = signs(sample.values.get("type"), sample.values.get("weight"))
        edges = sample.edge_index
        pair = {"pos_edge_index": edges[:, is_positive], "neg_edge_index": edges[:, ~is_positive]}
        return conv(x, **pair, **found)  # type: ignore[no-any-return]
    return conv(x, edge_index=sample.edge_index, **found)  # type: ignore[no-any-return]


def first_rows(x: Tensor) -> Tensor:
    """Some x_0 for x."""
    return x.flip(1) + 1.0


def difference(
    conv: nn.Module, layer: BlockLayer, *, facts: EdgeFacts, whole_arguments: tuple[str, ...]
) -> float:
    """Largest difference between the block and the whole graph, of results and gradients.

    Args:
        conv: as the user made it.
        layer: the adapter to try; holds the convolution or a twin of it.
        facts: of the graph's edges.
        whole_arguments: what the convolution takes on the whole graph.
    """
    generator = torch.Generator().manual_seed(1)
    sample = Sample.draw(facts, generator)
    x = torch.randn(NUM_NODES, layer.in_channels, generator=generator).double()
    pair = copy.deepcopy((conv, layer))
    conv, layer = (module.double().eval() for module in pair)  # type: ignore[assignment]
    block_sample = sample
    if layer.operator != "edges":
        block_sample = sample.normalised(layer.operator)
    view: GraphView = _Block(block_sample, x[NUM_OWN:], first_rows(x)[:NUM_OWN])
    with torch.random.fork_rng(devices=[]):
        whole = _results(
            conv,
            lambda rows: whole_call(conv, rows, sample=sample, arguments=whole_arguments)[
                :NUM_OWN
            ],
            x,
        )
        block = _results(layer.conv, lambda rows: layer(rows[:NUM_OWN], view), x)
    return max(float((a - b).abs().max()) for a, b in zip(whole, block, strict=True) if a.numel())


def _results(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The rows and the gradients of all weights, NaN replaced by infinity."""
    out = run(x)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    weights = [p for p in module.parameters() if p.requires_grad]
    gradients: list[Tensor] = []
    if weights and loss.requires_grad:
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        gradients = [
            torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)
        ]
    return [part.detach().nan_to_num(nan=float("inf")) for part in (out, *gradients)]
