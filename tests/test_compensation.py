"""Historical rows that move along with fresh ones: what is read, and where gradients go."""

from typing import Any

import drawn
import pytest
import torch
from by_hand import ByHand, Epoch, exact, strata_of
from drawn import graph_of, woven
from one_process import gradients_of, losses, pipeline, settings, striped, tables_of, weights_of
from torch import Tensor

from gnnpipe.chunk import ChunkedGraph
from gnnpipe.config import load_config
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from gnnpipe.kernels import RowBlock, cpu, stale_shares
from gnnpipe.kernels.strata import prepare_collect, prepare_move, prepare_pay, prepare_sum
from gnnpipe.order import chunk_order
from gnnpipe.runs import PipelineRun
from gnnpipe.strata import strata_in
from gnnpipe.strata import strata_of as strata_of_way
from gnnpipe.way import way_graph


def ring(num_nodes: int = 12) -> Graph:
    """Every node has two readers, and the normalised rows and columns sum to one."""
    return graph_of(
        num_nodes,
        [(i, (i + step) % num_nodes) for i in range(num_nodes) for step in (1, num_nodes - 1)],
    )


@pytest.mark.parametrize("limit", [16, 1])
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("name", ["gcn", "gat", "gcnii"])
def test_epochs_equal_autograd_of_the_compensated_forward(
    name: str, factor: float, limit: int
) -> None:
    graph = woven(is_directed=True, is_weighted=name != "gat")
    config = settings(name, cross_chunk_gradient=factor, dropout=0.3, strata=limit)
    chunk_id = striped(graph, 4)
    run = pipeline(graph, config, chunk_id)
    weights = {key: weight.requires_grad_() for key, weight in weights_of(run).items()}
    hand = ByHand(graph, name, num_layers=config.model.num_layers)
    hand.logits(weights, {}, exact(chunk_id))
    adam = torch.optim.Adam(weights.values(), lr=0.01, weight_decay=5e-4, foreach=False)
    expected, strata = [], strata_of(graph, limit)
    assert len(set(strata)) > 1 or limit == 1
    for number in range(1, 7):
        order = chunk_order(config.seed, number, 4, kind="shuffled")
        epoch = Epoch(chunk_id, order, factor, (config.seed, number), 0.3, strata)
        loss = hand.loss(weights, dict(hand.tables), epoch)
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        expected.append(float(loss.detach()))
    assert losses(run, 6) == pytest.approx(expected, rel=0, abs=1e-10)
    for key, weight in weights_of(run).items():
        torch.testing.assert_close(weight, weights[key].detach(), rtol=0, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["gcn", "gat"])
def test_drift_that_all_rows_share_leaves_nothing_to_read_wrong(name: str) -> None:
    graph, found = woven(), {}
    for strata, chunks in ((16, 4), (0, 4), (0, 1)):
        config = settings(name, num_layers=1, dropout=0.0, strata=strata)
        run = pipeline(graph, config, striped(graph, chunks))
        (table,) = tables_of(run).values()
        table.values -= torch.linspace(-1.0, 1.0, table.values.shape[1])
        table.recount()
        found[strata, chunks] = run.train_epoch(1)
    assert found[16, 4] == pytest.approx(found[0, 1], rel=0, abs=1e-12)
    assert abs(found[0, 4] - found[0, 1]) > 1e-3


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]])
def test_nothing_of_a_gradients_sum_is_lost_however_often_paths_cross(order: list[int]) -> None:
    """All ReLUs are open and histories exact, so all that can differ is who a gradient reaches."""

    def biases(strata: int, chunks: int) -> dict[str, Tensor]:
        changes: dict[str, Any] = {"dropout": 0.0, "cross_chunk_gradient": 1.0, "strata": strata}
        run = pipeline(graph, settings("gcn", **changes), striped(graph, chunks))
        open_all(run)
        run.warm_start()
        run.engine.train_step(1, order[:chunks] if chunks > 1 else [0])
        return {key: grad for key, grad in gradients_of(run).items() if key.endswith("bias")}

    graph = ring()
    wanted, found, lost = biases(0, 1), biases(16, 4), biases(0, 4)
    assert len(wanted) == 5
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-12, msg=key)
    assert (lost["layers.0.lin.bias"] - wanted["layers.0.lin.bias"]).abs().max() > 1e-3


@torch.no_grad()
def open_all(run: PipelineRun) -> None:
    """Makes every ReLU the identity."""
    for stage in run.engine.stages.values():
        for local in stage.layers[:-1]:
            for key, parameter in local.layer.named_parameters():
                if key.endswith("bias"):
                    parameter.fill_(50.0)


def test_one_chunk_reads_nothing_historical_and_zero_strata_move_nothing() -> None:
    graph = woven()
    moved = pipeline(graph, settings(), striped(graph, 2))
    assert all(table.compensation is not None for table in tables_of(moved).values())
    whole = pipeline(graph, settings())
    plain = pipeline(graph, settings(strata=0), striped(graph, 2))
    for run in (whole, plain):
        assert all(table.compensation is None for table in tables_of(run).values())


