"""One graph in memory: in-neighbours as CSR, features, labels and split, checked once.

Rows are targets, not sources, because a node aggregates from its in-neighbours: one row is then
one contiguous read.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Required, TypeAlias, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from gnnpipe.adjacency import (
    check_rows,
    checked_edges,
    is_symmetric,
    rows_by_target,
    union_with_reverse,
)
from gnnpipe.arrays import (
    all_finite,
    canonical_csr,
    check_features,
    exact,
    numbers,
    require,
    rounded,
)
from gnnpipe.errors import UserError

Features: TypeAlias = "NDArray[np.float32] | sparse.csr_array"

BLOCK_VALUES = 2**22  # feature values hashed at a time
MASKS = ("train_mask", "val_mask", "test_mask")


class NodeFields(TypedDict, total=False):
    """The node-side arguments of :meth:`Graph.from_edge_index`; N nodes, F features, T tasks."""

    name: str
    num_nodes: int  # default: as many as labels
    features: ArrayLike | Any  # [N, F], dense or scipy sparse; default: none, F = 0
    labels: Required[ArrayLike]  # [N] or [N, T]
    num_classes: int  # default: largest label + 1, or T
    train_mask: Required[ArrayLike]  # [N]
    val_mask: Required[ArrayLike]  # [N]
    test_mask: Required[ArrayLike]  # [N]
    node_type: ArrayLike | None  # [N]
    features_note: str


@dataclass(frozen=True, eq=False)
class Graph:
    """N nodes with F features each and E edges j -> i (source j, target i)."""

    name: str
    num_nodes: int
    indptr: NDArray[np.int64]  # [N + 1]: edges indptr[i] : indptr[i + 1] point at node i
    indices: NDArray[np.int32]  # [E]: their sources, ascending in a row, parallel edges kept
    features: Features  # [N, F] float32, dense or CSR
    labels: NDArray[
        Any
    ]  # [N] int64, -1 unlabelled; or [N, T]: int64 0/1/-1, or float32, NaN unknown
    num_classes: int  # scores a model gives each node: the classes, or T
    train_mask: NDArray[np.bool_]  # [N]
    val_mask: NDArray[np.bool_]  # [N]
    test_mask: NDArray[np.bool_]  # [N]
    is_directed: bool  # False: edge j -> i has its i -> j, with the same weight
    edge_weight: NDArray[np.float32] | None = None  # [E]
    edge_attr: NDArray[np.float32] | None = None  # [E, D]
    node_type: NDArray[np.int64] | None = None  # [N]
    edge_type: NDArray[np.int64] | None = None  # [E]
    features_note: str = ""  # what to know about features that are not the data set's own
    pairs: NDArray[np.int64] | None = None  # [P, 2]: source, target of what link prediction asks
    pair_split: NDArray[np.int64] | None = None  # [P]: 0 training, 1 validation, 2 test

    @staticmethod
    def from_edge_index(
        edge_index: ArrayLike,
        *,
        edge_weight: ArrayLike | None = None,
        edge_attr: ArrayLike | None = None,
        edge_type: ArrayLike | None = None,
        is_directed: bool | None = None,
        **fields: Unpack[NodeFields],
    ) -> "Graph":
        """Builds and validates a graph from a list of edges in any order.

        Args:
            edge_index: sources ``[0]`` and targets ``[1]``, ``[2, E]``.
            edge_weight: ``[E]``, carried along; so are the next two.
            edge_attr: ``[E, D]``.
            edge_type: ``[E]``.
            is_directed: None finds out: undirected when edges and weights are symmetric.
            **fields: see :class:`NodeFields`. Integers and masks of another dtype are converted
                when that loses nothing, real numbers are rounded to float32.

        Raises:
            UserError: what was given is not a sound graph.
        """
        nodes = _node_arrays(fields)
        edges = checked_edges(edge_index, nodes["num_nodes"])
        indptr, order = rows_by_target(edges, nodes["num_nodes"])
        indices = edges[0, order].astype(np.int32)
        weight = None if edge_weight is None else rounded(edge_weight, "edge_weight")
        attr = None if edge_attr is None else rounded(edge_attr, "edge_attr")
        type_id = None if edge_type is None else exact(edge_type, "edge_type", np.int64)
        graph = Graph(
            indptr=indptr,
            indices=indices,
            is_directed=True if is_directed is None else is_directed,
            edge_weight=_in_order(weight, order, "edge_weight"),
            edge_attr=_in_order(attr, order, "edge_attr"),
            edge_type=_in_order(type_id, order, "edge_type"),
            **nodes,
        )
        graph.validate()
        if is_directed is None and is_symmetric(indptr, indices, graph.edge_weight):
            return replace(graph, is_directed=False)
        return graph

    @property
    def num_edges(self) -> int:
        return len(self.indices)

    @property
    def num_features(self) -> int:
        return int(self.features.shape[1])

    def validate(self) -> None:
        """Checks every array, in extra memory of the order of N + E.

        Raises:
            UserError: the first thing that is wrong.
        """
        _check_edges(self)
        check_features(self.features, "features", self.num_nodes)
        _check_labels(self)
        _check_split(self)

    def fingerprint(self) -> str:
        """SHA-256 of everything that defines the graph, as 64 hex digits.

        Names and notes are left out. Memory layout, dtype width, and dense or sparse storage of
        equal features make no difference.
        """
        counts = (self.num_nodes, self.num_features, self.num_classes, int(self.is_directed))
        digest = hashlib.sha256(f"gnnpipe graph 1 {counts}".encode())
        for part in _canonical_parts(self):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def symmetrised(self) -> "Graph":
        """The union of the edges and their reverses, each once; the graph is then undirected.

        Where several edges join (both directions, parallel edges), the largest weight and, column
        by column, the largest attribute win.

        Raises:
            UserError: edges have types: a reversed edge's type is not known.
        """
        if self.edge_type is not None:
            raise UserError(
                "`undirected` (=True) cannot reverse edges that have types; use undirected=False"
            )
        names = [n for n in ("edge_weight", "edge_attr") if getattr(self, n) is not None]
        indptr, indices, *values = union_with_reverse(
            self.indptr, self.indices, *(getattr(self, name) for name in names)
        )
        new_values: dict[str, Any] = dict(zip(names, values, strict=True))
        return replace(self, indptr=indptr, indices=indices, is_directed=False, **new_values)


def _node_arrays(fields: NodeFields) -> dict[str, Any]:
    """The node-side fields of :class:`Graph`, converted, defaults filled in."""
    nodes: dict[str, Any] = {"name": "graph", **fields}
    labels = _as_labels(fields["labels"])
    nodes["labels"] = labels
    nodes.setdefault("num_nodes", len(labels))
    largest = int(labels.max(initial=-1)) if labels.ndim == 1 else labels.shape[1] - 1
    nodes.setdefault("num_classes", largest + 1)
    x = fields.get("features", np.zeros((nodes["num_nodes"], 0), np.float32))
    is_sparse = sparse.issparse(x)
    nodes["features"] = canonical_csr(x, "features") if is_sparse else rounded(x, "features")
    for mask in MASKS:
        nodes[mask] = exact(nodes[mask], mask, np.bool_)
    if nodes.get("node_type") is not None:
        nodes["node_type"] = exact(nodes["node_type"], "node_type", np.int64)
    return nodes


def _as_labels(value: ArrayLike) -> NDArray[Any]:
    labels = numbers(value, "labels")
    if labels.ndim == 2 and labels.dtype.kind == "f":
        return rounded(labels, "labels")
    if labels.ndim not in (1, 2):
        raise UserError(f"`labels` (={list(labels.shape)}) must have the shape [N] or [N, T]")
    if labels.ndim == 1 and labels.dtype.kind == "f" and np.any(labels != np.floor(labels)):
        raise UserError(
            f"`labels` (={labels.dtype}) must be whole numbers, -1 for unlabelled; "
            "give regression targets the shape [N, T]"
        )
    return exact(labels, "labels", np.int64)


def _in_order(
    values: NDArray[Any] | None, order: NDArray[np.int64], name: str
) -> NDArray[Any] | None:
    if values is None:
        return None
    if values.ndim == 0 or len(values) != len(order):
        raise UserError(
            f"`{name}` (={list(values.shape)}) must have one row for each of {len(order)} edges"
        )
    ordered: NDArray[Any] = values[order]
    return ordered


def _check_edges(graph: Graph) -> None:
    if graph.num_nodes < 1:
        raise UserError(f"`num_nodes` (={graph.num_nodes}) must be at least 1; add nodes")
    check_rows(graph.indptr, graph.indices, graph.num_nodes)
    real_values = {"edge_weight": (graph.num_edges,), "edge_attr": (graph.num_edges, None)}
    for name, shape in real_values.items():
        values = getattr(graph, name)
        if values is None:
            continue
        require(values, name, np.float32, shape)
        if not all_finite(values):
            raise UserError(f"`{name}` must be finite; replace its NaN and infinite values")
    for name, length in {"node_type": graph.num_nodes, "edge_type": graph.num_edges}.items():
        type_id = getattr(graph, name)
        if type_id is None:
            continue
        require(type_id, name, np.int64, (length,))
        if type_id.min(initial=0) < 0:
            raise UserError(f"`{name}` (={type_id.min()}) must be at least 0; number from 0")
    if not graph.is_directed and not is_symmetric(graph.indptr, graph.indices, graph.edge_weight):
        raise UserError(
            "`is_directed` (=False) must be True where an edge lacks its reverse of equal weight; "
            "correct it or symmetrise the edges"
        )


def _check_labels(graph: Graph) -> None:
    labels, num_classes = graph.labels, graph.num_classes
    if num_classes < 1:
        raise UserError(f"`num_classes` (={num_classes}) must be at least 1; label some nodes")
    is_real = labels.ndim == 2 and labels.dtype.kind == "f"
    columns = () if labels.ndim == 1 else (num_classes,)
    dtype = np.float32 if is_real else np.int64
    require(labels, "labels", dtype, (graph.num_nodes, *columns))
    if is_real:
        if np.isinf(labels).any():
            raise UserError("`labels` must be finite; write NaN where a target is not known")
        return
    largest = num_classes - 1 if labels.ndim == 1 else 1
    bad = labels[(labels < -1) | (labels > largest)]
    if bad.size:
        raise UserError(
            f"`labels` (={bad[0]}) must lie between 0 and {largest}, or be -1 for unlabelled; "
            "correct them or the number of classes"
        )


def _check_split(graph: Graph) -> None:
    for name in MASKS:
        require(getattr(graph, name), name, np.bool_, (graph.num_nodes,))
    labels = graph.labels.reshape(graph.num_nodes, -1)  # [N, 1] or [N, T]
    is_real = labels.dtype.kind == "f"
    is_labelled = (~np.isnan(labels) if is_real else labels >= 0).any(axis=1)
    if not np.any(graph.train_mask & is_labelled):
        raise UserError(
            f"`train_mask` (={int(graph.train_mask.sum())} nodes) must hold a labelled node; "
            "choose another split or label some"
        )


def _canonical_parts(graph: Graph) -> Iterator[NDArray[Any]]:
    """Every defining array, little-endian and C-ordered, features as CSR a block at a time."""
    yield graph.indptr.astype("<i8", copy=False)
    yield graph.indices.astype("<i8", copy=False)
    yield graph.labels.astype("<f4" if graph.labels.dtype.kind == "f" else "<i8", copy=False)
    for mask in MASKS:
        yield getattr(graph, mask).astype(np.bool_, copy=False)
    for name in ("edge_weight", "edge_attr", "node_type", "edge_type"):
        values = getattr(graph, name)
        yield np.array([values is not None])
        if values is not None:
            yield values.astype("<f4" if values.dtype.kind == "f" else "<i8", copy=False)
    if graph.pairs is not None and graph.pair_split is not None:
        yield graph.pairs.astype("<i8", copy=False)
        yield graph.pair_split.astype("<i8", copy=False)
    rows = max(1, BLOCK_VALUES // max(1, graph.num_features))
    for start in range(0, graph.num_nodes, rows):
        block = sparse.csr_array(graph.features[start : start + rows], copy=True)
        block.eliminate_zeros()
        for values, dtype in ((block.indptr, "<i8"), (block.indices, "<i8"), (block.data, "<f4")):
            yield values.astype(dtype, copy=False)
