"""The pipelined forward written by hand: dense matrices, all nodes at once, plain autograd.

Node i reads node j's value just computed where j's chunk is i's own or came earlier in the
order, and a historical value without gradient elsewhere::

    order 1 0 2         reads from chunk  0  1  2
                        chunk 1           h  .  h      .  its own, gradient x 1
                        chunk 0           .  x  h      x  fresh, gradient x factor
                        chunk 2           x  x  .      h  historical, no gradient
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gnnpipe.compensation import PRIOR
from gnnpipe.full_graph import FullGraph, FullGraphView
from gnnpipe.graph import Graph

Weights = Mapping[str, Tensor]
Tables = dict[int, Tensor]


class Epoch(NamedTuple):
    """What one epoch's forward depends on beside weights and histories."""

    chunk_id: Sequence[int]
    order: Sequence[int]
    factor: float
    stream: tuple[int, int] | None
    """Seed and epoch of the dropout masks; None is no dropout."""
    dropout: float
    strata: Sequence[int] | None = None
    """Stratum of each node; None leaves historical rows as they are."""


class ByHand:
    """A small model on a small graph; ``tables`` holds what the last forward computed.

    Args:
        graph: the graph.
        name: gcn, gat or gcnii.
        num_layers: number of convolutions.
    """

    def __init__(self, graph: Graph, name: str, *, num_layers: int) -> None:
        self.full = FullGraph(graph, dtype=torch.float64)
        self.norm = self.full.matrix("gcn").to_dense()  # [target, source]
        self.features = self.full.features.to_dense()
        self.labels = torch.from_numpy(graph.labels)
        self.train = torch.from_numpy(np.flatnonzero(graph.train_mask & (graph.labels >= 0)))
        self.num_layers = num_layers
        self.tables: Tables = {}
        kinds: dict[str, Callable[..., Tensor]]
        kinds = {"gcn": self._gcn, "gat": self._gat, "gcnii": self._gcnii}
        self._convolution = kinds[name]

    def loss(self, weights: Weights, history: Tables, epoch: Epoch) -> Tensor:
        """Mean cross entropy of the labelled training nodes."""
        logits = self.logits(weights, history, epoch)[self.train]
        return functional.cross_entropy(logits, self.labels[self.train])

    def logits(self, weights: Weights, history: Tables, epoch: Epoch) -> Tensor:
        self.tables = {}
        last = self.num_layers + 1
        x = self._view(0, epoch).dropout(self.features, epoch.dropout)
        h = h0 = (x @ weights["layers.0.lin.weight"].T + weights["layers.0.lin.bias"]).relu()
        for layer in range(1, last):
            own = {key.split(".", 2)[2]: w for key, w in weights.items() if f".{layer}." in key}
            view = self._view(layer, epoch)
            x = view.dropout(h, epoch.dropout)

            read = partial(self._read, layer, history, epoch)
            h = self._convolution(own, x, read, h0=h0, layer=layer, view=view, p=epoch.dropout)
            h = h.relu()
        x = self._view(last, epoch).dropout(h, epoch.dropout)
        return x @ weights[f"layers.{last}.lin.weight"].T + weights[f"layers.{last}.lin.bias"]

    def _read(self, layer: int, history: Tables, epoch: Epoch, value: Tensor) -> Tensor:
        self.tables[layer] = value.detach()
        return mixed(value, history.get(layer), epoch)

    def _gcn(self, own: Weights, x: Tensor, read: Callable[..., Tensor], **_: object) -> Tensor:
        total = torch.einsum("ij,ijf->if", self.norm, read(x))
        return total @ own["lin.weight"].T + own["bias"]

    def _gcnii(
        self,
        own: Weights,
        x: Tensor,
        read: Callable[..., Tensor],
        *,
        h0: Tensor,
        layer: int,
        **_: object,
    ) -> Tensor:
        beta = math.log(0.5 / layer + 1.0)
        s = 0.9 * torch.einsum("ij,ijf->if", self.norm, read(x)) + 0.1 * h0
        return (1.0 - beta) * s + beta * s @ own["weight1"]

    def _gat(
        self,
        own: Weights,
        x: Tensor,
        read: Callable[..., Tensor],
        *,
        view: FullGraphView,
        p: float,
        **_: object,
    ) -> Tensor:
        z = x @ own["lin.weight"].T  # [N, heads * C]
        heads, width = own["att_src"].shape[1:]
        source, target = self.full.edge_index("edges_self")
        num_nodes = z.shape[0]
        z_src = read(z).view(num_nodes, num_nodes, heads, width)  # [target, source, heads, C]
        logit = (z_src * own["att_src"]).sum(3)
        logit = logit + (z.view(-1, heads, width) * own["att_dst"]).sum(2).unsqueeze(1)
        is_edge = torch.zeros_like(logit, dtype=torch.bool)
        is_edge[target, source] = True
        logit = functional.leaky_relu(logit, 0.2).masked_fill(~is_edge, -math.inf)
        kept = torch.zeros_like(logit)
        ones = torch.ones(source.numel(), heads, dtype=z.dtype)
        kept[target, source] = view.edge_dropout(ones, p)
        alpha = logit.softmax(dim=1) * kept  # [target, source, heads]
        return torch.einsum("ijh,ijhc->ihc", alpha, z_src).flatten(1) + own["bias"]

    def _view(self, layer: int, epoch: Epoch) -> FullGraphView:
        stream = None if epoch.stream is None else (*epoch.stream, layer)
        return FullGraphView(self.full, "edges_self", stream=stream)


