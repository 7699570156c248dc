"""Data sets by name: digits and Planetoid, and the names and choices that are refused."""

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import sparse

from gnnpipe.datasets import load_graph
from gnnpipe.datasets.planetoid import SUFFIXES
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

with warnings.catch_warnings():  # torch_geometric compiles with torch.jit.script on import
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
    from torch_geometric.datasets import Planetoid

SharedData = Callable[[str], Path]


def masks_of(graph: Graph) -> NDArray[np.bool_]:
    return np.stack([graph.train_mask, graph.val_mask, graph.test_mask])


def test_importing_datasets_loads_neither_torch_nor_sklearn() -> None:
    code = "import sys, gnnpipe.datasets; print({'torch', 'sklearn'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "digitz"},
            r"`data.name` \(=digitz\) must be one of digits, .*nearest .* digits",
        ),
        ({"name": "CORRA"}, r"`data.name` \(=CORRA\) must be one of .*the nearest name is cora"),
        ({"name": ""}, r"`data.name` \(=\) must be one of digits"),
        ({"name": "graph.csv"}, "or a path that ends in .npz or .pt"),
        ({"name": "no/such.npz"}, r"`data.name` \(=no/such.npz\) must be an existing file"),
        ({"name": "no/such.pt"}, r"`data.name` \(=no/such.pt\) must be an existing file"),
        ({"name": "cora", "root": "no/such"}, r"`data.root` \(=no/such\) must be an existing fol"),
        ({"name": "cora", "split": "half"}, r"`data.split` \(=half\) must be one of public, full"),
        ({"name": "digits", "split": "full"}, r"`data.split` \(=full\) must be public, the data"),
        (
            {"name": "digits", "undirected": "maybe"},
            r"`data.undirected` \(=maybe\) must be one of",
        ),
        (
            {"name": "digits", "features": "own"},
            r"`data.features` \(=own\) must be one of auto, s",
        ),
    ],
)
def test_unknown_names_and_choices_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_graph(**arguments)


def test_digits_is_a_symmetric_graph_of_the_sklearn_images() -> None:
    graph = load_graph("Digits")
    assert (graph.num_nodes, graph.num_features, graph.num_classes) == (1797, 64, 10)
    assert not graph.is_directed  # which `validate` has checked
    assert np.diff(graph.indptr).min() == 8
    targets = np.repeat(np.arange(1797), np.diff(graph.indptr))
    assert not np.any(graph.indices == targets)
    assert np.mean(graph.labels[graph.indices] == graph.labels[targets]) > 0.95
    assert isinstance(graph.features, np.ndarray)
    assert (graph.features.min(), graph.features.max()) == (0, 1)


def test_digits_neighbours_are_as_near_as_sklearn_finds() -> None:
    from sklearn.neighbors import NearestNeighbors

    graph = load_graph("digits")
    assert isinstance(graph.features, np.ndarray)
    x = graph.features.astype(np.float64)
    distance, _ = NearestNeighbors(n_neighbors=8).fit(x).kneighbors()
    reach = distance.max(axis=1)  # [N]
    targets = np.repeat(np.arange(1797), np.diff(graph.indptr))
    length = np.linalg.norm(x[targets] - x[graph.indices], axis=1)
    assert np.all(length <= np.maximum(reach[targets], reach[graph.indices]) + 1e-12)


def test_digits_split_is_stratified_and_follows_the_seed() -> None:
    graph, again, other = load_graph("digits"), load_graph("digits"), load_graph("digits", seed=1)
    assert graph.fingerprint() == again.fingerprint() != other.fingerprint()
    assert np.array_equal(graph.indices, other.indices)
    assert np.all(masks_of(graph).sum(axis=0) == 1)
    for label in range(10):
        sizes = masks_of(graph)[:, graph.labels == label].sum(axis=1)
        assert np.allclose(sizes / sizes.sum(), [0.1, 0.2, 0.7], atol=0.01)


def test_planetoid_files_equal_the_shared_cora(shared_data: SharedData, tmp_path: Path) -> None:
    files = shared_data("raw/planetoid")
    before = sorted(files.iterdir())
    graph = load_graph("Cora", root=str(files))
    assert sorted(files.iterdir()) == before
    assert (graph.name, graph.is_directed) == ("cora", False)
    assert isinstance(graph.features, sparse.csr_array)
    assert graph.fingerprint() == load_graph(str(shared_data("cora.npz"))).fingerprint()
    for layout in ("Cora/raw", "raw"):
        root = tmp_path / layout.replace("/", "-")
        shutil.copytree(files, root / layout)
        assert load_graph("cora", root=str(root)).fingerprint() == graph.fingerprint()
        assert [path.name for path in root.iterdir()] == [layout.split("/")[0]]


def test_planetoid_splits(shared_data: SharedData) -> None:
    root = str(shared_data("raw/planetoid"))
    full = load_graph("cora", root=root, split="full")
    assert masks_of(full).sum(axis=1).tolist() == [1208, 500, 1000]
    state = torch.random.get_rng_state()
    drawn, again, other = (
        load_graph("cora", root=root, split="random", seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert masks_of(drawn).sum(axis=1).tolist() == [140, 500, 1000]
    assert np.array_equal(masks_of(drawn), masks_of(again))
    assert not np.array_equal(masks_of(drawn), masks_of(other))


def test_incomplete_planetoid_files_are_named(tmp_path: Path) -> None:
    for suffix in SUFFIXES[2:]:
        (tmp_path / f"ind.cora.{suffix}").touch()
    with pytest.raises(UserError, match=r"lacks ind.cora.x, ind.cora.tx; add the files"):
        load_graph("cora", root=str(tmp_path))


def test_damaged_planetoid_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in SUFFIXES:
        (tmp_path / f"ind.pubmed.{suffix}").write_text("damaged")
    with pytest.raises(UserError, match=r"holds damaged files ind.pubmed.\* \(\w+\); replace"):
        load_graph("pubmed", root=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == len(SUFFIXES)
    assert capsys.readouterr() == ("", "")


def test_failed_download_says_which_files_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(dataset: Any) -> None:
        Path(dataset.raw_dir, "ind.cora.x").write_text("torn")
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(Planetoid, "download", no_network)
    monkeypatch.setenv("GNNPIPE_CACHE", str(tmp_path / "cache"))
    message = (
        r"`data.name` \(=cora\) could not be downloaded \(ConnectionError\); put ind.cora.x, "
    )
    with pytest.raises(UserError, match=message) as caught:
        load_graph("cora")
    assert str(tmp_path / "cache" / "cora" / "raw") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_download_is_kept_for_the_next_time(
    shared_data: SharedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = shared_data("raw/planetoid")
    calls = []

    def download(dataset: Any) -> None:
        calls.append(dataset.raw_dir)
        for suffix in SUFFIXES:
            shutil.copy(files / f"ind.cora.{suffix}", dataset.raw_dir)

    monkeypatch.setattr(Planetoid, "download", download)
    monkeypatch.setenv("GNNPIPE_CACHE", str(tmp_path))
    assert load_graph("cora").fingerprint() == load_graph("cora").fingerprint()
    assert len(calls) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["cora", "raw", *(f"ind.cora.{suffix}" for suffix in SUFFIXES)]
    )