def test_a_negative_number_of_strata_is_refused() -> None:
    with pytest.raises(UserError, match=r"`history.strata` \(=-1\) must be at least 0"):
        load_config(None, ["history.strata=-1"])


# --- strata


def strata(chunked: ChunkedGraph, limit: int) -> tuple[list[int], list[list[int]]]:
    way = way_graph(chunked, way=0, num_ways=1)
    found = strata_of_way(chunked, way, limit=limit, like=torch.empty(0))
    by_node = torch.empty(chunked.num_nodes, dtype=torch.int32)
    by_node[torch.from_numpy(chunked.node_id).long()] = found.stratum
    return by_node.tolist(), found.counts.int().tolist()


def test_strata_are_orders_of_magnitude_of_out_degrees() -> None:
    # Node i is read by i others, up to 4; nodes 5 to 7 by none.
    edges = [(node, (node + 1 + k) % 8) for node in range(5) for k in range(node)]
    graph, chunk_id = graph_of(8, edges), [0, 0, 0, 0, 1, 1, 1, 1]
    chunked = drawn.cut(graph, chunk_id)
    assert strata(chunked, 16) == ([0, 0, 1, 1, 2, 0, 0, 0], [[2, 2, 0], [3, 0, 1]])
    assert strata(chunked, 2) == ([0, 0, 1, 1, 1, 0, 0, 0], [[2, 2], [3, 1]])
    assert strata(chunked, 1) == ([0] * 8, [[4], [4]])
    assert strata_of(graph) == [0, 0, 1, 1, 2, 0, 0, 0]
    assert strata_in(graph) == 3
    assert not woven().is_directed
    assert strata_in(woven()) == 1 + max(strata_of(woven()))


# --- kernels


@pytest.fixture
def arrays() -> dict[str, Tensor]:
    """500 rows of 7 numbers in 4 strata, most shares zero."""
    torch.manual_seed(5)
    shares = torch.rand(500, 4) * (torch.rand(500, 4) < 0.4)
    stratum = torch.randint(4, (500,)).int()
    found = {"rows": torch.randn(500, 7), "shares": shares, "stratum": stratum}
    for name in ("fresh", "known", "drift", "part", "owed"):
        found[name] = torch.randn(4, 7)
    return found | {"means": torch.rand(4, 4)}


def results(arrays: dict[str, Tensor]) -> list[Tensor]:
    """All that the kernels make of some arrays."""
    a = {name: array.clone() for name, array in arrays.items()}
    summed, collected, moved, paid = (a[name].clone() for name in ("part", "part", "rows", "rows"))
    prepare_sum(a["rows"], a["stratum"], out=summed)()
    prepare_collect(a["shares"], out=collected)(a["rows"])
    move = prepare_move(a["fresh"], a["known"], a["drift"], means=a["means"], shares=a["shares"])
    pay = prepare_pay(a["part"], a["owed"], means=a["means"], stratum=a["stratum"], factor=0.5)
    for call, out in ((move, moved), (pay, paid)):
        call(out)
        call(out)  # What was kept counts in the next one.
    return [summed, collected, moved, paid, a["known"], a["drift"], a["owed"]]


def test_kernels_do_what_plain_torch_does(
    arrays: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = results(arrays)
    monkeypatch.setattr(cpu, "owns", lambda _: False)
    for own, plain in zip(found, results(arrays), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)
    members = torch.nn.functional.one_hot(arrays["stratum"].long(), 4).float()
    torch.testing.assert_close(found[0], members.t() @ arrays["rows"], rtol=1e-5, atol=1e-5)
    drift = arrays["drift"] + arrays["fresh"] - arrays["known"]
    moved = arrays["rows"] + 2 * arrays["shares"] @ arrays["means"] @ drift
    torch.testing.assert_close(found[2], moved, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("two_threads")
def test_two_threads_make_the_same_bits(
    arrays: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = results(arrays)
    monkeypatch.setattr(cpu, "PARALLEL_MIN_WORK", 1)
    assert all(torch.equal(a, b) for a, b in zip(one, results(arrays), strict=True))


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_shares_are_what_rows_read_of_each_stratum(backend: str, is_scaled: bool) -> None:
    indptr, indices = torch.tensor([0, 0, 3, 5]), torch.tensor([0, 1, 4, 2, 2]).int()
    scales = {"row_scale": torch.tensor([9.0, 2.0, 1.0]), "col_scale": torch.arange(5.0)}
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) if is_scaled else None
    if not is_scaled:
        scales = {}
    block = RowBlock(indptr, indices, weight=weight, backend=backend, **scales)
    stale = torch.tensor([0, 1, 1, -1, 0]).int()
    found = stale_shares(block, stale, out=torch.empty(3, 2))
    wanted = [[0, 0], [24, 4], [0, 18]] if is_scaled else [[0, 0], [2, 1], [0, 2]]
    assert found.tolist() == wanted
