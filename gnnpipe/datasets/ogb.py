"""The ogbn-* data sets in the raw layout that OGB distributes.

Read here because the ``ogb`` package does not load on current torch. OGB's archives unpack to::

    NAME/raw/edge.csv.gz node-feat.csv.gz node-label.csv.gz num-node-list.csv.gz ...
    NAME/raw/data.npz node-label.npz                      (papers100M)
    NAME/split/SCHEME/train.csv.gz valid.csv.gz test.csv.gz
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gnnpipe.datasets.download import obtain
from gnnpipe.datasets.edge_stream import rows_of_stream
from gnnpipe.datasets.npz_member import mapped_member
from gnnpipe.datasets.ogb_mag import read_mag
from gnnpipe.datasets.tables import csv_array
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

URL = "http://snap.stanford.edu/ogb/data/nodeproppred"
EDGE_BLOCK = 2**24  # edges of a memory-mapped list handled at a time


class Spec(NamedTuple):
    """What OGB's master table says of one data set."""

    archive: str
    """Name of the zip file, without suffix."""
    scheme: str
    """Folder of the split."""
    num_classes: int
    """Classes, or tasks."""
    has_inverse: bool = False
    """Whether OGB adds the inverse of every edge on loading."""
    is_binary: bool = False
    num_tasks: int = 1


SPECS: Mapping[str, Spec] = {
    "ogbn-arxiv": Spec("arxiv", "time", 40),
    "ogbn-products": Spec("products", "sales_ranking", 47, has_inverse=True),
    "ogbn-proteins": Spec("proteins", "species", 112, has_inverse=True, num_tasks=112),
    "ogbn-papers100m": Spec("papers100M-bin", "time", 172, is_binary=True),
    "ogbn-mag": Spec("mag", "time", 349),
}
OGB_NAMES = tuple(SPECS)


def read_ogb(name: str, *, root: str | None) -> Graph:
    """Reads a data set of OGB.

    Edges are as OGB's loader gives them: products and proteins with their inverses, the others
    directed. Proteins has no node features; it gets the mean of the features of its in-edges,
    as OGB's examples do. mag is one graph with ``node_type`` and ``edge_type``.

    Args:
        name: one of :data:`OGB_NAMES`.
        root: the unpacked folder, or the folder that holds it; where there is neither it is
            downloaded there. None is ``$GNNPIPE_CACHE``, by default ``~/.cache/gnnpipe``.

    Raises:
        UserError: files are missing, damaged or cannot be downloaded.
    """
    spec = SPECS[name]
    folder = _find(name, spec, root)
    if name == "ogbn-mag":
        return read_mag(folder, spec.scheme, spec.num_classes)
    return _read_binary(name, spec, folder) if spec.is_binary else _read_csv(name, spec, folder)


def _find(name: str, spec: Spec, root: str | None) -> Path:
    """The folder of the files, which are downloaded where there is no trace of them."""
    home = Path(root or os.environ.get("GNNPIPE_CACHE") or "~/.cache/gnnpipe").expanduser()
    plain = name.replace("-", "_")
    names = ("", plain, plain.replace("100m", "100M"), spec.archive, spec.archive.split("-")[0])
    folders = [home / each for each in names]
    for folder in folders:
        if (folder / "raw").is_dir() and (folder / "split" / spec.scheme).is_dir():
            return folder
    url = f"{URL}/{spec.archive}.zip"
    wanted = f"{name} in OGB's raw layout (raw/ and split/{spec.scheme}/)"
    traces = [f for f in folders if (f / "raw").exists() or (f / "split").exists()]
    if traces:
        raise UserError(
            f"`data.root` (={home}) must hold {wanted}, but {traces[0]} has only a part; "
            f"unpack {url} there, or remove it"
        )
    manual = f"get it by other means and unpack it in {home}, which must hold {wanted}"
    obtain(url, home / plain, manual=manual)
    return home / plain


