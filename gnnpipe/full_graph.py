"""The whole graph in plain torch, as a layer sees it in the reference loop.

Written apart from the kernels and tables of the pipeline, dropout rule included: an oracle that
shared them would share their mistakes.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gnnpipe.counter import GOLDEN_64, stream_key
from gnnpipe.graph import Graph
from gnnpipe.models.gat import edge_softmax
from gnnpipe.models.layer import NEGATIVE_SLOPE, EdgeValue, Operator, Rows
from gnnpipe.models.norm import GraphNorm
from gnnpipe.shapes import gathers

_LOW_32 = (1 << 32) - 1


class FullGraph:
    """A graph's features and operators as torch tensors; operators are built on first use.

    Args:
        graph: the graph.
        dtype: of features and coefficients.
        device: where the tensors live.
    """

    def __init__(
        self, graph: Graph, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.num_nodes = graph.num_nodes
        self.features = _features(graph, dtype).to(device)  # [N, F], dense or torch.sparse
        self._edges = _Edges(*(part.to(device) for part in _edges(graph)))
        self._graph = graph
        self._dtype = dtype
        self._matrices: dict[Operator, Tensor] = {}
        self._edge_indices: dict[Operator, Tensor] = {}

    def matrix(self, operator: Operator) -> Tensor:
        """The operator as torch.sparse, ``[N, N]``; one that ``aggregate`` serves."""
        if operator not in self._matrices:
            edges = _coefficients(self._edges, operator, self.num_nodes)
            index = torch.stack([edges.target, edges.source])
            size = (self.num_nodes, self.num_nodes)
            self._matrices[operator] = _sparse(index, edges.weight.to(self._dtype), size)
        return self._matrices[operator]

    def edge_index(self, operator: Operator) -> Tensor:
        """Sources and targets that ``gather`` gives, ``[2, E]``, sorted by target."""
        if operator not in self._edge_indices:
            assert gathers(operator), operator
            edges = self._edges
            if operator in ("edges_self", "edges_gcn"):
                edges = _with_self_loops(edges, self.num_nodes)
            order = edges.target.argsort(stable=True)
            self._edge_indices[operator] = torch.stack([edges.source, edges.target])[:, order]
        return self._edge_indices[operator]

    def edge_values(self, operator: Operator, name: EdgeValue) -> Tensor | None:
        """Values on the edges of ``edge_index``; None where the graph has none."""
        if operator in ("edges_gcn", "edges_sym"):
            if name != "weight":
                return None
            wanted: Operator = "gcn" if operator == "edges_gcn" else "sym"
            edges = _coefficients(self._edges, wanted, self.num_nodes)
            return edges.weight[edges.target.argsort(stable=True)].to(self._dtype)
        array = getattr(self._graph, f"edge_{name}")
        if array is None:
            return None
        values = torch.from_numpy(array).to(self._edges.source.device)
        return values if name == "type" else values.to(self._dtype)


class FullGraphView:
    """All rows of a graph as one layer sees them in one forward.

    Args:
        full: the graph.
        operator: the layer's operator.
        stream: seed, epoch and layer index of the dropout masks; None turns dropout off.
        carried: values carried so far, by name; shared by the views of one forward.
    """

    def __init__(
        self,
        full: FullGraph,
        operator: Operator,
        *,
        stream: tuple[int, int, int] | None = None,
        carried: dict[str, Tensor] | None = None,
    ) -> None:
        self._full = full
        self._operator = operator
        self._stream = stream
        self._carried = {} if carried is None else carried
        self._num_sites = 0

    def aggregate(self, x: Tensor) -> Tensor:
        """Multiplies the operator with ``x [N, F]``."""
        product: Tensor = torch.sparse.mm(self._full.matrix(self._operator), x)
        return product

    def gather(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x [N, F]`` itself and the edges ``[2, E]``."""
        return x, self._full.edge_index(self._operator)

    def dropout(self, x: Rows, p: float) -> Rows:
        """Drops entries keyed by node and column; ``x`` is dense or torch.sparse."""
        assert isinstance(x, Tensor), "the loop makes sparse features with torch.sparse"
        key = self._next_key()
        if key is None or p == 0.0:
            return x
        if not x.is_sparse:
            row, column = torch.arange(x.shape[0]).unsqueeze(1), torch.arange(x.shape[1])
            return x * dropout_factor(row_keys(key, row.to(x.device)), column.to(x.device), p).to(
                x
            )
        row, column = x.indices()
        values = x.values() * dropout_factor(row_keys(key, row), column, p).to(x.dtype)
        return _sparse(x.indices(), values, x.shape)

    def edge_dropout(self, alpha: Tensor, p: float) -> Tensor:
        """Drops ``alpha [E, heads]`` keyed by source, target and head."""
        key = self._next_key()
        if key is None or p == 0.0:
            return alpha
        keys = row_keys(key, *self._full.edge_index(self._operator).unsqueeze(2))  # [E, 1]
        column = torch.arange(alpha.shape[1], device=alpha.device)
        return alpha * dropout_factor(keys, column, p).to(alpha.dtype)

    def normalise(self, x: Tensor, norm: nn.Module) -> Tensor:
        """torch's own modules; running statistics change with every forward in training."""
        if isinstance(norm, GraphNorm):
            centred = x - norm.mean_scale * x.mean(dim=0)
            deviation = (centred.square().mean(dim=0) + norm.eps).sqrt()
            return norm.weight * centred / deviation + norm.bias
        if isinstance(norm, nn.BatchNorm1d):
            norm.train(self._stream is not None)
        normed: Tensor = norm(x)
        return normed

    def relu(self, x: Tensor) -> Tensor:
        """Plain."""
        return x.relu()

    def attend(self, x_src: Tensor, logits: tuple[Tensor, Tensor], p: float) -> Tensor:
        """A message for each edge: softmax, dropout, sum."""
        source, target = self._full.edge_index(self._operator)
        logit = functional.leaky_relu(logits[0][source] + logits[1][target], NEGATIVE_SLOPE)
        num_rows, heads = logits[1].shape
        alpha = self.edge_dropout(edge_softmax(logit, target, num_rows), p)  # [E, heads]
        messages = alpha.unsqueeze(2) * x_src.view(x_src.shape[0], heads, -1)[source]
        total = x_src.new_zeros((num_rows, x_src.shape[1]))
        return total.index_add(0, target, messages.flatten(1))

    def largest(self, x_src: Tensor) -> Tensor:
        """Edges are sorted by source within a target, so the first of equal values is chosen."""
        source, target = self._full.edge_index(self._operator)
        size = (self._full.num_nodes, x_src.shape[1])
        index = target.unsqueeze(1).expand(-1, size[1])
        rows, place = x_src.detach()[source], torch.arange(source.numel()).unsqueeze(1)
        top = rows.new_full(size, -torch.inf).scatter_reduce(0, index, rows, "amax")
        place = torch.where(rows == top[target], place.to(source), source.numel())
        edge = torch.full(size, source.numel()).to(source).scatter_reduce(0, index, place, "amin")
        nobody = x_src.new_zeros((1, size[1]))
        sender = torch.cat((source, source.new_tensor([len(x_src)])))[edge]
        return torch.cat((x_src, nobody)).gather(0, sender)

    def edge_values(self, name: EdgeValue) -> Tensor | None:
        """What the edges of ``gather`` have."""
        return self._full.edge_values(self._operator, name)

    def foreign_seed(self) -> int | None:
        """The seed of chunk 0 and way 0: here everything is one chunk."""
        return None if self._stream is None else stream_key(*self._stream, 0, 0)

    def carry(self, name: str, value: Tensor) -> None:
        """Keeps ``value [N, F]`` for later layers."""
        self._carried[name] = value

    def carried(self, name: str) -> Tensor:
        """The value that an earlier layer carried under ``name``."""
        return self._carried[name]

    def _next_key(self) -> int | None:
        if self._stream is None:
            return None
        key = stream_key(*self._stream, self._num_sites)
        self._num_sites += 1
        return key


