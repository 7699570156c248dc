"""Graph: building, validation, fingerprint, symmetrising.

The graph most tests use, node 3 isolated::

    0 <--> 1 ---> 2      3
"""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from gnnpipe.adjacency import MAX_NODES
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

EDGES = [[0, 1, 1], [1, 0, 2]]


def graph_of(edge_index: Any = EDGES, **changes: Any) -> Graph:
    """Builds the drawn graph, with some arguments changed."""
    arguments: dict[str, Any] = {
        "features": np.eye(4),
        "labels": [0, 1, 1, -1],
        "train_mask": [True, False, False, False],
        "val_mask": [False, True, False, False],
        "test_mask": [False, False, True, True],
    }
    return Graph.from_edge_index(edge_index, **(arguments | changes))


def edges_of(graph: Graph) -> list[tuple[int, int]]:
    targets = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    return list(zip(graph.indices.tolist(), targets.tolist(), strict=True))


@st.composite
def edge_lists(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """Number of nodes, and edges with self-loops and parallel edges among them."""
    n = draw(st.integers(1, 6))
    node = st.integers(0, n - 1)
    return n, draw(st.lists(st.tuples(node, node), max_size=20))


def drawn_graph(n: int, edges: list[tuple[int, int]], **changes: Any) -> Graph:
    edge_index = np.array(edges, np.int64).reshape(-1, 2).T
    mask = np.ones(n, np.bool_)
    arguments: dict[str, Any] = {"labels": np.zeros(n, np.int64), "train_mask": mask}
    arguments |= {"val_mask": mask, "test_mask": mask}
    return Graph.from_edge_index(edge_index, **(arguments | changes))


def test_rows_are_targets_and_list_their_sources() -> None:
    graph = graph_of()
    assert graph.indptr.tolist() == [0, 1, 2, 3, 3]
    assert graph.indices.tolist() == [1, 0, 1]
    assert (graph.num_nodes, graph.num_edges, graph.num_features, graph.num_classes) == (
        4,
        3,
        4,
        2,
    )
    dtypes = (graph.indptr, graph.indices, graph.features, graph.labels, graph.train_mask)
    assert [str(array.dtype) for array in dtypes] == ["int64", "int32", "float32", "int64", "bool"]


@given(edge_lists())
def test_csr_equals_a_dictionary_of_neighbours(case: tuple[int, list[tuple[int, int]]]) -> None:
    n, edges = case
    sources_of: dict[int, list[tuple[int, int]]] = {i: [] for i in range(n)}
    for edge_id, (source, target) in enumerate(edges):
        sources_of[target].append((source, edge_id))
    ids = np.arange(len(edges))
    graph = drawn_graph(
        n, edges, edge_weight=ids, edge_attr=np.stack([ids, -ids], 1), edge_type=ids
    )
    assert graph.edge_weight is not None
    assert graph.edge_attr is not None
    assert graph.edge_type is not None
    for i in range(n):
        row = slice(graph.indptr[i], graph.indptr[i + 1])
        found = list(zip(graph.indices[row].tolist(), graph.edge_type[row].tolist(), strict=True))
        assert found == sorted(sources_of[i])  # parallel edges stay in the order they came
    assert np.array_equal(graph.edge_weight, graph.edge_type)
    assert np.array_equal(graph.edge_attr, np.stack([graph.edge_weight, -graph.edge_weight], 1))


@given(edge_lists())
def test_direction_is_found_from_the_edges(case: tuple[int, list[tuple[int, int]]]) -> None:
    n, edges = case
    reverses = sorted((target, source) for source, target in edges)
    assert drawn_graph(n, edges).is_directed == (reverses != sorted(edges))


def test_direction_is_found_from_the_weights() -> None:
    both_ways = [[0, 1], [1, 0]]
    assert not graph_of(both_ways, edge_weight=[2.0, 2.0]).is_directed
    assert graph_of(both_ways, edge_weight=[2.0, 3.0]).is_directed
    assert graph_of(both_ways, is_directed=True).is_directed


@given(edge_lists())
def test_symmetrised_is_the_union_without_duplicates(
    case: tuple[int, list[tuple[int, int]]],
) -> None:
    n, edges = case
    symmetric = drawn_graph(n, edges).symmetrised()
    union = {(s, t) for s, t in edges} | {(t, s) for s, t in edges}
    assert edges_of(symmetric) == sorted(union, key=lambda edge: (edge[1], edge[0]))
    assert not symmetric.is_directed
    symmetric.validate()
    assert symmetric.symmetrised().fingerprint() == symmetric.fingerprint()


def test_symmetrised_keeps_the_largest_weight_and_attribute() -> None:
    # 0 -> 1 twice, 1 -> 0, 1 -> 2; a missing direction does not count as weight 0.
    graph = graph_of(
        [[0, 0, 1, 1], [1, 1, 0, 2]],
        edge_weight=[1, 4, 3, -1],
        edge_attr=[[1, 9], [2, 8], [3, 7], [4, 6]],
    ).symmetrised()
    assert edges_of(graph) == [(1, 0), (0, 1), (2, 1), (1, 2)]
    assert graph.edge_weight is not None
    assert graph.edge_attr is not None
    assert graph.edge_weight.tolist() == [4, 4, -1, -1]
    assert graph.edge_attr.tolist() == [[3, 9], [3, 9], [4, 6], [4, 6]]


def test_symmetrised_refuses_typed_edges() -> None:
    with pytest.raises(UserError, match="cannot reverse edges that have types"):
        graph_of(edge_type=[0, 1, 2]).symmetrised()


def test_defaults_count_classes_and_leave_features_empty() -> None:
    mask = [True, True]
    masks: dict[str, Any] = {"train_mask": mask, "val_mask": mask, "test_mask": mask}
    graph = Graph.from_edge_index([[0], [1]], labels=[2, -1], **masks)
    assert (graph.num_nodes, graph.num_features, graph.num_classes) == (2, 0, 3)
    tasks = Graph.from_edge_index([[0], [1]], labels=[[0, 1, -1], [1, 0, 1]], **masks)
    assert (str(tasks.labels.dtype), tasks.num_classes) == ("int64", 3)
    real = Graph.from_edge_index([[0], [1]], labels=[[0.5], [np.nan]], **masks)
    assert (str(real.labels.dtype), real.num_classes) == ("float32", 1)


def test_lossless_dtypes_are_converted() -> None:
    same = graph_of(
        np.array(EDGES, np.float64),
        labels=np.array([0, 1, 1, -1], np.float32),
        train_mask=np.array([1, 0, 0, 0], np.uint8),
        features=np.eye(4, dtype=np.float16),
    )
    assert same.fingerprint() == graph_of().fingerprint()


def test_sparse_features_stay_sparse_and_become_canonical() -> None:
    rows, columns = [0, 0, 0, 2], [1, 0, 1, 3]
    matrix = sparse.coo_array(([1.0, 2.0, 3.0, 4.0], (rows, columns)), shape=(4, 4)).tocsr()
    unsorted = sparse.csr_array(
        (np.array([1.0, 2, 3, 4], np.float32), [1, 0, 1, 3], [0, 3, 3, 4, 4]), shape=(4, 4)
    )
    graph = graph_of(features=unsorted)
    assert isinstance(graph.features, sparse.csr_array)
    assert graph.features.has_canonical_format
    assert (graph.features != matrix).nnz == 0
    assert unsorted.indices.tolist() == [1, 0, 1, 3]  # the caller's matrix stays as it is
    assert graph_of(features=matrix.tolil()).fingerprint() == graph.fingerprint()


def test_fingerprint_ignores_layout_storage_and_names() -> None:
    x = np.arange(12.0).reshape(4, 3)
    expected = graph_of(features=x).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", expected)
    shuffled = [[1, 1, 0], [2, 0, 1]]
    stored_zero = sparse.csr_array(x)
    stored_zero.data[0] = 0.0
    for same in (
        graph_of(features=x, name="another", features_note="note"),
        graph_of(shuffled, features=np.asfortranarray(x)),
        graph_of(features=sparse.csr_array(x)),
        replace(graph_of(features=x), features=np.asfortranarray(x.astype(np.float32))),
        replace(graph_of(features=x), labels=np.array([0, 1, 1, -1], ">i2")),
    ):
        assert same.fingerprint() == expected
    table = graph_of(features=stored_zero)
    nnz = table.features.nnz  # type: ignore[union-attr]
    table.fingerprint()
    assert table.features.nnz == nnz  # type: ignore[union-attr]


def test_fingerprint_is_the_same_for_any_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, table = graph_of(), graph_of(features=sparse.eye_array(4).tocsr())
    monkeypatch.setattr("gnnpipe.graph.BLOCK_VALUES", 8)
    assert dense.fingerprint() == table.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"edge_index": [[0, 1], [1, 0]]},
        {"features": 2 * np.eye(4)},
        {"labels": [0, 1, 0, -1]},
        {"num_classes": 3},
        {"train_mask": [True, False, False, True]},
        {"val_mask": [False, False, False, False]},
        {"test_mask": [False, False, False, False]},
        {"edge_weight": [1, 1, 1]},
        {"edge_attr": [[1], [1], [1]]},
        {"node_type": [0, 0, 0, 1]},
        {"edge_type": [0, 0, 1]},
        {"labels": [[0, 1]] * 4},
        {"labels": [[0.0, 1.0]] * 4},
    ],
)
def test_fingerprint_tells_different_graphs_apart(change: dict[str, Any]) -> None:
    assert graph_of(**change).fingerprint() != graph_of().fingerprint()


