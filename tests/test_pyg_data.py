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

with warnings.catch_warnings():  # torch_geometric compiles with torch.jit.script on import
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
    from torch_geometric import EdgeIndex
    from torch_geometric.data import Data, HeteroData

X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0], [-1.0, 1.0]])
NODE = torch.arange(4)
MASKS = {"train_mask": NODE == 0, "val_mask": NODE == 1, "test_mask": NODE == 2}


def pyg_data(**changes: Any) -> Data:
    """0 -> 1 <-> 2, node 3 isolated and unlabelled."""
    edge_index = torch.tensor([[0, 1, 2], [1, 2, 1]])
    tensors: dict[str, Any] = {"x": X, "edge_index": edge_index, "y": torch.tensor([0, 1, 0, -1])}
    return Data(**(tensors | MASKS | changes))


def test_pyg_data_becomes_the_same_graph(tmp_path: Path) -> None:
    graph = from_pyg(pyg_data())
    assert (graph.name, graph.is_directed, graph.num_classes) == ("pyg", True, 2)
    assert (graph.indptr.tolist(), graph.indices.tolist()) == ([0, 0, 2, 3, 3], [0, 2, 1])
    assert np.array_equal(graph.features, X)
    assert graph.labels.tolist() == [0, 1, 0, -1]
    for key, mask in MASKS.items():
        assert np.array_equal(getattr(graph, key), mask)
    torch.save(pyg_data(), tmp_path / "small.pt")
    loaded = load_graph(str(tmp_path / "small.pt"))
    assert (loaded.name, loaded.fingerprint()) == ("small", graph.fingerprint())


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_pyg_sparse_features_stay_sparse(tmp_path: Path, layout: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        table = X.to_sparse() if layout == "coo" else X.to_sparse_csr()
    data = pyg_data(x=table)
    expected = from_pyg(pyg_data()).fingerprint()
    for graph in (from_pyg(data), from_pyg(pyg_data(), sparse_features=True)):
        assert isinstance(graph.features, sparse.csr_array)
        assert graph.fingerprint() == expected
    torch.save(data, tmp_path / "sparse.pt")
    assert load_graph(str(tmp_path / "sparse.pt")).fingerprint() == expected


def test_pyg_shapes_are_brought_into_form() -> None:
    masks = {key: torch.stack([mask, ~mask], 1) for key, mask in MASKS.items()}
    data = pyg_data(**masks, y=torch.tensor([[0], [1], [0], [-1]]), x=X.bfloat16())
    data.edge_index = EdgeIndex(data.edge_index, sparse_size=(4, 4))
    assert from_pyg(data).fingerprint() == from_pyg(pyg_data()).fingerprint()


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
