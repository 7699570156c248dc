"""Graphs there and back again, and edge lists that are streamed."""

import tracemalloc
from pathlib import Path

import networkx
import numpy as np
import pyarrow
import pytest
from drawn import woven
from pyarrow import parquet
from scipy import sparse

from gnnpipe.datasets import from_pyg
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.interchange import (
    edge_list_rows,
    from_networkx,
    from_scipy,
    to_networkx,
    to_pyg,
    to_scipy,
    write_rows,
)


def fields(graph: Graph) -> dict[str, object]:
    names = ("labels", "features", "train_mask", "val_mask", "test_mask", "num_classes")
    return {name: getattr(graph, name) for name in names}


@pytest.mark.parametrize("is_directed", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_graphs_come_back_as_they_were(is_directed: bool, is_weighted: bool) -> None:
    graph = woven(is_directed=is_directed, is_weighted=is_weighted)
    for back in (
        from_scipy(to_scipy(graph), **fields(graph)),
        from_networkx(to_networkx(graph), **fields(graph)),
        from_pyg(to_pyg(graph)),
    ):
        assert back.fingerprint() == graph.fingerprint()


def test_undirected_networks_get_both_directions() -> None:
    network = networkx.path_graph(3)
    network.add_edge(1, 1)
    masks = {m: np.ones(3, bool) for m in ("train_mask", "val_mask", "test_mask")}
    graph = from_networkx(network, labels=np.zeros(3, np.int64), **masks)
    assert graph.num_edges == 5
    assert not graph.is_directed
    with pytest.raises(UserError, match="must have the nodes 0 to N - 1"):
        from_networkx(networkx.relabel_nodes(network, {0: "a"}))
    with pytest.raises(UserError, match="must be square"):
        from_scipy(sparse.csr_array((2, 3)))


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("is_undirected", [False, True])
def test_edge_lists_are_read_as_rows(kind: str, is_undirected: bool, tmp_path: Path) -> None:
    edges = np.random.default_rng(0).integers(30, size=(500, 2))
    path = tmp_path / f"edges.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"a": edges[:, 0], "b": edges[:, 1]}), path)
    else:
        np.savetxt(path, edges, fmt="%d", delimiter=",")
    indptr, indices = edge_list_rows(path, is_undirected=is_undirected)
    both = np.concatenate((edges, edges[:, ::-1])) if is_undirected else edges
    order = np.lexsort(both.T)
    assert np.array_equal(indices, both[order, 0])
    assert np.array_equal(np.diff(indptr), np.bincount(both[:, 1], minlength=30))


def test_other_edge_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must end in .csv, .csv.gz or .parquet"):
        edge_list_rows(tmp_path / "edges.txt")
    (tmp_path / "edges.csv").write_text("1\n2\n")
    with pytest.raises(UserError, match="1 columns. must have two"):
        edge_list_rows(tmp_path / "edges.csv")
    (tmp_path / "edges.parquet").write_bytes(b"none")
    with pytest.raises(UserError, match="no Parquet file"):
        edge_list_rows(tmp_path / "edges.parquet")
    (tmp_path / "edges.csv").write_text("1,2\n")
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        edge_list_rows(tmp_path / "edges.csv", num_nodes=2)


def test_streamed_rows_need_little_more_memory_than_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "edges.csv"
    draw = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(20):  # two million edges
            np.savetxt(file, draw.integers(1000, size=(100_000, 2)), fmt="%d", delimiter=",")
    tracemalloc.start()
    _, indices = edge_list_rows(path, num_nodes=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert indices.size == 2_000_000
    assert peak < 400e6  # 8 MB of rows; blocks of 16 MiB of text and their sort


def test_rows_are_written_with_node_ids(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((5, 3), dtype=np.float32)
    write_rows(tmp_path / "rows.parquet", rows)
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.column("node_id").to_pylist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(table.column("2").to_numpy(), rows[:, 2])
    write_rows(tmp_path / "rows.npy", rows)
    back = np.load(tmp_path / "rows.npy", allow_pickle=False)
    np.testing.assert_array_equal(back["values"], rows)
    with pytest.raises(UserError, match="must end in .parquet or .npy"):
        write_rows(tmp_path / "rows.csv", rows)