def test_fingerprint_tells_what_equal_arrays_mean() -> None:
    both_ways = [[0, 1], [1, 0]]
    prints = {
        graph_of(both_ways).fingerprint(),
        graph_of(both_ways, is_directed=True).fingerprint(),
        graph_of(both_ways, node_type=[0, 1, 0, 1]).fingerprint(),
        graph_of(both_ways, edge_type=[0, 1]).fingerprint(),
        graph_of(both_ways, edge_weight=[1, 1]).fingerprint(),
        graph_of(both_ways, edge_attr=[[1], [1]]).fingerprint(),
    }
    assert len(prints) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edge_index": [[0, 4], [1, 0]]}, r"`edge_index` \(=4\) must name nodes 0 to 3"),
        ({"edge_index": [[0, -1], [1, 0]]}, r"`edge_index` \(=-1\) must name nodes 0 to 3"),
        ({"edge_index": [0, 1]}, r"`edge_index` \(=\[2\]\) must have the shape \[2, E\]"),
        ({"edge_index": [[0.5], [1]]}, r"`edge_index` \(=float64\) must hold int64 values"),
        ({"edge_index": [[np.nan], [1]]}, r"`edge_index` \(=float64\) must hold int64 values"),
        ({"edge_index": [["a"], ["b"]]}, r"`edge_index` \(=<U1\) must hold real numbers"),
        ({"edge_index": [[0, 1], [1]]}, "`edge_index` must be an array; make its rows equally"),
        ({"num_nodes": MAX_NODES + 1}, "`num_nodes` .* must be at most 2147483647"),
        ({"num_nodes": 5}, r"`features` \(=\[4, 4\]\) must have the shape \[5, \*\]"),
        ({"edge_weight": [1, 2]}, r"`edge_weight` \(=\[2\]\) must have one row for each of 3"),
        ({"edge_weight": [1, 2, np.inf]}, "`edge_weight` must be finite"),
        ({"edge_weight": [[1], [2], [3]]}, r"`edge_weight` \(=\[3, 1\]\) must have the shape"),
        ({"edge_attr": [1, 2, 3]}, r"`edge_attr` \(=\[3\]\) must have the shape \[3, \*\]"),
        ({"edge_attr": [[np.nan]] * 3}, "`edge_attr` must be finite"),
        ({"edge_type": [0, -1, 0]}, r"`edge_type` \(=-1\) must be at least 0"),
        ({"node_type": [0, 0]}, r"`node_type` \(=\[2\]\) must have the shape \[4\]"),
        ({"node_type": [0, 0, 0, -2]}, r"`node_type` \(=-2\) must be at least 0"),
        ({"is_directed": False}, r"`is_directed` \(=False\) must be True where an edge lacks"),
        ({"features": np.full((4, 2), np.nan)}, r"`features` \(=nan in row 0\) must be finite"),
        ({"features": [[0], [0], [1e300], [0]]}, r"`features` \(=inf in row 2\) must be finite"),
        (
            {"features": sparse.csr_array(np.diag([0, 1, np.nan, np.inf]))},
            r"`features` \(=nan in row 2\) must be finite",
        ),
        ({"features": np.zeros(4)}, r"`features` \(=\[4\]\) must have the shape \[4, \*\]"),
        ({"features": np.zeros((3, 2))}, r"`features` \(=\[3, 2\]\) must have the shape"),
        ({"features": np.zeros((4, 1), complex)}, r"`features` \(=complex128\) must hold real"),
        (
            {"features": sparse.csr_array((4, 1), dtype=complex)},
            r"`features` \(=complex128\) must hold real",
        ),
        ({"labels": [0, 1, 5, -1], "num_classes": 2}, r"`labels` \(=5\) must lie between 0 and 1"),
        ({"labels": [0, 1, -2, -1]}, r"`labels` \(=-2\) must lie between 0 and 1"),
        ({"labels": [0, 1, 0.5, 1]}, "`labels` .* must be whole numbers.*regression targets"),
        ({"labels": [0, 1, 0]}, r"`features` \(=\[4, 4\]\) must have"),
        ({"labels": [[[0]]] * 4}, r"`labels` \(=\[4, 1, 1\]\) must have the shape \[N\] or"),
        ({"labels": [[0, 2]] * 4}, r"`labels` \(=2\) must lie between 0 and 1"),
        ({"labels": [[0, 1]] * 4, "num_classes": 3}, r"`labels` .* must have the shape \[4, 3\]"),
        ({"labels": [[0.5, np.inf]] * 4}, "`labels` must be finite; write NaN"),
        ({"labels": [-1, -1, -1, -1]}, r"`num_classes` \(=0\) must be at least 1"),
        ({"train_mask": [True]}, r"`train_mask` \(=\[1\]\) must have the shape \[4\]"),
        ({"val_mask": [0, 1, 2, 3]}, r"`val_mask` \(=int64\) must hold bool values"),
        ({"test_mask": [[True]] * 4}, r"`test_mask` \(=\[4, 1\]\) must have the shape \[4\]"),
        ({"train_mask": [False] * 4}, r"`train_mask` \(=0 nodes\) must hold a labelled node"),
        (
            {"train_mask": [False, False, False, True]},
            r"`train_mask` \(=1 nodes\) must hold a labelled node",
        ),
        (
            {"labels": [[np.nan], [1.0], [1.0], [1.0]]},
            r"`train_mask` \(=1 nodes\) must hold a labelled node",
        ),
    ],
)
def test_unsound_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        graph_of(**change)
    assert "\n" not in str(caught.value)


