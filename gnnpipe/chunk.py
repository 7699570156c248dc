"""A graph cut into chunks and ways: its nodes renumbered cell by cell, in memory and on disk.

Cells are chunk-major and way-minor, so that a chunk is one contiguous range of rows, and a cell of
it too. For C = 2 chunks and W = 2 ways::

    new id    0 ......... | .......... | .......... | ........ N-1
    cell      chunk 0     | chunk 0    | chunk 1    | chunk 1
              way 0       | way 1      | way 0      | way 1

Inside a cell the original order stays. ``chunk_id`` defines a run's numbers; its hash is kept.
"""

import dataclasses
import hashlib
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from gnnpipe import __version__, store
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.renumbering import Rows, TakenRows, renumbered, transposed

FORMAT = "gnnpipe-chunks"
VERSION = 1

RECORDED_LIBRARIES = ("numpy", "scipy", "pymetis")
"""METIS cuts differently from version to version, so a partition says which one made it."""

FACT_KEYS = ("name", "num_nodes", "num_chunks", "num_ways", "num_classes", "is_directed")

HEADER_KEYS = (
    "format",
    "version",
    *FACT_KEYS,
    "num_edges",
    "num_features",
    "features_note",
    "method",
    "seed",
    "graph_fingerprint",
    "chunk_id_sha256",
    "library_versions",
)


@dataclass(frozen=True, eq=False)
class ChunkedGraph:
    """N nodes and E edges in C chunks and W ways; every array is in the new numbering."""

    name: str
    num_nodes: int
    num_chunks: int
    num_ways: int
    num_classes: int
    is_directed: bool
    cell_ptr: NDArray[np.int64]  # [C * W + 1]: cell (c, w) starts at cell_ptr[c * W + w]
    node_id: NDArray[np.int64]  # [N]: original id of each new id
    indptr: NDArray[np.int64]  # [N + 1]: rows are targets
    indices: NDArray[np.int32]  # [E]: sources, ascending in a row
    out_indptr: NDArray[np.int64]  # [N + 1]: rows are sources
    out_indices: NDArray[np.int32]  # [E]: targets; the very array `indices` when symmetric
    edge_weight: NDArray[np.float32] | None  # [E], in the order of `indices`
    out_edge_weight: NDArray[np.float32] | None  # [E], in the order of `out_indices`
    features: Any  # [N, F]: dense, scipy's CSR, or TakenRows of a mapped table before saving
    labels: NDArray[Any]  # [N] or [N, T]
    train_mask: NDArray[np.bool_]  # [N]
    val_mask: NDArray[np.bool_]  # [N]
    test_mask: NDArray[np.bool_]  # [N]
    manifest: dict[str, Any]  # how it was made: method, seed, fingerprint, hashes, versions
    edge_attr: NDArray[np.float32] | None = None  # [E, D], in the order of `indices`
    edge_type: NDArray[np.int64] | None = None  # [E], likewise
    node_type: NDArray[np.int64] | None = None  # [N]
    pairs: NDArray[np.int64] | None = None  # [P, 2], see Graph
    pair_split: NDArray[np.int64] | None = None  # [P]

    @property
    def num_edges(self) -> int:
        return len(self.indices)

    @property
    def num_features(self) -> int:
        return int(self.features.shape[1])


def cut(
    graph: Graph,
    chunk_id: NDArray[Any],
    way_id: NDArray[Any],
    *,
    num_ways: int,
    method: str,
    seed: int,
) -> ChunkedGraph:
    """Renumbers a graph by an assignment.

    Args:
        graph: the graph.
        chunk_id: chunk of each node, ``[N]``; ids without gaps from 0.
        way_id: way of each node, ``[N]``; cells may be empty, chunks not.
        num_ways: ways W.
        method: how the assignment was made, for the manifest.
        seed: seed it was made with.

    Raises:
        UserError: ids of another length or out of range, an empty chunk.
    """
    chunk_id, way_id = _checked_ids(graph, chunk_id, way_id, num_ways)
    num_chunks = int(chunk_id.max()) + 1
    cell = chunk_id.astype(np.int64) * num_ways + way_id  # [N]
    node_id = np.argsort(cell, kind="stable")  # stable: the original order inside a cell
    sizes = np.bincount(cell, minlength=num_chunks * num_ways)
    into, edge_id = renumbered(Rows(graph.indptr, graph.indices), node_id)
    edge_weight = _taken(graph.edge_weight, edge_id)
    out, out_edge_weight = _out_edges(into, edge_weight)
    return ChunkedGraph(
        name=graph.name,
        num_nodes=graph.num_nodes,
        num_chunks=num_chunks,
        num_ways=num_ways,
        num_classes=graph.num_classes,
        is_directed=graph.is_directed,
        cell_ptr=np.concatenate(([0], np.cumsum(sizes))),
        node_id=node_id,
        indptr=into.indptr,
        indices=into.indices,
        out_indptr=out.indptr,
        out_indices=out.indices,
        edge_weight=edge_weight,
        out_edge_weight=out_edge_weight,
        features=_reordered(graph.features, node_id),
        labels=graph.labels[node_id],
        train_mask=graph.train_mask[node_id],
        val_mask=graph.val_mask[node_id],
        test_mask=graph.test_mask[node_id],
        manifest=_header(graph, chunk_id, (num_chunks, num_ways), method=method, seed=seed),
        edge_attr=_taken(graph.edge_attr, edge_id),
        edge_type=_taken(graph.edge_type, edge_id),
        node_type=_taken(graph.node_type, node_id),
        pairs=None if graph.pairs is None else np.argsort(node_id)[graph.pairs],
        pair_split=graph.pair_split,
    )


