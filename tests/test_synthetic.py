"""The seeded graph generator."""

import numpy as np
import pytest

from gnnpipe.datasets import load_graph
from gnnpipe.errors import UserError


def test_one_seed_gives_one_graph() -> None:
    one, same, other = (load_graph("synthetic:3000:20000", seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_graph_is_what_the_name_says() -> None:
    graph = load_graph("synthetic:5000:60000:4")
    assert (graph.num_nodes, graph.num_classes) == (5000, 4)
    assert 0.9 * 60000 < graph.num_edges <= 60000
    assert not graph.is_directed


def test_degrees_are_skewed_and_neighbours_alike() -> None:
    graph = load_graph("synthetic:5000:60000:4")
    degree = np.diff(graph.indptr)
    assert degree.max() > 5 * degree.mean()
    target = np.repeat(np.arange(5000), degree)
    assert (graph.labels[target] == graph.labels[graph.indices]).mean() > 0.6


@pytest.mark.parametrize("name", ["synthetic:10", "synthetic:10:x", "synthetic:10:20:3:4"])
def test_other_forms_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="must be synthetic:NODES:EDGES"):
        load_graph(name)


def test_more_classes_than_nodes_are_refused() -> None:
    with pytest.raises(UserError, match="must have at least 2 classes"):
        load_graph("synthetic:3:4:5")
