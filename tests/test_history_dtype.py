"""Tables in half the width: what is rounded, what is not, and what stays bit for bit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drawn import woven
from one_process import losses, pipeline, settings, striped, tables_of, weights_of
from torch import Tensor

from gnnpipe import stage
from gnnpipe.config import load_config
from gnnpipe.errors import UserError
from gnnpipe.kernels import RowBlock, aggregate
from gnnpipe.record import TableRows
from gnnpipe.runs import PipelineRun
from gnnpipe.view import View

HALF = {"history_dtype": "bfloat16", "dtype": "float32"}


def run_of(name: str, num_chunks: int = 4, **changes: Any) -> PipelineRun:
    graph = woven(is_directed=True)
    config = settings(name, **{**HALF, **changes})
    return pipeline(graph, config, striped(graph, num_chunks))


@pytest.mark.parametrize("channels", [1, 37, 128, 200])
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_a_half_table_are_those_over_its_numbers(
    dtype: torch.dtype, channels: int, is_scaled: bool
) -> None:
    generator = torch.Generator().manual_seed(channels)
    table = torch.randn(9, channels, generator=generator).to(dtype)
    indices = torch.randint(9, (40,), generator=generator).int()
    scales = torch.rand(4, generator=generator), torch.rand(9, generator=generator)
    row_scale, col_scale = scales if is_scaled else (None, None)
    indptr = torch.tensor([0, 0, 3, 30, 40])
    block = RowBlock(indptr, indices, row_scale=row_scale, col_scale=col_scale)
    found = aggregate(block, table)
    assert found.dtype == torch.float32
    assert torch.equal(found, aggregate(block, table.float()))


@pytest.mark.parametrize("name", ["gcn", "gat"])
@pytest.mark.parametrize(("dtype", "rel"), [("bfloat16", 3e-2), ("float16", 3e-3)])
def test_rounding_moves_the_losses_a_little(name: str, dtype: str, rel: float) -> None:
    rounded = losses(run_of(name, history_dtype=dtype), 3)
    exact = losses(run_of(name, history_dtype=None), 3)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=rel)


def test_float16_is_bit_equal_over_stages_and_modes_too() -> None:
    plain, cut, again = (
        together(name="sage", history_dtype="float16", **changes)
        for changes in ({}, {"virtual_stages": 3}, {"mode": "recompute"})
    )
    assert plain[0] == cut[0] == again[0]


def test_values_take_half_and_gradients_what_they_took() -> None:
    tables = tables_of(run_of("gcn", strata=0))
    assert {table.values.dtype for table in tables.values()} == {torch.bfloat16}
    assert {table.gradients.dtype for table in tables.values()} == {torch.float32}
    assert [table.num_bytes for table in tables.values()] == [24 * 8 * (2 + 4)] * 3


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["sage", "gin"])
def test_a_layer_that_reads_its_own_row_beside_the_sum_reads_it_rounded(
    name: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(name, dropout=dropout, norm="layer")  # by hand nobody calls convolve
    found: list[Tensor] = []
    layer = next(local for stage in run.engine.stages.values() for local in stage.layers[1:])
    original = layer.layer.convolve

    def convolve(x: Tensor, graph: Any) -> Tensor:
        found.append(x.detach().clone())
        return original(x, graph)  # type: ignore

    monkeypatch.setattr(layer.layer, "convolve", convolve)
    run.train_epoch(1)
    assert found
    assert all(torch.equal(x, x.bfloat16().float()) for x in found)


def together(**changes: Any) -> tuple[list[float], dict[str, Tensor]]:
    run = run_of(**changes)
    return losses(run, 3), weights_of(run)


@pytest.mark.parametrize("name", ["sage", "gcnii", "gat", "resgcn+"])
@pytest.mark.parametrize(
    "changes",
    [{"mode": "recompute"}, {"mode": "recompute", "dropout": 0.0}, {"virtual_stages": 3}],
    ids=["recompute", "recompute without dropout", "three stages"],
)
def test_stages_and_memory_modes_change_no_bit(name: str, changes: dict[str, Any]) -> None:
    plain = together(name=name, **{k: v for k, v in changes.items() if k == "dropout"})
    other = together(name=name, **changes)
    assert plain[0] == other[0]
    assert all(torch.equal(weight, other[1][key]) for key, weight in plain[1].items())


def test_rows_that_the_table_holds_are_not_saved_beside_it() -> None:
    x = torch.rand(6, 4).bfloat16().float()
    values, weight = x.bfloat16(), torch.rand(4, 3, requires_grad=True)
    view = SimpleNamespace(in_table=x)
    with TableRows(view, values):  # type: ignore[arg-type]
        out = (x @ weight).sum()
    values.zero_()
    out.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def test_no_view_outlives_its_layer_with_rows_that_the_table_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    views: list[View] = []

    class Watched(View):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            views.append(self)

    monkeypatch.setattr(stage, "View", Watched)
    run = run_of("gin")
    run.train_epoch(1)
    assert views
    assert all(view.in_table is None for view in views)


REFUSED = {
    "model.dtype=float64": r"goes with `model.dtype` float32 only, not with float64",
    "parallel.num_ways=2": r"goes with `parallel.num_ways` 1 only, not with 2",
    "history.momentum=0.5": r"without it only, not with what is kept besides the tables",
}


@pytest.mark.parametrize(("option", "message"), REFUSED.items())
def test_what_rounding_does_not_go_with_is_refused(option: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"`history.dtype` \(=bfloat16\) .*{message}"):
        load_config(None, ["history.dtype=bfloat16", option])
