"""Graphs to and from other libraries, and edge lists of any size as rows on disk.

A converter reads its file twice, block by block, so its memory is that of the rows it builds
(8 bytes per node, 4 per edge) and one block, whatever the size of the text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from gnnpipe.datasets.edge_stream import rows_of_stream
from gnnpipe.datasets.tables import csv_blocks
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

PARQUET_ROWS = 2**20


def edge_list_rows(
    path: str | Path, *, num_nodes: int | None = None, is_undirected: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """In-edges by target of an edge list, streamed.

    Args:
        path: ``.csv``, ``.csv.gz`` or ``.parquet``; the first two columns are source and target.
        num_nodes: ids are below; None reads the file once more to find the largest.
        is_undirected: add the reverse of every edge.

    Returns:
        ``indptr [N + 1]`` and ``indices [E]``.

    Raises:
        UserError: the file is of another kind, damaged, or holds ids out of range.
    """
    path = Path(path)

    def blocks() -> Iterator[NDArray[Any]]:
        for block in _edge_blocks(path):
            yield block
            if is_undirected:
                yield block[::-1]

    if num_nodes is None:
        num_nodes = 1 + max(
            (int(block.max(initial=-1)) for block in _edge_blocks(path)), default=-1
        )
    return rows_of_stream(blocks, num_nodes=num_nodes)


def to_scipy(graph: Graph) -> Any:  # scipy ships no types
    """The adjacency as CSR ``[N, N]``: row i holds the sources of i, values are edge weights."""
    values = graph.edge_weight
    values = np.ones(graph.num_edges, np.float32) if values is None else values
    shape = (graph.num_nodes, graph.num_nodes)
    return sparse.csr_array((values, graph.indices, graph.indptr), shape=shape)


def from_scipy(matrix: Any, **fields: Any) -> Graph:
    """A graph whose row i holds the sources of i; values other than ones are edge weights.

    Args:
        matrix: ``[N, N]``, any scipy sparse format.
        **fields: labels and masks, see :meth:`gnnpipe.graph.Graph.from_edge_index`.

    Raises:
        UserError: it is not square, or the graph is not sound.
    """
    entries = sparse.coo_array(matrix)
    if entries.shape[0] != entries.shape[1]:
        raise UserError(f"`matrix` (={list(entries.shape)}) must be square; rows are targets")
    is_weighted = bool((entries.data != 1).any())
    edges = np.stack((entries.col, entries.row)).astype(np.int64)
    weight = entries.data if is_weighted else None
    return Graph.from_edge_index(edges, edge_weight=weight, **fields)


def to_networkx(graph: Graph) -> Any:  # networkx ships no types
    """A ``DiGraph`` with the labels of nodes and the weights of edges as attributes."""
    import networkx

    made = networkx.DiGraph(name=graph.name)
    made.add_nodes_from(
        (node, {"label": _plain(graph.labels[node])}) for node in range(graph.num_nodes)
    )
    target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    pairs = zip(graph.indices.tolist(), target.tolist(), strict=True)
    if graph.edge_weight is None:
        made.add_edges_from(pairs)
    else:
        weights = graph.edge_weight.tolist()
        made.add_weighted_edges_from((*p, w) for p, w in zip(pairs, weights, strict=True))
    return made


def from_networkx(network: Any, **fields: Any) -> Graph:
    """A graph of a networkx graph whose nodes are numbered from 0; undirected edges go both ways.

    Args:
        network: with ``weight`` on its edges or not.
        **fields: labels and masks, see :meth:`gnnpipe.graph.Graph.from_edge_index`.

    Raises:
        UserError: nodes are not the numbers 0 to N - 1.
    """
    if set(network.nodes) != set(range(len(network))):
        raise UserError(
            "`network` must have the nodes 0 to N - 1; "
            "use networkx.convert_node_labels_to_integers"
        )
    listed = list(network.edges(data="weight", default=None))
    edges = np.array([(a, b) for a, b, _ in listed], np.int64).reshape(-1, 2).T
    weights = [w for _, _, w in listed]
    weight = None if None in weights or not weights else np.array(weights, np.float32)
    if not network.is_directed():
        is_loop = edges[0] == edges[1]
        edges = np.concatenate((edges, edges[::-1, ~is_loop]), axis=1)
        weight = None if weight is None else np.concatenate((weight, weight[~is_loop]))
    return Graph.from_edge_index(edges, edge_weight=weight, num_nodes=len(network), **fields)


def to_pyg(graph: Graph) -> Any:  # torch_geometric has no types
    """A PyG ``Data`` with everything that the graph holds; sparse features become dense."""
    import torch
    from torch_geometric.data import Data

    target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    features = graph.features
    x = features if isinstance(features, np.ndarray) else features.toarray()
    named = (
        "edge_weight",
        "edge_attr",
        "edge_type",
        "node_type",
        "train_mask",
        "val_mask",
        "test_mask",
    )
    extra = {name: getattr(graph, name) for name in named}
    return Data(
        x=torch.from_numpy(np.array(x)),
        edge_index=torch.from_numpy(np.stack((graph.indices.astype(np.int64), target))),
        y=torch.from_numpy(np.array(graph.labels)),
        **{name: torch.from_numpy(np.array(v)) for name, v in extra.items() if v is not None},
    )


def write_rows(path: str | Path, rows: NDArray[Any]) -> None:
    """Writes predictions or embeddings ``[N, T]`` with the id of each node.

    Args:
        path: ``.parquet``: the columns ``node_id``, ``0``, ``1``, ...; ``.npy``: a structured
            array of ``node_id`` and ``values``.
        rows: in the data set's node order.

    Raises:
        UserError: another suffix.
    """
    path, node_id = Path(path), np.arange(len(rows), dtype=np.int64)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        columns = {"node_id": node_id, **{str(i): column for i, column in enumerate(rows.T)}}
        parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix == ".npy":
        kind = [("node_id", np.int64), ("values", rows.dtype, rows.shape[1:])]
        table = np.empty(len(rows), kind)
        table["node_id"], table["values"] = node_id, rows
        np.save(path, table, allow_pickle=False)
    else:
        raise UserError(f"`path` (={path}) must end in .parquet or .npy")


def _edge_blocks(path: Path) -> Iterator[NDArray[Any]]:
    """Blocks ``[2, n]`` of sources and targets."""
    if path.name.endswith((".csv", ".csv.gz")):
        for block in csv_blocks(path, dtype="int64"):
            _check_width(path, block.shape[1])
            yield block[:, :2].T
    elif path.suffix == ".parquet":
        yield from _parquet_blocks(path)
    else:
        raise UserError(f"`path` (={path}) must end in .csv, .csv.gz or .parquet")


def _parquet_blocks(path: Path) -> Iterator[NDArray[Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_width(path, len(file.schema_arrow))
            names = file.schema_arrow.names[:2]
            for batch in file.iter_batches(PARQUET_ROWS, columns=names):
                yield np.stack([batch.column(name).to_numpy() for name in names]).astype(np.int64)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is missing, damaged or no Parquet file") from error


def _check_width(path: Path, width: int) -> None:
    if width < 2:
        raise UserError(f"{path} (={width} columns) must have two: source and target")


def _plain(value: Any) -> Any:
    return value.tolist()