def mixed(value: Tensor, history: Tensor | None, epoch: Epoch) -> Tensor:
    """What each target reads of each source, ``[target, source, F]``.

    Args:
        value: just computed, ``[N, F]``.
        history: of the same shape; None is zeros.
        epoch: order and factor.
    """
    position = torch.empty(len(epoch.order), dtype=torch.int64)
    position[list(epoch.order)] = torch.arange(len(epoch.order))
    place = position[list(epoch.chunk_id)]  # [N]
    is_own = (place.unsqueeze(1) == place.unsqueeze(0)).unsqueeze(2)
    is_earlier = (place.unsqueeze(1) > place.unsqueeze(0)).unsqueeze(2)
    crossing = value + (epoch.factor - 1.0) * (value - value.detach())
    stale = torch.zeros_like(value) if history is None else history.detach()
    fresh = torch.where(is_own, value.unsqueeze(0), crossing.unsqueeze(0))
    read = torch.where(is_own | is_earlier, fresh, stale.unsqueeze(0))
    if epoch.strata is None:
        return read
    drift = torch.where(is_own, value, crossing) - stale  # [target, source, F]
    return torch.where(is_own | is_earlier, read, read + moved(drift, place, epoch.strata))


def moved(drift: Tensor, place: Tensor, strata: Sequence[int]) -> Tensor:
    """What each target adds to each source if it is historical, ``[target, source, F]``.

    Args:
        drift: from historical to fresh, as the target sees its gradient, ``[target, source, F]``.
        place: position of each node's chunk, ``[N]``.
        strata: of each node.
    """
    stratum = torch.as_tensor(strata)
    result = torch.zeros_like(drift)
    for target in range(len(strata)):
        done = place <= place[target]
        mean = drift[target, done].mean(0)
        for index in sorted(set(strata)):
            own = done & (stratum == index)
            total = drift[target, own].sum(0) + PRIOR * mean
            result[target, stratum == index] = total / (own.sum() + PRIOR)
    return result


def strata_of(graph: Graph, limit: int = 16) -> list[int]:
    """Stratum of each node: how often its number of readers can be halved."""
    readers = np.bincount(graph.indices, minlength=graph.num_nodes)
    return [min(max(int(n), 1).bit_length() - 1, limit - 1) for n in readers]


def exact(chunk_id: Sequence[int]) -> Epoch:
    """The plain forward: one chunk, no dropout."""
    return Epoch([0] * len(chunk_id), [0], 1.0, None, 0.0)