def row_keys(key: int, *ids: Tensor) -> Tensor:
    """Folds ids into a 64-bit key: of a node, or of an edge's source and then its target.

    Args:
        key: unsigned 64-bit key of the dropout call.
        ids: int64 tensors of one shape.

    Returns:
        One key for each entry, int64 with the bits of an unsigned one.
    """
    keys = torch.full_like(ids[0], _as_signed(key))
    for part in ids:
        keys = _mix((part * _as_signed(GOLDEN_64)) ^ keys)
    return keys


def dropout_factor(keys: Tensor, column: Tensor, p: float) -> Tensor:
    """What dropout multiplies entries with: 0, or ``1 / (1 - p)`` where they are kept.

    Args:
        keys: key of each entry's row, int64.
        column: column of each entry, int64; broadcast against ``keys``.
        p: probability of a zero, in [0, 1).

    Returns:
        Factors in float64.
    """
    z = (keys & _LOW_32) ^ ((column * 0x9E3779B9) & _LOW_32)
    z = (z + _shift(keys, 32)) & _LOW_32
    z = ((z ^ (z >> 16)) * 0x7FEB352D) & _LOW_32  # lowbias32; int64 keeps it non-negative
    z = ((z ^ (z >> 15)) * 0x846CA68B) & _LOW_32
    z = z ^ (z >> 16)
    return (z >= round(p * 2**32)).double() / (1.0 - p)


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's output function on the bits of int64, whose products wrap."""
    value = (value ^ _shift(value, 30)) * _as_signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift(value, 27)) * _as_signed(0x94D049BB133111EB)
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    # torch shifts the sign in; the rule shifts zeros in.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _as_signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


