"""The closed formula of memory against what tensors really hold."""

import gc
from collections.abc import Iterator
from typing import Any

import drawn
import pytest
import torch
from by_hand import strata_of
from drawn import woven
from one_process import layers_of, pipeline, settings, striped
from torch import Tensor

from gnnpipe.cell import WHOLE
from gnnpipe.history import Table
from gnnpipe.memory import (
    PLAIN,
    FeatureCounts,
    MemoryBytes,
    Storage,
    WayCounts,
    predict_memory_bytes,
)
from gnnpipe.room import rank_bytes
from gnnpipe.runs import PipelineRun
from gnnpipe.stage import Flow, Stage

NUM_CHUNKS = 4
NUM_NODES = 400
AGGREGATING = ["gcn", "sage", "gin", "gcnii", "resgcn+"]


@pytest.fixture(autouse=True)
def own_objects() -> Iterator[None]:
    """Lets :func:`live_bytes` look at a test's own objects alone: those before are many."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def built(name: str, **changes: Any) -> PipelineRun:
    graph = woven(NUM_NODES)
    config = settings(name, hidden_channels=64, num_layers=6, dtype="float32", **changes)
    return pipeline(graph, config, striped(graph, NUM_CHUNKS))


def predicted(run: PipelineRun, *, period: int = 1, storage: Storage = PLAIN) -> MemoryBytes:
    sizes = (NUM_NODES, 0, 0, 6 * NUM_NODES)
    return predict_memory_bytes(
        [local.layer for local in layers_of(run)],
        is_first=True,
        num_cuts=0,
        way=WayCounts(
            *sizes,
            is_symmetric=True,
            largest_chunk=NUM_NODES // NUM_CHUNKS,
            num_strata=1 + max(strata_of(woven(NUM_NODES))),
        ),
        features=FeatureCounts(5, None),
        num_chunks=NUM_CHUNKS,
        storage=storage._replace(period=period, strata=16),
    )


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["sage", "gat", "revgnn"])
def test_tables_of_layers_that_run_again_are_predicted(name: str, dtype: str | None) -> None:
    graph = woven(NUM_NODES)
    config = settings(
        name,
        hidden_channels=64,
        num_layers=6,
        dtype="float32",
        mode="recompute",
        history_dtype=dtype,
    )
    for chunk_id in ([0] * NUM_NODES, striped(graph, NUM_CHUNKS)):
        run = pipeline(graph, config, chunk_id)
        chunked = drawn.cut(graph, chunk_id)
        (memory,) = rank_bytes(config, chunked, [local.layer for local in layers_of(run)])
        assert memory.tables == run.table_bytes


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gcnii", {"late_gradient": 0.5}),
        ("gcnii", {"late_gradient": None}),
        ("gat", {"late_gradient": None}),  # It gathers, so it has none.
        ("gcnii", {"keeps_dropout": False, "period": 3}),
        ("gcnii", {"history_momentum": 0.5}),
        ("gcnii", {"keeps_dropout": False, "predict": "linear", "late_gradient": 1.0}),
    ],
)
def test_tables_that_remember_more_are_predicted(name: str, changes: dict[str, Any]) -> None:
    graph = woven(NUM_NODES)
    config = settings(name, hidden_channels=64, dtype="float32", **changes)
    for chunk_id in ([0] * NUM_NODES, striped(graph, NUM_CHUNKS)):
        run = pipeline(graph, config, chunk_id)
        chunked = drawn.cut(graph, chunk_id)
        (memory,) = rank_bytes(config, chunked, [local.layer for local in layers_of(run)])
        assert memory.tables == run.table_bytes


def test_what_runs_again_is_no_activation_but_works_one_chunk_at_a_time() -> None:
    run = built("gat")
    kept, again = (
        predicted(run, storage=PLAIN._replace(mode=mode)) for mode in ("keep", "recompute")
    )
    assert again.activations < 0.6 * kept.activations
    assert again.tables == kept.tables
    (away,) = {predicted(run, storage=PLAIN._replace(mode="offload")).activations}
    assert away == 0


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("name", [*AGGREGATING, "gat"])
def test_tables_are_predicted(name: str, period: int) -> None:
    run = built(name, period=period)
    assert predicted(run, period=period).tables == pytest.approx(run.table_bytes, rel=0.02)


@pytest.mark.parametrize("name", [*AGGREGATING, "gat"])
def test_activations_are_never_more_than_predicted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(name)
    found: list[int] = []

    def backward(stage: Stage, *arguments: Any, **options: Any) -> Flow:
        if not found:  # The forward of all chunks has run, no backward has.
            found.append(live_bytes() - before)
        return original(stage, *arguments, **options)

    original = Stage.backward
    monkeypatch.setattr(Stage, "backward", backward)
    before = live_bytes()
    run.train_epoch(1)
    # Besides, two buffers that all layers share, and what a step makes of the weights.
    shared = 2 * NUM_NODES // NUM_CHUNKS * 64
    shared += sum(local.layer.step_numbers for local in layers_of(run))
    assert 0 < found[0] < 1.1 * predicted(run).activations + 4 * shared


@pytest.mark.parametrize("name", [*AGGREGATING, "gat"])
def test_exact_gradients_take_no_more_than_predicted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(name, correct_every=2)
    plain, storage = predicted(run), PLAIN._replace(is_corrected=True)
    memory, found = predicted(run, storage=storage), []
    assert memory.total > plain.total

    def backward(stage: Stage, chunk_index: int, *arguments: Any, **options: Any) -> Flow:
        if chunk_index == WHOLE:
            found.append(live_bytes() - before)
        return original(stage, chunk_index, *arguments, **options)

    original = Stage.backward
    monkeypatch.setattr(Stage, "backward", backward)
    run.train_epoch(1)
    before = live_bytes()
    run.train_epoch(2)
    assert 0 < found[0] < memory.activations + memory.working + memory.parameters


@pytest.mark.parametrize("name", AGGREGATING)
def test_backward_holds_the_gradients_of_one_layer_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(name)
    found: list[int] = []

    def backward(stage: Stage, chunk_index: int, gradient: Flow, **options: Any) -> Flow:
        start = live_bytes()

        def layer_done(_index: int) -> None:
            found.append(live_bytes() - start)

        return original(stage, chunk_index, gradient, layer_done=layer_done)

    original = Stage.backward
    monkeypatch.setattr(Stage, "backward", backward)
    run.train_epoch(1)
    rows_bytes = NUM_NODES // NUM_CHUNKS * 64 * 4
    weights_bytes = sum(
        4 * p.numel() for local in layers_of(run) for p in local.layer.parameters()
    )
    assert max(found) < 3.5 * rows_bytes + weights_bytes  # The weights' gradients are new once.


def test_inference_needs_no_table_of_its_own_where_the_gradients_are_as_long() -> None:
    trained = Table(5, 5, 3, like=torch.empty(0), period=1)
    borrowed = trained.for_inference(3)
    assert borrowed.values.data_ptr() == trained.gradients.data_ptr()
    assert borrowed.values.shape == trained.values.shape
    short = Table(5, 4, 3, like=torch.empty(0), period=1)
    assert short.for_inference(3).values.data_ptr() != short.gradients.data_ptr()


def live_bytes() -> int:
    """Bytes of all storages that some tensor of this test holds."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_features_and_messages_are_held_where_they_are_needed() -> None:
    run = built("gcn")
    layers = [local.layer for local in layers_of(run)]
    way = WayCounts(100, 20, 10, 500, is_symmetric=False, largest_chunk=30)

    def of(*, is_first: bool, num_cuts: int, entries: int | None) -> MemoryBytes:
        return predict_memory_bytes(
            layers,
            is_first=is_first,
            num_cuts=num_cuts,
            way=way,
            features=FeatureCounts(1000, entries),
            num_chunks=4,
            storage=PLAIN,
        )

    alone = of(is_first=True, num_cuts=0, entries=None)
    assert alone.features == 100 * 1000 * 4  # the rows of the file, or their copy
    assert alone.messages == 0
    assert of(is_first=True, num_cuts=0, entries=300).features < alone.features / 5
    last = of(is_first=False, num_cuts=1, entries=None)
    assert last.features == 0
    assert last.messages == 4 * 30 * 64 * 4 + 100 * 64 * 4  # receives ahead, sent rows
    assert alone.tables == 4 * 6 * 64 * (120 + 110)
    assert alone.total == sum(alone)
