"""Features made from the graph, and their normalisation."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from gnnpipe.datasets import load_graph
from gnnpipe.datasets.features import (
    choose_features,
    degree_features,
    normalise_rows,
    surrogate_features,
)
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

SharedData = Callable[[str], Path]

X = np.array([[1, 2], [3, 4], [0, 0], [-1, 1]], np.float32)


def small_graph(**changes: Any) -> Graph:
    """0 -> 1 <-> 2, node 3 isolated."""
    arguments: dict[str, Any] = {"name": "small", "features": X, "labels": [0, 1, 0, -1]}
    arguments |= {part: [True] * 4 for part in ("train_mask", "val_mask", "test_mask")}
    return Graph.from_edge_index([[0, 1, 2], [1, 2, 1]], **(arguments | changes))


def test_surrogate_features_replace_and_are_labelled() -> None:
    own = small_graph()
    graph = choose_features(own, "surrogate", seed=3)
    assert graph.features.shape == (4, 128)
    assert graph.features_note == "surrogate: made from the graph (seed 3), not the data set's own"
    assert choose_features(own, "auto").features_note == ""
    assert isinstance(graph.features, np.ndarray)
    assert not graph.features[3].any()  # isolated
    assert np.array_equal(graph.features, surrogate_features(own, seed=3))
    assert not np.array_equal(graph.features, surrogate_features(graph, seed=4))


def test_surrogate_features_equal_the_published_recipe(shared_data: SharedData) -> None:
    spec = importlib.util.spec_from_file_location("recipe", shared_data("surrogate_features.py"))
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    graph = load_graph(str(shared_data("cora.npz")))
    targets = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    expected = recipe.surrogate_features(np.stack([graph.indices, targets]), graph.num_nodes)
    assert np.allclose(surrogate_features(graph), expected, atol=1e-6)


def test_degree_features_are_soft_bins_of_both_degrees() -> None:
    graph = choose_features(small_graph(), "degree")
    assert graph.features_note.startswith("degree: made from the graph")
    table = degree_features(small_graph())  # in-degrees 0 2 1 0, out-degrees 1 1 1 0
    assert table.shape == (4, 64)
    assert table.sum(axis=1).tolist() == [2, 2, 2, 2]
    two = np.log2(3)
    assert np.allclose(
        table[:, :4], [[1, 0, 0, 0], [0, 2 - two, two - 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    )
    assert table[:, 32:34].tolist() == [[0, 1], [0, 1], [0, 1], [1, 0]]


def test_a_graph_without_features_needs_a_choice() -> None:
    bare = small_graph(features=np.zeros((4, 0)))
    message = r"`data.features` \(=auto\) finds none in small; set data.features=surrogate or"
    with pytest.raises(UserError, match=message):
        choose_features(bare, "auto")
    assert choose_features(bare, "degree").num_features == 64


def test_rows_are_normalised_dense_and_sparse_alike() -> None:
    expected = np.array([[1 / 3, 2 / 3], [3 / 7, 4 / 7], [0, 0], [-0.5, 0.5]], np.float32)
    assert np.array_equal(normalise_rows(X), expected)
    table = sparse.csr_array(X)
    normalised = normalise_rows(table)
    assert isinstance(normalised, sparse.csr_array)
    assert np.array_equal(normalised.toarray(), expected)
    assert table.max() == 4  # the caller's table stays as it is


def test_load_graph_applies_both_options() -> None:
    graph = load_graph("digits", features="surrogate", row_normalize=True, seed=1)
    assert isinstance(graph.features, np.ndarray)
    assert graph.features_note.startswith("surrogate")
    assert np.allclose(np.abs(graph.features).sum(axis=1), 1, atol=1e-5)
