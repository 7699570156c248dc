"""PyG ``Data`` objects and ``.pt`` files: converted, or refused without running their code."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from gnnpipe.datasets import from_pyg, load_graph
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

with warnings.catch_warnings():  # torch_geometric compiles with torch.jit.script on import
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
    from torch_geometric import EdgeIndex
    from torch_geometric.data import Data, HeteroData

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


def pyg_data(**changes: Any) -> Data:
    tensors: dict[str, Any] = {
        key: torch.from_numpy(ARRAYS[key])
        for key in ("x", "edge_index", "y", "train_mask", "val_mask", "test_mask")
    }
    data = Data(**(tensors | changes))
    data.edge_index = data.edge_index.long()
    return data


def test_pyg_data_becomes_the_same_graph(tmp_path: Path) -> None:
    expected = load_graph(npz_file(tmp_path)).fingerprint()
    data = pyg_data()
    assert from_pyg(data).fingerprint() == expected
    torch.save(data, tmp_path / "small.pt")
    loaded = load_graph(str(tmp_path / "small.pt"))
    assert (loaded.name, loaded.fingerprint()) == ("small", expected)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_pyg_sparse_features_stay_sparse(tmp_path: Path, layout: str) -> None:
    x = torch.from_numpy(ARRAYS["x"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        table = x.to_sparse() if layout == "coo" else x.to_sparse_csr()
    data = pyg_data(x=table)
    for graph in (from_pyg(data), from_pyg(pyg_data(), sparse_features=True)):
        assert isinstance(graph.features, sparse.csr_array)
        assert graph.fingerprint() == from_pyg(pyg_data()).fingerprint()
    torch.save(data, tmp_path / "sparse.pt")
    assert load_graph(str(tmp_path / "sparse.pt")).fingerprint() == graph.fingerprint()


def test_pyg_shapes_are_brought_into_form() -> None:
    masks = {
        key: torch.from_numpy(np.stack([ARRAYS[key], ~ARRAYS[key]], 1))
        for key in ("train_mask", "val_mask", "test_mask")
    }
    data = pyg_data(
        **masks,
        y=torch.from_numpy(ARRAYS["y"])[:, None],
        x=torch.from_numpy(ARRAYS["x"]).bfloat16(),
    )
    data.edge_index = EdgeIndex(data.edge_index, sparse_size=(4, 4))
    assert from_pyg(data).fingerprint() == from_pyg(pyg_data(num_classes=2)).fingerprint()


def test_pyg_edge_and_node_values_are_carried() -> None:
    graph = from_pyg(
        pyg_data(
            edge_weight=torch.tensor([[1.0], [2.0], [3.0]]),
            edge_attr=torch.tensor([4.0, 5.0, 6.0]),
            edge_type=torch.tensor([0, 1, 2]),
            node_type=torch.tensor([0, 1, 1, 0]),
        )
    )
    carried = [graph.edge_weight, graph.edge_attr, graph.edge_type, graph.node_type]
    assert [None if part is None else part.tolist() for part in carried] == [
        [1, 3, 2],
        [[4], [6], [5]],
        [0, 2, 1],
        [0, 1, 1, 0],
    ]


def test_pyg_labels_of_many_tasks_stay_a_table() -> None:
    tasks = from_pyg(pyg_data(y=torch.tensor([[0, 1], [1, -1], [0, 0], [1, 1]])))
    assert (str(tasks.labels.dtype), tasks.labels.shape, tasks.num_classes) == ("int64", (4, 2), 2)
    real = from_pyg(pyg_data(y=torch.tensor([[0.5], [1.0], [2.0], [torch.nan]])))
    assert (str(real.labels.dtype), real.labels.shape, real.num_classes) == ("float32", (4, 1), 1)


def test_pyg_data_without_features_loads_once_they_are_chosen(tmp_path: Path) -> None:
    torch.save(pyg_data(x=None), tmp_path / "bare.pt")
    assert from_pyg(pyg_data(x=None)).num_features == 0
    assert load_graph(str(tmp_path / "bare.pt"), features="degree").num_features == 64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HeteroData(), r"`data` \(=HeteroData\) must be a torch_geometric.data.Data"),
        ({"x": 1}, r"`data` \(=dict\) must be a torch_geometric.data.Data"),
        (
            pyg_data(train_mask=None, test_mask=None),
            "`data` lacks train_mask, test_mask; set them",
        ),
        (pyg_data(y=torch.tensor([0.5, 1, 1, 0])), "`labels` .* must be whole numbers"),
    ],
)
def test_unsound_pyg_objects_are_refused(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_pyg(data)


class Foreign:
    """Not a class that weights_only allows."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"foreign.pt is damaged or holds more than a PyG Data \(EOFError\)"),
        (b"hello there", "foreign.pt is damaged or holds more than a PyG Data"),
        (Foreign(), r"foreign.pt is damaged or holds more than a PyG Data \(UnpicklingError\)"),
        (torch.ones(3), r"foreign.pt: `data` \(=Tensor\) must be a torch_geometric.data.Data"),
        ((pyg_data(), None), r"foreign.pt: `data` \(=tuple\) must be .* pass dataset\[0\]"),
        (pyg_data(val_mask=None), "foreign.pt: `data` lacks val_mask"),
    ],
)
def test_foreign_pt_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "foreign.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        load_graph(str(path))
    assert "\n" not in str(caught.value)


def test_truncated_pt_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save(pyg_data(), path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"cut.pt is damaged or holds more than a PyG Data"):
        load_graph(str(path))
