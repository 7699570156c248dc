"""Graphs in ``.npz`` files: read as written, refused with the file's name when unsound."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from gnnpipe.datasets import load_graph
from gnnpipe.errors import UserError

SharedData = Callable[[str], Path]

# 0 -> 1 <-> 2, node 3 isolated and unlabelled
ARRAYS: dict[str, Any] = {
    "edge_index": np.array([[0, 1, 2], [1, 2, 1]], np.int32),
    "y": np.array([0, 1, 0, -1], np.int16),
    "num_classes": np.array(2),
    "is_directed": np.array(True),
    "train_mask": np.array([True, False, False, False]),
    "val_mask": np.array([False, True, False, False]),
    "test_mask": np.array([False, False, True, False]),
    "x": np.array([[1, 2], [3, 4], [0, 0], [-1, 1]], np.float32),
}
CSR_ARRAYS: dict[str, Any] = {
    "x_indptr": np.array([0, 1, 2, 2, 3]),
    "x_indices": np.array([0, 1, 0]),
    "x_shape": np.array([4, 2]),
}


def npz_file(folder: Path, *without: str, **changes: Any) -> str:
    path = folder / "small.npz"
    kept = {key: value for key, value in ARRAYS.items() if key not in without}
    np.savez(path, allow_pickle=True, **(kept | changes))
    return str(path)


def test_npz_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    graph = load_graph(npz_file(tmp_path))
    assert (graph.name, graph.num_nodes, graph.num_edges, graph.num_classes) == ("small", 4, 3, 2)
    assert graph.is_directed
    assert graph.indptr.tolist() == [0, 0, 2, 3, 3]
    assert graph.indices.tolist() == [0, 2, 1]
    assert np.array_equal(graph.labels, ARRAYS["y"])
    assert np.array_equal(graph.features, ARRAYS["x"])
    for mask in ("train_mask", "val_mask", "test_mask"):
        assert np.array_equal(getattr(graph, mask), ARRAYS[mask])
    relative = load_graph("small.npz", root=str(tmp_path))
    without_direction = load_graph(npz_file(tmp_path, "is_directed"))
    assert relative.fingerprint() == graph.fingerprint() == without_direction.fingerprint()


def test_npz_file_with_sparse_features_keeps_them_sparse(tmp_path: Path) -> None:
    ones = load_graph(npz_file(tmp_path, "x", **CSR_ARRAYS)).features
    assert isinstance(ones, sparse.csr_array)
    assert ones.toarray().tolist() == [[1, 0], [0, 1], [0, 0], [1, 0]]
    data = load_graph(npz_file(tmp_path, "x", **CSR_ARRAYS, x_data=[2.0, 3.0, 4.0])).features
    assert isinstance(data, sparse.csr_array)
    assert data.data.tolist() == [2, 3, 4]


def test_undirected_adds_the_reverse_edges_on_request(tmp_path: Path) -> None:
    path = npz_file(tmp_path)
    for keep in ("auto", "false", False):
        assert load_graph(path, undirected=keep).num_edges == 3
    for symmetrise in ("true", True):
        graph = load_graph(path, undirected=symmetrise)
        assert (graph.num_edges, graph.is_directed) == (4, False)


@pytest.mark.parametrize(
    ("without", "changes", "message"),
    [
        (("y", "val_mask"), {}, r"small.npz lacks the arrays y, val_mask; add them"),
        ((), {"train_mask": np.ones(3, bool)}, r"small.npz: `train_mask` \(=\[3\]\) must have"),
        ((), {"edge_index": np.array([[9], [0]])}, r"small.npz: `edge_index` \(=9\) must name"),
        (
            (),
            {"y": np.array([0, 1, 7, 0])},
            r"small.npz: `labels` \(=7\) must lie between 0 and 1",
        ),
        ((), {"x": np.full((4, 2), np.nan)}, r"small.npz: `features` \(=nan in row 0\) must be"),
        (
            (),
            {"is_directed": np.array(False)},
            r"small.npz: `is_directed` \(=False\) must be True",
        ),
        (
            (),
            {"is_directed": np.array([0, 1])},
            r"`is_directed` \(=int64\[2\]\) must be one whole",
        ),
        ((), {"num_classes": np.array(2.5)}, r"`num_classes` \(=float64\[\]\) must be one whole"),
        (
            (),
            {"y": np.array([None] * 4)},
            r"small.npz is no .npz file of plain arrays .*ValueError",
        ),
        (("x",), {"x_indptr": [0]}, "sparse features lack the arrays x_indices, x_shape"),
        (("x",), CSR_ARRAYS | {"x_data": [1.0]}, "`x_indptr` and the other CSR pieces disagree"),
        (("x",), CSR_ARRAYS | {"x_shape": np.array(4)}, "`x_indptr` and the other CSR pieces"),
        (("x",), CSR_ARRAYS | {"x_indices": [0.5, 1, 0]}, r"`x_indices` \(=float64\) must hold"),
        (("x",), CSR_ARRAYS | {"x_indices": [0, 1, 7]}, "`features` must be a sound sparse matr"),
        (("x",), CSR_ARRAYS | {"x_indptr": [0, 2, 1, 2, 3]}, "`features` must be a sound sparse"),
        (("x",), CSR_ARRAYS | {"x_shape": [3, 2]}, "`x_indptr` and the other CSR pieces disagree"),
    ],
)
def test_unsound_npz_files_are_refused(
    tmp_path: Path, without: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_graph(npz_file(tmp_path, *without, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 hardly one", b"\x93NUMPY"])
def test_foreign_npz_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"foreign.npz is no .npz file of plain arrays or is dama"):
        load_graph(str(path))


def test_a_single_array_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "single.npz"
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(
        UserError, match=r"single.npz holds a single array; save a graph with np.s"
    ):
        load_graph(str(path))


def test_damaged_npz_files_never_escape_as_another_error(tmp_path: Path) -> None:
    path = Path(npz_file(tmp_path))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in rng.integers(0, len(whole), 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"small.npz is no .npz file of plain arrays"):
            load_graph(str(path))
    for place in rng.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):  # a byte that no check covers may well pass
            load_graph(str(path))


@pytest.mark.parametrize(
    ("name", "nodes", "edges", "features", "classes", "train"),
    [("cora", 2708, 10556, 1433, 7, 140), ("squirrel", 5201, 396706, 2089, 5, 2496)],
)
def test_shared_graphs_have_their_published_counts(
    shared_data: SharedData,
    name: str,
    nodes: int,
    edges: int,
    features: int,
    classes: int,
    train: int,
) -> None:
    graph = load_graph(str(shared_data(f"{name}.npz")))
    assert (graph.num_nodes, graph.num_edges) == (nodes, edges)
    assert (graph.num_features, graph.num_classes) == (features, classes)
    assert graph.train_mask.sum() == train
    assert not graph.is_directed
    assert isinstance(graph.features, sparse.csr_array)
