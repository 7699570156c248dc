"""PyTorch Geometric's ``Data``, in memory or in a ``.pt`` file, as a Graph.

torch and torch_geometric are imported inside the functions: other data sets do without them.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

REQUIRED = ("edge_index", "y", "train_mask", "val_mask", "test_mask")


def from_pyg(data: Any, *, name: str = "pyg", sparse_features: bool = False) -> Graph:
    """Converts a homogeneous PyG ``Data``; N nodes, E edges.

    Args:
        data: with ``edge_index`` [2, E], ``y`` [N], [N, 1] or [N, T], and ``train_mask``,
            ``val_mask``, ``test_mask`` [N] (of [N, K] the first column is taken); optionally
            ``x`` [N, F] dense or sparse, ``edge_weight`` [E], ``edge_attr`` [E] or [E, D],
            ``node_type`` [N], ``edge_type`` [E].
        name: of the graph.
        sparse_features: store dense ``x`` as CSR.

    Raises:
        UserError: it is another kind of object, lacks something or is not a sound graph.
    """
    with _quiet_import():
        from torch_geometric.data import Data

    if not isinstance(data, Data):
        raise UserError(
            f"`data` (={type(data).__name__}) must be a torch_geometric.data.Data of one node "
            "type; pass dataset[0], or to_homogeneous() of a HeteroData"
        )
    missing = [key for key in REQUIRED if data.get(key) is None]
    if missing:
        raise UserError(f"`data` lacks {', '.join(missing)}; set them on the PyG Data")
    features = _features(data, sparse_features)
    optional = {} if features is None else {"features": features}
    return Graph.from_edge_index(
        _array(data.edge_index),
        name=name,
        labels=_labels(_array(data.y)),
        train_mask=_mask(data.train_mask),
        val_mask=_mask(data.val_mask),
        test_mask=_mask(data.test_mask),
        edge_weight=_column(data.get("edge_weight"), squeeze=True),
        edge_attr=_column(data.get("edge_attr"), squeeze=False),
        node_type=_column(data.get("node_type"), squeeze=True),
        edge_type=_column(data.get("edge_type"), squeeze=True),
        **optional,
    )


def load_pt(path: Path) -> Graph:
    """Reads a ``Data`` that ``torch.save`` wrote, without running code from the file.

    Raises:
        UserError: the file is foreign, damaged or not a sound graph.
    """
    with pyg_classes_allowed(), _quiet_csr():
        import torch

        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # foreign bytes raise anything, and torch's text has many lines
            raise UserError(
                f"{path} is damaged or holds more than a PyG Data ({type(error).__name__}); "
                "write it with torch.save(data, path)"
            ) from error
    try:
        return from_pyg(data, name=path.stem)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


@contextlib.contextmanager
def pyg_classes_allowed() -> Iterator[None]:
    """Lets ``torch.load(weights_only=True)`` build the classes that make up a saved ``Data``."""
    with _quiet_import():
        import torch
        from torch_geometric.data.data import Data, DataEdgeAttr, DataTensorAttr
        from torch_geometric.data.storage import GlobalStorage

    with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
        yield


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """torch_geometric compiles with ``torch.jit.script`` on import, which torch deprecates."""
    with warnings.catch_warnings():
        message = r"`torch\.jit\.script` is deprecated"
        warnings.filterwarnings("ignore", message=message, category=DeprecationWarning)
        yield


@contextlib.contextmanager
def _quiet_csr() -> Iterator[None]:
    """torch says of its CSR tensors that they are in beta state; here they are only read."""
    with warnings.catch_warnings():
        message = "Sparse CSR tensor support is in beta state"
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def _features(data: Any, as_sparse: bool) -> Any:  # ndarray, csr_array (untyped) or None
    x = data.get("x")
    if x is None:
        return None
    if hasattr(x, "to_torch_sparse_csr_tensor"):  # torch_sparse.SparseTensor, where installed
        x = x.to_torch_sparse_csr_tensor()
    if "sparse" not in str(x.layout):
        dense = _array(x)
        return sparse.csr_array(dense) if as_sparse and dense.ndim == 2 else dense
    with _quiet_csr():
        x = x.to_sparse_csr()
    pieces = (_array(x.values()), _array(x.col_indices()), _array(x.crow_indices()))
    return sparse.csr_array(pieces, shape=tuple(x.shape))


def _array(tensor: Any) -> NDArray[Any]:
    """NumPy's view of a tensor; half precision, which NumPy lacks in part, as float32."""
    tensor = tensor.detach().cpu()
    is_half = tensor.is_floating_point() and tensor.element_size() < 4
    return np.asarray(tensor.float() if is_half else tensor)


def _labels(y: NDArray[Any]) -> NDArray[Any]:
    """[N, 1] becomes [N] where it holds classes; real numbers there are a regression target."""
    is_column = y.ndim == 2 and y.shape[1] == 1
    return y[:, 0] if is_column and y.dtype.kind != "f" else y


def _mask(tensor: Any) -> NDArray[Any]:
    mask = _array(tensor)
    return mask[:, 0] if mask.ndim == 2 and mask.shape[1] else mask


def _column(tensor: Any, *, squeeze: bool) -> NDArray[Any] | None:
    """Edge or node values; of [E, 1] the column, or of [E] a table with one column."""
    if tensor is None:
        return None
    values = _array(tensor)
    if squeeze:
        return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    return values[:, None] if values.ndim == 1 else values