UNSOUND_COLUMNS = sparse.csr_array(np.eye(4, dtype=np.float32))
UNSOUND_COLUMNS.indices[0] = 9
FALLING_COLUMNS = sparse.csr_array((np.ones(2, np.float32), [1, 0], [0, 2, 2, 2, 2]), shape=(4, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_nodes": 0}, r"`num_nodes` \(=0\) must be at least 1"),
        ({"indptr": np.array([0, 1, 2, 3, 3], np.int32)}, r"`indptr` \(=int32\) must be int64"),
        ({"indptr": np.array([0, 3])}, r"`indptr` \(=\[2\]\) must have the shape \[5\]"),
        (
            {"indptr": np.array([0, 2, 1, 3, 3])},
            "`indptr` must rise from 0 to the number of edges",
        ),
        (
            {"indptr": np.array([1, 1, 2, 3, 3])},
            "`indptr` must rise from 0 to the number of edges",
        ),
        (
            {"indptr": np.array([0, 1, 2, 2, 2])},
            "`indptr` must rise from 0 to the number of edges",
        ),
        ({"indices": np.array([1, 0, 1])}, r"`indices` \(=int64\) must be int32"),
        ({"indices": np.array([1, 0, 4], np.int32)}, "`indices` must name nodes 0 to 3"),
        ({"indices": np.array([1, 0, -1], np.int32)}, "`indices` must name nodes 0 to 3"),
        ({"indptr": np.array([0, 2, 3, 3, 3])}, "`indices` must rise within each row"),
        ({"features": np.eye(4)}, r"`features` \(=float64\) must be float32"),
        ({"features": UNSOUND_COLUMNS}, "`features` must be a sound sparse matrix"),
        ({"features": FALLING_COLUMNS}, "`features` must have ascending columns"),
        ({"labels": np.zeros(4, np.int32)}, r"`labels` \(=int32\) must be int64"),
        ({"labels": np.zeros(3, np.int64)}, r"`labels` \(=\[3\]\) must have the shape \[4\]"),
        ({"val_mask": np.zeros(4, np.int64)}, r"`val_mask` \(=int64\) must be bool"),
        ({"edge_weight": np.ones(2, np.float32)}, r"`edge_weight` .* must have the shape \[3\]"),
    ],
)
def test_validate_refuses_unsound_fields(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(graph_of(), **change).validate()


def test_a_graph_without_edges_is_sound() -> None:
    graph = graph_of(np.zeros((2, 0)), edge_weight=np.zeros(0), edge_attr=np.zeros((0, 2)))
    assert graph.indptr.tolist() == [0, 0, 0, 0, 0]
    assert not graph.is_directed
    assert graph.symmetrised().fingerprint() == graph.fingerprint()
