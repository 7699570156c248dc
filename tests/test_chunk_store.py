"""Chunked graphs on disk: round trips, every kind of damage, interrupted and refused writes."""

import dataclasses
import json
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import cut, directed_weighted, graph_of, symmetric_square
from scipy import sparse

from gnnpipe import chunk, renumbering, store
from gnnpipe import graph as graph_module
from gnnpipe.assembly import InputRows
from gnnpipe.chunk import ChunkedGraph
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.way import way_graph


@pytest.mark.parametrize("make", [symmetric_square, directed_weighted])
@pytest.mark.parametrize("verify", [False, True])
def test_round_trip(make: Callable[[], ChunkedGraph], verify: bool, tmp_path: Path) -> None:
    chunked = make()
    chunk.save(chunked, tmp_path / "parts")
    loaded = chunk.load(tmp_path / "parts", verify=verify)
    for field in dataclasses.fields(ChunkedGraph):
        before, after = getattr(chunked, field.name), getattr(loaded, field.name)
        if sparse.issparse(before):
            assert after.dtype == np.float32
            np.testing.assert_array_equal(before.toarray(), after.toarray())
        elif isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
        elif field.name != "manifest":
            assert before == after
    assert chunked.manifest.items() <= loaded.manifest.items()
    shared = chunked.out_indices is chunked.indices
    assert (loaded.out_indices is loaded.indices) == shared
    assert (tmp_path / "parts" / "out_indices.npy").exists() != shared


def test_loaded_arrays_are_mapped_and_read_only(tmp_path: Path) -> None:
    chunk.save(directed_weighted(), tmp_path / "parts")
    loaded = chunk.load(tmp_path / "parts")
    features = loaded.features
    assert not isinstance(features, np.ndarray)
    for array in (loaded.indices, loaded.labels, features.data, features.indices):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_graph_without_edges_round_trips(tmp_path: Path) -> None:
    chunk.save(cut(graph_of(3, []), [0, 1, 1]), tmp_path / "parts")
    assert chunk.load(tmp_path / "parts", verify=True).indices.shape == (0,)


def test_manifest_says_how_it_was_made(tmp_path: Path) -> None:
    chunked = directed_weighted()
    chunk.save(chunked, tmp_path / "parts")
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("gnnpipe-chunks", 1)
    assert (manifest["num_chunks"], manifest["num_ways"], manifest["num_edges"]) == (2, 1, 6)
    assert (manifest["method"], manifest["features_note"]) == ("file", "made up")
    assert {"numpy", "scipy", "pymetis", "gnnpipe"} <= manifest["library_versions"].keys()
    assert {path.stem for path in (tmp_path / "parts").glob("*.npy")} == {*manifest["arrays"]}


# --- damage


def truncate(folder: Path) -> None:
    path = folder / "indices.npy"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "indices.npy"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Changes the manifest; the hash stays unless it is given as None: then it is made good."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    if changes.get("manifest_sha256", "") is None:
        manifest["manifest_sha256"] = store._manifest_sha256(manifest)
    path.write_text(json.dumps(manifest))


def replace_by_garbage(folder: Path) -> None:
    """Same size and a good hash, but no array file."""
    path = folder / "indices.npy"
    path.write_bytes(b"x" * path.stat().st_size)
    _rehash(folder)


def change_dtype(folder: Path) -> None:
    indices = np.load(folder / "indices.npy")
    np.save(folder / "indices.npy", indices.astype(np.float32))
    _rehash(folder)


