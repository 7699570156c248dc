"""OGB's raw layouts: the real ogbn-arxiv without its features, and small made-up data."""

import gzip
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gnnpipe.datasets import load_graph, ogb
from gnnpipe.datasets.edge_stream import distinct_rows, rows_of_stream
from gnnpipe.datasets.npz_member import mapped_member
from gnnpipe.datasets.tables import csv_array, csv_blocks
from gnnpipe.errors import UserError

EDGES = [(0, 1), (2, 1), (3, 0), (3, 4), (1, 1)]


def write(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in rows)


def write_split(folder: Path, *, train: list[int], valid: list[int], test: list[int]) -> None:
    for name, ids in (("train", train), ("valid", valid), ("test", test)):
        write(folder / f"{name}.csv.gz", ([i] for i in ids))


def made_up(root: Path, scheme: str, *, labels: list[list[Any]], **tables: Any) -> Path:
    """Five nodes and five edges in OGB's layout."""
    write(root / "raw/edge.csv.gz", EDGES)
    write(root / "raw/num-node-list.csv.gz", [[5]])
    write(root / "raw/num-edge-list.csv.gz", [[len(EDGES)]])
    write(root / "raw/node-label.csv.gz", labels)
    for name, rows in tables.items():
        write(root / f"raw/{name.replace('_', '-')}.csv.gz", rows)
    write_split(root / "split" / scheme, train=[0, 1, 2], valid=[3], test=[4])
    return root


FEATURES = [[0.5 * i, -i] for i in range(5)]
CLASSES = [[i % 3] for i in range(5)]


def test_the_real_ogbn_arxiv_is_read(shared_data: Callable[[str], Path]) -> None:
    root = str(shared_data("raw/ogbn_arxiv"))
    with pytest.raises(UserError, match="set data.features=surrogate"):
        load_graph("ogbn-arxiv", root=root)
    graph = load_graph("ogbn-arxiv", root=root, undirected=False, features="degree")
    assert (graph.num_nodes, graph.num_edges, graph.num_classes) == (169_343, 1_166_243, 40)
    sizes = [int(m.sum()) for m in (graph.train_mask, graph.val_mask, graph.test_mask)]
    assert sizes == [90_941, 29_799, 48_603]
    with np.load(shared_data("ogbn_arxiv.npz"), allow_pickle=False) as other:
        assert np.array_equal(graph.labels, other["y"])
        order = np.lexsort(other["edge_index"])
        assert np.array_equal(graph.indices, other["edge_index"][0][order])
        assert np.array_equal(graph.train_mask, other["train_mask"])


def test_arxiv_is_made_undirected_unless_told_otherwise(tmp_path: Path) -> None:
    made_up(tmp_path / "ogbn_arxiv", "time", labels=CLASSES, node_feat=FEATURES)
    graph = load_graph("ogbn-arxiv", root=str(tmp_path))
    assert not graph.is_directed
    assert graph.num_edges == 9
    np.testing.assert_array_equal(graph.features, np.array(FEATURES, np.float32))
    assert load_graph("ogbn-arxiv", root=str(tmp_path), undirected=False).num_edges == 5


def test_products_has_the_inverse_of_every_edge(tmp_path: Path) -> None:
    made_up(tmp_path, "sales_ranking", labels=CLASSES, node_feat=FEATURES)
    graph = load_graph("ogbn-products", root=str(tmp_path))
    assert graph.num_edges == 10  # OGB turns self-loops around too
    assert graph.num_classes == 47