def _read_csv(name: str, spec: Spec, folder: Path) -> Graph:
    raw = folder / "raw"
    num_nodes = _count(raw / "num-node-list.csv.gz")
    edges = csv_array(raw / "edge.csv.gz", dtype="int64").T
    _check_count(edges.shape[1], raw / "num-edge-list.csv.gz")
    attr = _optional(raw / "edge-feat.csv.gz")
    features, note = _optional(raw / "node-feat.csv.gz"), ""
    if spec.has_inverse:
        edges = np.concatenate((edges, edges[::-1]), axis=1)
        attr = None if attr is None else np.concatenate((attr, attr))
    if features is None and attr is not None:
        features = _mean_into(edges[1], attr, num_nodes)
        note = "mean of the in-edges' features, as in OGB's examples"
    fields: dict[str, Any] = {} if features is None else {"features": features}
    labels = csv_array(raw / "node-label.csv.gz", dtype="float32")
    return Graph.from_edge_index(
        edges,
        edge_attr=attr,
        name=name,
        labels=_labels(labels, spec),
        num_classes=spec.num_classes,
        num_nodes=num_nodes,
        features_note=note,
        **fields,
        **split_masks(folder / "split" / spec.scheme, num_nodes),
    )


def _read_binary(name: str, spec: Spec, folder: Path) -> Graph:
    """papers100M: features stay on disk, edges become rows block by block."""
    raw = folder / "raw"
    num_nodes = int(mapped_member(raw / "data.npz", "num_nodes_list").sum())
    edge_index = mapped_member(raw / "data.npz", "edge_index")  # [2, E]

    def blocks() -> Iterator[NDArray[Any]]:
        for start in range(0, edge_index.shape[1], EDGE_BLOCK):
            yield np.asarray(edge_index[:, start : start + EDGE_BLOCK])

    indptr, indices = rows_of_stream(blocks, num_nodes=num_nodes)
    labels = np.asarray(mapped_member(raw / "node-label.npz", "node_label"), np.float32)
    graph = Graph(
        name=name,
        num_nodes=num_nodes,
        indptr=indptr,
        indices=indices,
        features=mapped_member(raw / "data.npz", "node_feat"),
        labels=_labels(labels, spec),
        num_classes=spec.num_classes,
        is_directed=True,
        **split_masks(folder / "split" / spec.scheme, num_nodes),
    )
    graph.validate()
    return graph


def _labels(values: NDArray[Any], spec: Spec) -> NDArray[np.int64]:
    """Whole numbers, -1 where OGB has NaN; ``[N]``, or ``[N, T]`` of several tasks."""
    labels = np.where(np.isnan(values), -1, values).astype(np.int64)
    return labels if spec.num_tasks > 1 else labels[:, 0]


def split_masks(folder: Path, num_nodes: int) -> dict[str, Any]:
    """Masks of OGB's lists of node ids."""
    masks: dict[str, Any] = {}
    for ours, theirs in (("train", "train"), ("val", "valid"), ("test", "test")):
        ids = csv_array(folder / f"{theirs}.csv.gz", dtype="int64")[:, 0]
        if ids.size and not 0 <= ids.min() <= ids.max() < num_nodes:
            raise UserError(
                f"{folder / theirs}.csv.gz (={ids.max()}) must hold node ids below {num_nodes}; "
                "download it anew"
            )
        mask = np.zeros(num_nodes, np.bool_)
        mask[ids] = True
        masks[f"{ours}_mask"] = mask
    return masks


def _count(path: Path) -> int:
    return int(csv_array(path, dtype="int64").sum())


def _check_count(found: int, path: Path) -> None:
    wanted = _count(path)
    if found != wanted:
        raise UserError(
            f"{path.parent / 'edge.csv.gz'} holds {found} edges, {path.name} says {wanted}; "
            "download it anew"
        )


def _optional(path: Path) -> NDArray[np.float32] | None:
    return csv_array(path, dtype="float32") if path.exists() else None


def _mean_into(
    target: NDArray[np.int64], values: NDArray[np.float32], num_nodes: int
) -> NDArray[np.float32]:
    """Mean over the in-edges of each node, ``[N, D]``; zero where there are none."""
    count = np.maximum(np.bincount(target, minlength=num_nodes), 1)
    columns = [np.bincount(target, column, minlength=num_nodes) / count for column in values.T]
    return np.stack(columns, axis=1).astype(np.float32)
