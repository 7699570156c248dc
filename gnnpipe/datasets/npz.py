"""Graphs in one ``.npz`` file of plain arrays, never of pickled objects.

Keys: ``edge_index`` [2, E], ``y`` [N] (-1: unlabelled), ``num_classes``, ``train_mask``,
``val_mask``, ``test_mask`` [N]; optionally ``is_directed`` (found out when absent) and the
features, dense ``x`` [N, F] or CSR: ``x_indptr`` [N + 1], ``x_indices``, ``x_shape`` and
``x_data`` (absent: all ones).
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from gnnpipe.arrays import exact
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

REQUIRED = ("edge_index", "y", "num_classes", "train_mask", "val_mask", "test_mask")
CSR_REQUIRED = ("x_indptr", "x_indices", "x_shape")
KEYS = (*REQUIRED, "is_directed", "x", *CSR_REQUIRED, "x_data")


def load_npz(path: Path) -> Graph:
    """Reads and validates a graph; its name is the file's.

    Raises:
        UserError: the file is foreign, damaged or not a sound graph.
    """
    arrays = _read_arrays(path)
    missing = [key for key in REQUIRED if key not in arrays]
    if missing:
        raise UserError(f"{path} lacks the arrays {', '.join(missing)}; add them to the file")
    try:
        return _to_graph(arrays, path.stem)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as stream:  # a path would stay open when numpy fails
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"{path} holds a single array; save a graph with np.savez")
            return {key: np.asarray(file[key]) for key in KEYS if key in file}
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise anything
        reason = type(error).__name__
        raise UserError(
            f"{path} is no .npz file of plain arrays or is damaged ({reason}); write it anew"
        ) from error


def _to_graph(arrays: dict[str, NDArray[Any]], name: str) -> Graph:
    features = _features(arrays)
    optional = {} if features is None else {"features": features}
    is_directed = arrays.get("is_directed")
    return Graph.from_edge_index(
        arrays["edge_index"],
        name=name,
        labels=arrays["y"],
        num_classes=_scalar(arrays["num_classes"], "num_classes"),
        train_mask=arrays["train_mask"],
        val_mask=arrays["val_mask"],
        test_mask=arrays["test_mask"],
        is_directed=None if is_directed is None else bool(_scalar(is_directed, "is_directed")),
        **optional,
    )


def _features(arrays: dict[str, NDArray[Any]]) -> Any:  # ndarray, csr_array (untyped) or None
    if "x" in arrays:
        return arrays["x"]
    if not any(key in arrays for key in CSR_REQUIRED):
        return None
    missing = [key for key in CSR_REQUIRED if key not in arrays]
    if missing:
        raise UserError(f"sparse features lack the arrays {', '.join(missing)}; add them")
    indptr, indices, shape = (exact(arrays[key], key, np.int64) for key in CSR_REQUIRED)
    data = arrays.get("x_data", np.ones(indices.size, np.float32))
    try:
        return sparse.csr_array((data, indices, indptr), shape=tuple(shape.tolist()))
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"`x_indptr` and the other CSR pieces disagree; scipy: {error}") from error


def _scalar(array: NDArray[Any], key: str) -> int:
    if array.size != 1 or array.dtype.kind not in "bui":
        raise UserError(f"`{key}` (={array.dtype}{list(array.shape)}) must be one whole number")
    return int(array.item())