def test_proteins_has_tasks_and_edge_features(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(2, size=(5, 112))
    attr = [[i, i + 0.5] for i in range(5)]
    made_up(tmp_path, "species", labels=labels.tolist(), edge_feat=attr)
    graph = load_graph("ogbn-proteins", root=str(tmp_path))
    np.testing.assert_array_equal(graph.labels, labels)
    assert graph.edge_attr is not None
    assert graph.edge_attr.shape == (10, 2)
    # In-edges of node 4: 3 -> 4 alone; of node 2: the inverse of 2 -> 1.
    np.testing.assert_allclose(graph.features[4], attr[3])
    np.testing.assert_allclose(graph.features[2], attr[1])
    assert "in-edges" in graph.features_note


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_papers_stays_on_disk(tmp_path: Path, save: Callable[..., None]) -> None:
    (tmp_path / "raw").mkdir()
    arrays = {
        "edge_index": np.array(EDGES).T,
        "node_feat": np.array(FEATURES, np.float32),
        "num_nodes_list": np.array([5]),
        "num_edges_list": np.array([5]),
    }
    save(tmp_path / "raw/data.npz", **arrays)
    labels = np.array([[0.0], [171.0], [3.0], [np.nan], [5.0]])
    save(tmp_path / "raw/node-label.npz", node_label=labels)
    write_split(tmp_path / "split/time", train=[0, 1], valid=[2], test=[4])
    graph = load_graph("ogbn-papers100M", root=str(tmp_path))
    assert isinstance(graph.features, np.memmap)
    np.testing.assert_array_equal(graph.features, arrays["node_feat"])
    assert graph.labels.tolist() == [0, 171, 3, -1, 5]
    assert graph.indices.tolist() == [3, 0, 1, 2, 3]
    assert graph.indptr.tolist() == [0, 1, 4, 4, 4, 5]


def write_mag(root: Path) -> None:
    """Two papers, two authors, one institution, one field."""
    (root / "raw").mkdir()
    write(root / "raw/num-node-dict.csv.gz", [["author", "institution", "paper"], [2, 1, 2]])
    triplets = [["paper", "cites", "paper"], ["author", "writes", "paper"]]
    triplets += [["author", "affiliated_with", "institution"]]
    write(root / "raw/triplet-list.csv.gz", triplets)
    pairs = {"paper___cites___paper": [(1, 0)], "author___writes___paper": [(0, 0), (1, 1)]}
    pairs["author___affiliated_with___institution"] = [(0, 0)]
    for name, edges in pairs.items():
        write(root / f"raw/relations/{name}/edge.csv.gz", edges)
    write(root / "raw/node-feat/paper/node-feat.csv.gz", [[1.0, 0.0], [0.0, 2.0]])
    write(root / "raw/node-label/paper/node-label.csv.gz", [[7], [348]])
    write_split(root / "split/time/paper", train=[0], valid=[1], test=[])


def test_mag_is_one_graph_of_typed_nodes_and_edges(tmp_path: Path) -> None:
    write_mag(tmp_path)
    graph = load_graph("ogbn-mag", root=str(tmp_path))
    assert graph.node_type is not None
    assert graph.edge_type is not None
    assert graph.node_type.tolist() == [0, 0, 1, 2, 2]
    assert graph.labels.tolist() == [-1, -1, -1, 7, 348]
    assert sorted(set(graph.edge_type.tolist())) == [0, 1, 2, 3, 4, 5]
    assert graph.num_edges == 8
    # Authors get the mean of their papers' features, the institution then that of its author.
    np.testing.assert_allclose(graph.features, [[1, 0], [0, 2], [1, 0], [1, 0], [0, 2]])


def test_missing_files_say_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ogb, "URL", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(
        UserError, match="products.zip could not be.*must hold ogbn-products in OGB's raw layout"
    ):
        load_graph("ogbn-products", root=str(tmp_path))
    made_up(tmp_path, "time", labels=CLASSES, node_feat=FEATURES)
    (tmp_path / "raw/edge.csv.gz").unlink()
    with pytest.raises(UserError, match="edge.csv.gz cannot be read as a table of int64"):
        load_graph("ogbn-arxiv", root=str(tmp_path))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    made_up(tmp_path, "time", labels=CLASSES, node_feat=FEATURES)
    write(tmp_path / "raw/num-edge-list.csv.gz", [[6]])
    with pytest.raises(UserError, match="holds 5 edges, num-edge-list.csv.gz says 6"):
        load_graph("ogbn-arxiv", root=str(tmp_path))
    write(tmp_path / "raw/num-edge-list.csv.gz", [[5]])
    write(tmp_path / "split/time/test.csv.gz", [[5]])
    with pytest.raises(UserError, match="must hold node ids below 5"):
        load_graph("ogbn-arxiv", root=str(tmp_path))
    write(tmp_path / "raw/node-feat.csv.gz", [["a", "b"]])
    with pytest.raises(UserError, match="cannot be read as a table of float32"):
        load_graph("ogbn-arxiv", root=str(tmp_path))
    (tmp_path / "mag").mkdir()
    write_mag(tmp_path / "mag")
    (tmp_path / "mag/raw/triplet-list.csv.gz").write_bytes(b"none")
    with pytest.raises(UserError, match="triplet-list.csv.gz is missing or damaged"):
        load_graph("ogbn-mag", root=str(tmp_path / "mag"))


def test_archives_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK none")
    with pytest.raises(UserError, match="is no .npz file or is damaged"):
        mapped_member(path, "x")
    np.savez(path, x=np.arange(3), o=np.array([None], object))
    with pytest.raises(UserError, match="lacks the array y"):
        mapped_member(path, "y")
    with pytest.raises(UserError, match="holds Python objects"):
        mapped_member(path, "o")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"none")
    with pytest.raises(UserError, match="is damaged"):
        mapped_member(path, "x")


def test_rows_of_a_stream_equal_sorted_edges() -> None:
    draw = np.random.default_rng(0)
    edges = draw.integers(50, size=(2, 1000))
    indptr, indices = rows_of_stream(
        lambda: iter(np.split(edges, [1, 300, 301], axis=1)), num_nodes=50
    )
    order = np.lexsort(edges)
    assert np.array_equal(indices, edges[0, order])
    assert np.array_equal(np.diff(indptr), np.bincount(edges[1], minlength=50))
    once_ptr, once = distinct_rows(indptr, indices)
    wanted = np.unique(edges[::-1], axis=1)[::-1]
    assert np.array_equal(once, wanted[0])
    assert np.array_equal(np.repeat(np.arange(50), np.diff(once_ptr)), wanted[1])
    with pytest.raises(UserError, match="must lie between 0 and 9"):
        rows_of_stream(lambda: iter([edges]), num_nodes=10)


def test_tables_have_missing_values_and_several_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gnnpipe.datasets.tables.BLOCK_BYTES", 64)
    write(tmp_path / "t.csv.gz", [[i, "nan" if i == 3 else i / 2] for i in range(40)])
    assert len(list(csv_blocks(tmp_path / "t.csv.gz", dtype="float32"))) > 1
    table = csv_array(tmp_path / "t.csv.gz", dtype="float32")
    assert np.isnan(table[3, 1])
    assert table.shape == (40, 2)
