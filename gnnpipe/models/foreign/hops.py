"""Propagation over K hops as K layers: each has its own table, and so its own history.

A convolution that reads the neighbours K times has no place in one layer: its hops two to K
would read rows that no table holds. Unrolled, hop k is a layer, and what its later hops need of
earlier ones is carried along. All of them are polynomials in one operator P::

    t_0 = x      t_k = scale P t_(k-1) + share (carried t)      total = sum_k factor_k lin_k(t_k)
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gnnpipe.kernels import SparseRows
from gnnpipe.models.cost import dense_flops, edge_flops
from gnnpipe.models.foreign.run import dense, reset
from gnnpipe.models.layer import GraphView, Layer, Operator


class KeepLayer(Layer):
    """Hands its rows on unchanged, and to later layers under a name.

    Args:
        name: of the carried rows.
        channels: width.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.writes = (name,)

    def forward(self, x: Tensor | SparseRows, graph: GraphView) -> Tensor:
        """Carries the rows."""
        x = dense(x)
        graph.carry(self.writes[0], x)
        return x

    def reset_parameters(self) -> None:
        """There are none."""

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """Next to nothing."""
        return 0.0


class Term(NamedTuple):
    """What one t_k adds to the total."""

    name: str
    """Carried name of the total."""
    lin: nn.Module | None = None
    """Weights of the term; None is the identity."""
    factor: float = 1.0

    def of(self, t: Tensor) -> Tensor:
        """``factor lin(t)``."""
        out: Tensor = t if self.lin is None else self.lin(t)
        return out if self.factor == 1.0 else self.factor * out


class StartLayer(Layer):
    """Starts a total, ``total = factor_0 lin_0(x)``, and hands x on.

    Args:
        term: the first term.
        in_channels: width of x.
        total_channels: width of the total.
    """

    def __init__(self, term: Term, *, in_channels: int, total_channels: int) -> None:
        super().__init__()
        self.in_channels = self.out_channels = in_channels
        self.total_channels = total_channels
        self.lin = term.lin
        self.writes = (term.name,)
        self._term = term

    def forward(self, x: Tensor | SparseRows, graph: GraphView) -> Tensor:
        """Carries the first term."""
        x = dense(x)
        graph.carry(self._term.name, self._term.of(x))
        return x

    def reset_parameters(self) -> None:
        """Draws the term's weights."""
        if self.lin is not None:
            reset(self.lin)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One dense product."""
        return dense_flops(num_nodes, self.in_channels, self.total_channels)

    def carried_channels(self, name: str) -> int:
        """Width of the total."""
        return self.total_channels


class Recurrence(NamedTuple):
    """How t_k follows from t_(k-1)."""

    operator: Operator
    scale: float = 1.0
    share: float = 0.0
    """Factor of the carried rows."""
    reads: str | None = None
    """Name of the carried rows."""
    writes: str | None = None
    """Name under which t_(k-1) is carried for the hop after this one."""


class HopLayer(Layer):
    """One hop, ``t = scale P x + share carried``; the last hop gives the total.

    Args:
        step: the recurrence.
        term: what t adds to the total; None without a total.
        head: applied to the result of the last hop; None elsewhere.
        channels: width of x.
        total_channels: width of the total.
        out_channels: width of the result: of t, or of the total or the head in the last hop.
    """

    def __init__(
        self,
        step: Recurrence,
        *,
        channels: int,
        out_channels: int,
        term: Term | None = None,
        is_last: bool = False,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.operator = step.operator
        self.in_channels = self.table_channels = channels
        self.out_channels = out_channels
        self.is_last = is_last
        self.lin = None if term is None else term.lin
        self.head = head
        self._step, self._term = step, term
        total = () if term is None else (term.name,)
        self.reads = (*total, *(() if step.reads is None else (step.reads,)))
        self.writes = () if is_last else total
        self.writes += () if step.writes is None or is_last else (step.writes,)
        self.total_channels = 0

    def forward(self, x: Tensor | SparseRows, graph: GraphView) -> Tensor:
        """Propagates once."""
        x = dense(x)
        step, term = self._step, self._term
        t = graph.aggregate(x)
        t = t if step.scale == 1.0 else step.scale * t
        if step.reads is not None:
            t = t + step.share * graph.carried(step.reads)
        if step.writes is not None and not self.is_last:
            graph.carry(step.writes, x)
        total = t if term is None else graph.carried(term.name) + term.of(t)
        if self.is_last:
            return total if self.head is None else self.head(total)
        if term is not None:
            graph.carry(term.name, total)
        return t

    def reset_parameters(self) -> None:
        """Draws the weights of the term and the head."""
        for module in (self.lin, self.head):
            if module is not None:
                reset(module)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One sum over the edges and a product with every weight."""
        weights = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return dense_flops(num_nodes, weights, 1) + edge_flops(num_edges, self.table_channels)

    def carried_channels(self, name: str) -> int:
        """Width of the total or of the carried rows."""
        is_total = self._term is not None and name == self._term.name
        return self.total_channels if is_total else self.in_channels


