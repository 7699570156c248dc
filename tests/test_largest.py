"""The maximum over neighbours: kernel, gradient of the one that won, histories, ways."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from combinations import largest_difference, reference_run, save_partition, train_all, write_npz
from drawn import graph_of, woven
from one_process import gradients_of, losses, pipeline, reference, settings, striped, weights_of
from process_pool import ProcessPool

from gnnpipe.config import load_config
from gnnpipe.errors import UserError
from gnnpipe.kernels import EdgeOrder, largest

EDGES = torch.tensor([[3, 1, 0, 4, 2, 1, 1], [0, 0, 0, 1, 1, 3, 3]])
"""Target 2 has no edge, target 3 the same edge twice."""
NODE_ID = torch.tensor([8, 2, 5, 1, 9])


def order(backend: str) -> EdgeOrder:
    return EdgeOrder(EDGES, num_sources=5, num_targets=4, backend=backend)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_source_of_each_column_wins(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor(
        [[7.0, -3.0], [7.0, -1.0], [0.0, -0.5], [7.0, -2.0], [0.0, -9.0]], dtype=dtype
    ).requires_grad_()
    out = largest(x, order=order(backend), source_id=NODE_ID[EDGES[0]])
    assert out.tolist() == [[7.0, -1.0], [0.0, -0.5], [0.0, 0.0], [7.0, -1.0]]
    grad = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]], dtype=dtype)
    (found,) = torch.autograd.grad(out, x, grad)
    # Sources 0, 1 and 3 are equal in target 0: node 1 is source 3. Of 4 and 2, node 5 is source 2.
    assert found.tolist() == [[0, 0], [4.0, 50.0], [2.0, 20.0], [1.0, 0], [0, 0]]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_kernel_and_torch_agree(num_threads: int) -> None:
    generator = torch.Generator().manual_seed(2)
    edges = torch.randint(40, (2, 9000), generator=generator)
    edges = edges[:, edges[1].sort().indices]
    # Few values, so that most maxima are shared.
    x = torch.randint(4, (40, 9), generator=generator).float().requires_grad_()
    node_id = torch.randperm(40, generator=generator)[edges[0]]
    grad = torch.randn(40, 9, generator=generator)
    found = []
    for backend in ("numba", "torch"):
        sizes = {"num_sources": 40, "num_targets": 40}
        out = largest(x, order=EdgeOrder(edges, **sizes, backend=backend), source_id=node_id)
        found.append((out, *torch.autograd.grad(out, x, grad)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_one_chunk_is_the_plain_loop(backend: str) -> None:
    graph = woven(is_directed=True)
    config = settings("sage", aggregator="max", backend=backend)
    expected = losses(reference(graph, config), 5)
    assert losses(pipeline(graph, config), 5) == pytest.approx(expected, abs=1e-9)
    mean = settings("sage", backend=backend)
    assert losses(pipeline(graph, mean), 1) != pytest.approx(expected[:1], abs=1e-3)


@pytest.mark.parametrize("changes", [{"virtual_stages": 2}, {"mode": "recompute"}])
def test_stages_and_recomputation_change_no_bit(changes: dict[str, Any]) -> None:
    graph = woven(is_directed=True)
    found = []
    for change in ({}, changes):
        config = settings("sage", aggregator="max", **change)
        run = pipeline(graph, config, striped(graph, 4))
        found.append((losses(run, 3), weights_of(run)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(weight, found[1][1][key]) for key, weight in found[0][1].items())


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_a_historical_winner_keeps_the_gradient_and_a_fresh_one_gets_it_times_the_factor(
    factor: float,
) -> None:
    """0 -> 1: one node a chunk. Only node 1 is in a loss."""
    features = np.array([[1.0, 2.0], [3.0, 1.0]], np.float32)
    masks = {name: np.array([False, True]) for name in ("train_mask", "val_mask", "test_mask")}
    graph = graph_of(2, [(0, 1)], features=features, **masks)
    changes: dict[str, Any] = {"num_layers": 1, "cross_chunk_gradient": factor, "strata": 0}
    changes["dropout"] = 0.0
    found = {}
    for name, orders in {"fresh": [0, 1], "historical": [1, 0]}.items():
        run = pipeline(graph, settings("sage", aggregator="max", **changes), [0, 1])
        run.engine.train_step(1, orders)
        found[name] = gradients_of(run)["layers.0.lin.weight"]
    exact = pipeline(graph, settings("sage", aggregator="max", **changes))
    exact.engine.train_step(1, [0])
    whole = gradients_of(exact)["layers.0.lin.weight"]
    own, crossing = found["historical"], whole - found["historical"]
    assert crossing.abs().max() > 1e-6
    torch.testing.assert_close(found["fresh"], own + factor * crossing)


def test_what_needs_a_sum_is_refused() -> None:
    config = settings("sage", aggregator="max", late_gradient=0.5)
    with pytest.raises(UserError, match=r"`history.late_gradient` \(=0.5\) must be 0 for SAGE"):
        pipeline(woven(), config)
    with pytest.raises(UserError, match=r"`model.aggregator` \(=max\) is an option of sage"):
        load_config(None, ["model.name=gcn", "model.aggregator=max"])


@pytest.mark.timeout(250)
def test_ways_stages_and_the_reference_agree(pool: ProcessPool, tmp_path: Path) -> None:
    edges = [(i, (i + step) % 20) for i in range(20) for step in (1, 7)]
    graph = write_npz(tmp_path / "ring.npz", edges, num_nodes=20)
    save_partition(graph, tmp_path / "cut", num_chunks=3, num_ways=2, method="random")
    save_partition(graph, tmp_path / "one", num_chunks=1, num_ways=2, method="random")
    table = {}
    for name, chunks, stages, ways in (
        ("cut-11", 3, 1, 1), ("cut-12", 3, 1, 2), ("cut-22", 3, 2, 2), ("one-12", 1, 1, 2)
    ):  # fmt: skip
        table[name] = [
            f"data.name={tmp_path}/ring.npz",
            f"partition.path={tmp_path / name.split('-')[0]}",
            f"partition.num_chunks={chunks}",
            "model.name=sage",
            "model.aggregator=max",
            "model.num_layers=4",
            "model.hidden_channels=8",
            "model.dtype=float64",
            f"parallel.num_stages={stages}",
            f"parallel.num_ways={ways}",
            "training.epochs=5",
        ]
    results = train_all(pool, tmp_path, table)
    for name in ("cut-12", "cut-22"):
        assert largest_difference(results["cut-11"], results[name]) < 1e-9, name
    expected = reference_run(table["one-12"])
    assert largest_difference(results["one-12"], expected) < 1e-9