class _Edges(NamedTuple):
    source: Tensor
    """``[E]``, int64."""
    target: Tensor
    """``[E]``, int64."""
    weight: Tensor
    """``[E]``, float64; ones where the graph has none."""


def _edges(graph: Graph) -> _Edges:
    source = torch.from_numpy(graph.indices.astype(np.int64))
    target = torch.arange(graph.num_nodes).repeat_interleave(
        torch.from_numpy(np.diff(graph.indptr).astype(np.int64))
    )
    if graph.edge_weight is None:
        return _Edges(source, target, torch.ones(source.numel(), dtype=torch.float64))
    return _Edges(source, target, torch.from_numpy(graph.edge_weight.astype(np.float64)))


def _with_self_loops(edges: _Edges, num_nodes: int) -> _Edges:
    """Exactly one self-loop for each node: the graph's own, or a new one of weight 1."""
    source, target, weight = edges
    is_loop = source == target
    loop_weight = weight.new_ones(num_nodes)
    loop_weight[source[is_loop]] = weight[is_loop]
    nodes = torch.arange(num_nodes, device=source.device)
    return _Edges(
        torch.cat([source[~is_loop], nodes]),
        torch.cat([target[~is_loop], nodes]),
        torch.cat([weight[~is_loop], loop_weight]),
    )


def _coefficients(edges: _Edges, operator: Operator, num_nodes: int) -> _Edges:
    """The edges with the operator's coefficients as weights; only ``gcn`` minds the graph's."""
    if operator in ("sym", "laplacian"):
        source, target, weight = edges
        if operator == "laplacian":
            source, target, weight = (part[source != target] for part in edges)
        counted = target if operator == "sym" else source
        degree = weight.new_zeros(num_nodes).index_add(0, counted, weight)
        scale = degree.pow(-0.5).masked_fill(degree == 0.0, 0.0)  # [N]
        return _Edges(source, target, scale[target] * weight * scale[source])
    assert operator in ("sum", "mean", "gcn"), operator
    if operator == "gcn":
        source, target, weight = _with_self_loops(edges, num_nodes)
        degree = weight.new_zeros(num_nodes).index_add(0, target, weight)
        scale = degree.pow(-0.5).masked_fill(degree == 0.0, 0.0)  # [N]
        return _Edges(source, target, scale[target] * weight * scale[source])
    ones = torch.ones_like(edges.weight)
    if operator == "sum":
        return edges._replace(weight=ones)
    degree = ones.new_zeros(num_nodes).index_add(0, edges.target, ones)
    return edges._replace(weight=1.0 / degree[edges.target])


def _features(graph: Graph, dtype: torch.dtype) -> Tensor:
    if isinstance(graph.features, np.ndarray):
        return torch.from_numpy(graph.features).to(dtype)
    entries = graph.features.tocoo()
    index = torch.from_numpy(np.stack([entries.row, entries.col]).astype(np.int64))
    return _sparse(index, torch.from_numpy(entries.data).to(dtype), entries.shape)


def _sparse(index: Tensor, values: Tensor, size: tuple[int, ...]) -> Tensor:
    # Asked for by name: left to the default, torch warns that it does not check.
    matrix = torch.sparse_coo_tensor(index, values, size, check_invariants=False)
    return matrix.coalesce()