class AddBias(nn.Module):
    """Adds a bias, the parameter of another module."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def reset_parameters(self) -> None:
        """Starts at zero."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Adds it."""
        return x + self.bias


class StackHopLayer(Layer):
    """One recursion of ARMA, for K stacks side by side.

    ``x_k = act(P (x W_k) + dropout(x_0) V_k + b_k)`` for each stack; the last gives their mean.

    Args:
        weights: W ``[K, in, out]``, V ``[K, in_0, out]`` and b ``[K, 1, out]`` or None.
        act: activation, or None.
        dropout: of x_0.
        first_rows: carried name of x_0; None in the first recursion, whose x is x_0.
        is_last: whether to take the mean.
    """

    operator = "sym"

    def __init__(
        self,
        weights: tuple[nn.Parameter, nn.Parameter, nn.Parameter | None],
        *,
        act: nn.Module | None,
        dropout: float,
        first_rows: str | None,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.weight, self.root_weight, self.bias = weights
        stacks, fan_in, channels = self.weight.shape
        self.in_channels = fan_in if first_rows is None else stacks * fan_in
        self.table_channels = stacks * channels
        self.out_channels = channels if is_last else stacks * channels
        self.reads = () if first_rows is None else (first_rows,)
        self.act, self.dropout, self.is_last = act, dropout, is_last

    def forward(self, x: Tensor | SparseRows, graph: GraphView) -> Tensor:
        """Propagates once."""
        x = dense(x)
        stacks, fan_in, channels = self.weight.shape
        first = graph.carried(self.reads[0]) if self.reads else x
        rows = x.unsqueeze(0)  # [1, num_rows, in]
        if self.reads:
            rows = x.view(-1, stacks, fan_in).transpose(0, 1)  # [K, num_rows, in]
        h = (rows @ self.weight).transpose(0, 1).reshape(x.shape[0], -1)
        out = graph.aggregate(h).view(-1, stacks, channels).transpose(0, 1)
        out = out + graph.dropout(first, self.dropout).unsqueeze(0) @ self.root_weight
        out = out if self.bias is None else out + self.bias
        out = out if self.act is None else self.act(out)
        if self.is_last:
            return out.mean(dim=0)
        return out.transpose(0, 1).reshape(x.shape[0], -1)

    def reset_parameters(self) -> None:
        """Draws the weights by Glorot's rule; the bias starts at zero."""
        for weight in (self.weight, self.root_weight):
            bound = (6.0 / (weight.shape[-2] + weight.shape[-1])) ** 0.5
            with torch.no_grad():
                weight.uniform_(-bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """Two dense products for each stack and one sum over the edges."""
        weights = self.weight.numel() + self.root_weight.numel()
        return dense_flops(num_nodes, weights, 1) + edge_flops(num_edges, self.table_channels)
