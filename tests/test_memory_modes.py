"""`memory.mode`: what backwards need is kept, made again or moved away, and no number changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from drawn import graph_of, woven
from one_process import (
    MODELS,
    gradients_of,
    losses,
    pipeline,
    settings,
    striped,
    tables_of,
    weights_of,
)
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gnnpipe.config import load_config
from gnnpipe.errors import UserError
from gnnpipe.models.foreign import adapt
from gnnpipe.record import Offload, Recipe
from gnnpipe.runs import PipelineRun
from gnnpipe.stage import Stage

EPOCHS = 3


def trained(name: str, num_chunks: int, **changes: Any) -> tuple[list[float], dict[str, Tensor]]:
    graph = woven(is_directed=True)
    run = pipeline(graph, settings(name, **changes), striped(graph, num_chunks))
    return losses(run, EPOCHS), weights_of(run)


def check_equal(name: str, num_chunks: int, **changes: Any) -> None:
    kept, again = (
        trained(name, num_chunks, mode=mode, **changes) for mode in ("keep", "recompute")
    )
    assert kept[0] == again[0]
    assert all(torch.equal(weight, again[1][key]) for key, weight in kept[1].items())


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("name", [*MODELS, "appnp", "revgnn", "jknet", "transformer"])
def test_recomputing_changes_no_bit(name: str, num_chunks: int) -> None:
    check_equal(name, num_chunks, dtype="float32")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"dropout": 0.0}, id="without dropout"),
        pytest.param({"period": 2, "steps_per_epoch": 2}, id="period and steps"),
        pytest.param({"keeps_dropout": False, "predict": "linear"}, id="recalled histories"),
        pytest.param({"virtual_stages": 2}, id="two stages"),
        pytest.param({"late_gradient": 0.5}, id="late gradients"),
    ],
)
@pytest.mark.parametrize("name", ["sage", "gcnii"])
def test_recomputing_changes_no_bit_whatever_is_set(name: str, changes: dict[str, Any]) -> None:
    check_equal(name, 4, **changes)


def test_measuring_staleness_does_not_disturb_a_recomputation() -> None:
    graph = woven()
    found = []
    for mode in ("keep", "recompute"):
        run = pipeline(graph, settings("sage", mode=mode), striped(graph, 4))
        loss = [run.train_epoch(epoch, is_measured=True) for epoch in (1, 2)]
        found.append((loss, run.staleness()))
    assert found[0] == found[1]


def test_modules_that_draw_from_torch_draw_the_same_again() -> None:
    graph = woven()
    found = []
    for mode in ("keep", "recompute"):
        torch.manual_seed(5)
        modules = [nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.3)]
        layers = adapt([*modules, nn.Linear(8, 3)], in_channels=5)
        layers = [layer.double() for layer in layers]
        run = pipeline(graph, settings("gcn", mode=mode), striped(graph, 3), layers=layers)
        found.append((losses(run, EPOCHS), weights_of(run)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(weight, found[1][1][key]) for key, weight in found[0][1].items())


# --- how much is held


@contextmanager
def counting_saved() -> Iterator[Callable[[], int]]:
    """Bytes of distinct memory that autograd has saved and not let go."""
    held: dict[int, tuple[int, int]] = {}

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # itself it would hold the graph that holds it
            storage = tensor.untyped_storage()
            held[id(self)] = storage.data_ptr(), storage.nbytes()

        def __del__(self) -> None:
            held.pop(id(self), None)

    with saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        yield lambda: sum(dict(held.values()).values())


@pytest.mark.parametrize("name", ["gat", "resgcn+", "transformer"])
def test_recomputing_keeps_no_graph_between_forward_and_backward(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = woven(400)
    found: dict[str, int] = {}
    original = Stage.backward
    for mode in ("keep", "recompute"):
        run = pipeline(graph, settings(name, mode=mode, num_layers=6), striped(graph, 4))
        with counting_saved() as saved:

            def backward(stage: Stage, *arguments: Any, mode: str = mode, **options: Any) -> Any:
                found.setdefault(mode, saved())
                return original(stage, *arguments, **options)

            monkeypatch.setattr(Stage, "backward", backward)
            run.train_epoch(1)
    assert found["recompute"] == 0 < found["keep"]


def records_after_forward(run: PipelineRun, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    original = Stage.backward

    def backward(stage: Stage, *arguments: Any, **options: Any) -> Any:
        if not found:
            found.extend(each for records in stage._records.values() for each in records)
        return original(stage, *arguments, **options)

    monkeypatch.setattr(Stage, "backward", backward)
    run.train_epoch(1)
    return found


def test_what_lies_in_the_table_is_not_kept_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = woven()
    run = pipeline(graph, settings("gin", mode="recompute"), striped(graph, 4))
    recipes = records_after_forward(run, monkeypatch)
    assert all(isinstance(recipe, Recipe) for recipe in recipes)
    is_kept = [recipe.x is not None for recipe in recipes]
    # The input layer's features, nothing of three convolutions, the output layer's rows.
    assert is_kept == 4 * [True, False, False, False, True]


def test_gradients_share_one_table_where_no_chunk_reads_another() -> None:
    graph = woven()
    one = 24 * 8 * 8  # nodes x channels x bytes
    for name in ("sage", "gat"):
        alone = pipeline(graph, settings(name, mode="recompute"))
        assert len({table.gradients.data_ptr() for table in tables_of(alone).values()}) == 1
        assert alone.table_bytes == 3 * one + one
        cut = pipeline(graph, settings(name, mode="recompute"), striped(graph, 4))
        assert cut.table_bytes == pipeline(graph, settings(name), striped(graph, 4)).table_bytes


def test_chunks_without_edges_between_them_are_closed_too() -> None:
    graph = graph_of(6, [(0, 1), (1, 0), (3, 4), (4, 3)], features=np.ones((6, 2), np.float32))
    found = []
    for mode in ("keep", "recompute"):
        run = pipeline(graph, settings("gcnii", mode=mode, strata=0), [0, 0, 0, 1, 1, 1])
        found.append(losses(run, EPOCHS))
    assert run.table_bytes == 4 * 6 * 8 * 8
    assert found[0] == found[1]


# --- offload


def test_offload_moves_what_is_saved_and_nothing_that_stays_anyway() -> None:
    table = torch.rand(6, 4)
    weight = torch.rand(4, 3, requires_grad=True)
    expected = torch.autograd.grad((table @ weight).sigmoid().square().sum(), weight)[0]
    hooks = Offload([table, weight], pins=False)
    with hooks:
        out = (table @ weight).sigmoid().square().sum()
    assert hooks.pack_hook(table[2:])[0] is None
    device, host = hooks.pack_hook(table.exp())
    assert device == host.device == torch.device("cpu")
    (gradient,) = torch.autograd.grad(out, weight)
    assert torch.equal(gradient, expected)


def test_a_stage_that_offloads_computes_the_same() -> None:
    graph = woven()
    found = []
    for mode in ("keep", "offload"):
        run = pipeline(graph, settings("gat"), striped(graph, 3))
        for stage in run.engine.stages.values():
            stage._mode = mode  # as on a GPU: a CPU refuses it
        found.append((losses(run, EPOCHS), gradients_of(run)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(grad, found[1][1][key]) for key, grad in found[0][1].items())


def test_a_cpu_has_nowhere_to_move_activations_to() -> None:
    with pytest.raises(UserError, match=r"`memory.mode` \(=offload\) must be keep or recompute"):
        load_config(None, ["device=cpu", "memory.mode=offload"])
    with pytest.raises(UserError, match="take recompute"):
        pipeline(woven(), settings("gcn", mode="offload"))