def _rehash(folder: Path) -> None:
    arrays = json.loads((folder / "manifest.json").read_text())["arrays"]
    arrays["indices"]["sha256"] = store._sha256(folder / "indices.npy")
    edit_manifest(folder, arrays=arrays, manifest_sha256=None)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (truncate, r"indices.npy is damaged: its size \(=\d+\) must be \d+ bytes; write it again"),
    (flip, r"indices.npy is damaged: its SHA-256 must match manifest.json"),
    (replace_by_garbage, "indices.npy is damaged: it must be an array file"),
    (change_dtype, r"indices.npy is damaged: <f4 \[8\] must be <i4 \[8\]"),
    (lambda folder: (folder / "labels.npy").unlink(), "labels.npy cannot be read: No such file"),
    (lambda folder: (folder / "manifest.json").unlink(), "its manifest.json cannot be read: No s"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged: it m"),
    (lambda folder: (folder / "manifest.json").write_text("[]"), r"`format` \(=None\) of"),
    (
        lambda folder: edit_manifest(folder, format="other"),
        r"`format` \(=other\) of .* must be gn",
    ),
    (lambda folder: edit_manifest(folder, version=2), r"`version` \(=2\) of .* must be 1; write"),
    (lambda folder: edit_manifest(folder, num_chunks=3), "json is damaged: its SHA-256 must matc"),
    (shutil.rmtree, r"`directory` \(=.*\) must hold gnnpipe-chunks, but"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_found_and_named(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    chunk.save(symmetric_square(), folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        chunk.load(folder)
    assert "\n" not in str(caught.value)


def test_flipped_byte_of_a_large_array_is_found_by_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "ALWAYS_HASHED_BYTES", 0)
    chunk.save(symmetric_square(), tmp_path / "parts")
    flip(tmp_path / "parts")
    chunk.load(tmp_path / "parts")
    with pytest.raises(UserError, match="indices.npy is damaged: its SHA-256"):
        chunk.load(tmp_path / "parts", verify=True)


# --- writing


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupt(path: Path) -> str:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return "0"

    monkeypatch.setattr(store, "_sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chunk.save(symmetric_square(), tmp_path / "parts")
    assert list(tmp_path.iterdir()) == []


def test_existing_directories_are_respected(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "parts"
    chunk.save(symmetric_square(), folder)
    truncate(folder)
    chunk.save(symmetric_square(), folder)  # the same again, which mends it
    chunk.load(folder)
    with pytest.raises(UserError, match="holds other gnnpipe-chunks; choose another directory or"):
        chunk.save(directed_weighted(), folder)
    chunk.save(directed_weighted(), folder, overwrite=True)
    assert chunk.load(folder).is_directed
    assert [path.name for path in folder.parent.iterdir()] == ["parts"]


def test_empty_directory_is_used(tmp_path: Path) -> None:
    chunk.save(symmetric_square(), tmp_path)
    assert chunk.load(tmp_path).num_nodes == 4


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["foreign directory", "file", "dangling link"])
def test_foreign_targets_are_never_replaced(kind: str, overwrite: bool, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    if kind == "foreign directory":
        target.mkdir()
        (target / "thesis.txt").write_text("dear")
    elif kind == "file":
        target.write_text("dear")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="must be new, empty or hold gnnpipe-chunks; choose anoth"):
        chunk.save(symmetric_square(), target, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_unwritable_directory_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: .* is no directory to write in"):
        chunk.save(symmetric_square(), tmp_path / "file" / "parts")


def test_full_disk_is_a_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_sha256", fail)
    with pytest.raises(UserError, match="cannot be written: No space left on device; choose"):
        chunk.save(symmetric_square(), tmp_path / "parts")
    assert list(tmp_path.iterdir()) == []


def test_link_to_an_empty_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    chunk.save(symmetric_square(), tmp_path / "link")
    assert chunk.load(tmp_path / "real").num_nodes == 4
    assert (tmp_path / "link").is_symlink()


def mapped_graph(folder: Path, num_nodes: int = 4000, channels: int = 256) -> Graph:
    """A ring whose features, 4 MB, are a memory map."""
    draw = np.random.default_rng(0)
    np.save(folder / "x.npy", draw.random((num_nodes, channels), dtype=np.float32))
    ring = [(i, (i + 1) % num_nodes) for i in range(num_nodes)]
    features = np.load(folder / "x.npy", mmap_mode="r", allow_pickle=False)
    return replace(graph_of(num_nodes, ring), features=features)


def test_mapped_features_are_written_without_being_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renumbering, "BLOCK_BYTES", 2**17)
    monkeypatch.setattr(graph_module, "BLOCK_VALUES", 2**14)  # of the fingerprint
    graph = mapped_graph(tmp_path)
    ids = np.arange(graph.num_nodes) * 7 % 5
    options: dict[str, Any] = {"num_ways": 1, "method": "file", "seed": 0}
    ways = np.zeros(graph.num_nodes, np.int64)
    tracemalloc.start()
    cut = chunk.cut(graph, ids, ways, **options)
    chunk.save(cut, tmp_path / "mapped")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < graph.features.nbytes / 2
    copied = chunk.cut(replace(graph, features=np.array(graph.features)), ids, ways, **options)
    chunk.save(copied, tmp_path / "copied")
    files = sorted(path.name for path in (tmp_path / "copied").iterdir())
    for name in files:
        assert (tmp_path / "mapped" / name).read_bytes() == (
            tmp_path / "copied" / name
        ).read_bytes()
    rows = np.array([3, 0, 2])
    assert np.array_equal(cut.features[rows], copied.features[rows])
    assert cut.num_features == 256


def is_mapped(address: int, name: str) -> bool:
    """Whether an address of this process lies in a map of a file."""
    spans = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    bounds = [span[0].split("-") for span in spans if span[-1].endswith(name)]
    return any(int(first, 16) <= address < int(last, 16) for first, last in bounds)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("ways", "way"), [(1, 0), (2, 0), (2, 1)])
def test_training_reads_features_from_the_pages_of_the_file(
    ways: int, way: int, tmp_path: Path
) -> None:
    graph = mapped_graph(tmp_path, num_nodes=400)
    ids = np.arange(400)
    graph_cut = chunk.cut(graph, ids * 7 % 5, ids % 2, num_ways=2, method="file", seed=0)
    chunk.save(graph_cut, tmp_path / "cut")
    loaded = chunk.load(tmp_path / "cut")
    file = (tmp_path / "cut" / "features.npy").read_bytes()
    part = way_graph(loaded, way=way, num_ways=ways)
    features = InputRows(loaded.features, part.row_id, torch.zeros(1))
    for a, b in pairwise(part.chunk_ptr.tolist()):
        rows = features.rows(a, b)
        assert isinstance(rows, torch.Tensor)
        assert np.array_equal(rows.numpy(), loaded.features[part.row_id[a:b]])
        assert is_mapped(rows.data_ptr(), "cut/features.npy")
        rows.zero_()  # A layer may work in place: in memory, not in the file.
    whole = features.rows(0, part.num_rows)
    assert isinstance(whole, torch.Tensor)
    assert is_mapped(whole.data_ptr(), "cut/features.npy") == (ways == 1)
    assert (tmp_path / "cut" / "features.npy").read_bytes() == file
    like = torch.zeros(1, dtype=torch.float64)
    double = InputRows(loaded.features, part.row_id, like).rows(0, 9)
    assert isinstance(double, torch.Tensor)
    assert double.dtype == torch.float64