def save(chunked: ChunkedGraph, directory: str | Path, *, overwrite: bool = False) -> None:
    """Writes a chunked graph as a directory: ``manifest.json`` and one ``.npy`` file per array.

    Args:
        chunked: the graph.
        directory: new, empty, or holding the same partition already.
        overwrite: replace another partition there.

    Raises:
        UserError: the directory holds something else, or cannot be written.
    """
    arrays = {
        field.name: getattr(chunked, field.name)
        for field in dataclasses.fields(chunked)
        if isinstance(getattr(chunked, field.name), np.ndarray | TakenRows)
    }
    if chunked.out_indices is chunked.indices:
        for name in ("out_indptr", "out_indices", "out_edge_weight"):
            arrays.pop(name, None)
    if sparse.issparse(chunked.features):
        for part in ("indptr", "indices", "data"):
            arrays[f"features_{part}"] = getattr(chunked.features, part)
    made = {key: chunked.manifest[key] for key in HEADER_KEYS}
    store.write(directory, arrays, made, overwrite=overwrite)


def load(directory: str | Path, *, verify: bool = False) -> ChunkedGraph:
    """Opens what :func:`save` wrote; arrays are memory-mapped and read-only.

    Args:
        directory: the directory.
        verify: compare the hash of every byte, not only of the manifest and small arrays.

    Raises:
        UserError: missing, foreign, newer, truncated or damaged files.
    """
    arrays, manifest = store.read(directory, format_name=FORMAT, version=VERSION, verify=verify)
    fields: dict[str, Any] = {key: manifest[key] for key in FACT_KEYS} | arrays
    if "features" not in fields:
        parts = tuple(fields.pop(f"features_{part}") for part in ("data", "indices", "indptr"))
        shape = (manifest["num_nodes"], manifest["num_features"])
        fields["features"] = sparse.csr_array(parts, shape=shape)
    fields.setdefault("edge_weight", None)
    if "out_indices" not in fields:  # symmetric: the same objects, as `cut` makes them
        for name in ("indptr", "indices", "edge_weight"):
            fields[f"out_{name}"] = fields[name]
    fields.setdefault("out_edge_weight", None)
    return ChunkedGraph(**fields, manifest=manifest)


def check_belongs(chunked: ChunkedGraph, graph: Graph) -> None:
    """Refuses a partition that was made from another graph.

    Raises:
        UserError: the fingerprints differ.
    """
    found = graph.fingerprint()
    made_from = chunked.manifest["graph_fingerprint"]
    if made_from != found:
        raise UserError(
            f"`partition` (={chunked.name}, fingerprint {made_from[:12]}) must be made from the "
            f"graph in hand (={graph.name}, fingerprint {found[:12]}): features, labels, split "
            "and edges must be the same; partition it again with the same data options"
        )


def _checked_ids(
    graph: Graph, chunk_id: NDArray[Any], way_id: NDArray[Any], num_ways: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Both ids as int32; refuses what does not describe chunks and ways of this graph."""
    chunk_id, way_id = np.asarray(chunk_id), np.asarray(way_id)
    for name, ids in (("chunk_id", chunk_id), ("way_id", way_id)):
        if ids.shape != (graph.num_nodes,) or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(
                f"`{name}` (={ids.dtype}, {list(ids.shape)}) must be one integer for each of "
                f"{graph.num_nodes} nodes; assign this graph"
            )
    if way_id.min() < 0 or way_id.max() >= num_ways:
        raise UserError(
            f"`way_id` (={way_id.min()}..{way_id.max()}) must lie in [0, {num_ways}); "
            "pass the `num_ways` it was made with"
        )
    present = np.unique(chunk_id)
    if present[0] != 0 or present[-1] != len(present) - 1:
        raise UserError(
            f"`chunk_id` (={present[0]}..{present[-1]}, {len(present)} different) must count from "
            "0 without gaps; number the chunks again"
        )
    return chunk_id.astype(np.int32), way_id.astype(np.int32)


def _reordered(features: Any, node_id: NDArray[np.int64]) -> Any:
    """Mapped features stay on disk: they need not fit into memory."""
    return TakenRows(features, node_id) if isinstance(features, np.memmap) else features[node_id]


def _taken(values: NDArray[Any] | None, index: NDArray[np.int64]) -> NDArray[Any] | None:
    return None if values is None else values[index]


def _out_edges(
    into: Rows, edge_weight: NDArray[np.float32] | None
) -> tuple[Rows, NDArray[np.float32] | None]:
    """Edges by source with their weights; the same objects as by target when these are equal."""
    out, order = transposed(into)
    if edge_weight is None:
        return (into if out.equals(into) else out), None
    out_edge_weight = edge_weight[order]
    if out.equals(into) and np.array_equal(edge_weight, out_edge_weight):
        return into, edge_weight
    return out, out_edge_weight


def _header(
    graph: Graph,
    chunk_id: NDArray[np.int32],
    counts: tuple[int, int],
    *,
    method: str,
    seed: int,
) -> dict[str, Any]:
    """The facts of the manifest, all of :data:`HEADER_KEYS`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": graph.name,
        "num_nodes": graph.num_nodes,
        "num_chunks": counts[0],
        "num_ways": counts[1],
        "num_classes": graph.num_classes,
        "is_directed": bool(graph.is_directed),
        "num_edges": graph.num_edges,
        "num_features": graph.num_features,
        "features_note": graph.features_note,
        "method": method,
        "seed": seed,
        "graph_fingerprint": graph.fingerprint(),
        "chunk_id_sha256": hashlib.sha256(chunk_id.astype("<i4").tobytes()).hexdigest(),
        "library_versions": _library_versions(),
    }


def _library_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "gnnpipe": __version__}
    for name in RECORDED_LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions
