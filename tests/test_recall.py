"""What is remembered from epoch to epoch: without noise, smoothed, predicted, renewed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import cut, woven
from one_process import (
    gradients_of,
    losses,
    one_layer_model,
    pipeline,
    reference,
    settings,
    striped,
    tables_of,
    weights_of,
)
from resuming import losses as losses_in
from resuming import ring_run, train_on, train_until, write_ring

from gnnpipe.assembly import build_engine
from gnnpipe.config import load_config
from gnnpipe.errors import UserError
from gnnpipe.kernels import cpu
from gnnpipe.models.layer import Layer
from gnnpipe.planning import profile_of
from gnnpipe.recall import Keeping, LateGradients, Recall

OPTIONS: dict[str, dict[str, Any]] = {
    "clean": {"keeps_dropout": False},
    "clean, period 3": {"keeps_dropout": False, "period": 3},
    "momentum": {"history_momentum": 0.6},
    "predicted": {"predict": "linear"},
    "renewed": {"max_drift": 0.5},
    "antithetic": {"order": "antithetic"},
    "late": {"late_gradient": 0.7},
    "averaged": {"late_gradient": 0.7, "late_gradient_momentum": 0.6},
    "all": {
        "keeps_dropout": False,
        "history_momentum": 0.2,
        "predict": "linear",
        "max_drift": 0.9,
    },
}


# --- what does not change


@pytest.mark.parametrize("name", OPTIONS)
def test_one_chunk_equals_full_graph_with_every_option(name: str) -> None:
    graph, config = woven(is_directed=True), settings("gcnii", virtual_stages=2, **OPTIONS[name])
    run, plain = pipeline(graph, config), reference(graph, config)
    assert losses(run, 10) == pytest.approx(losses(plain, 10), rel=0, abs=1e-9)


@pytest.mark.parametrize("model", ["gat", "gcnii", "resgcn+"])
@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_are_bit_equal_for_every_cut_with_every_option(name: str, model: str) -> None:
    graph, found = woven(), []
    if name in ("late", "averaged") and model == "gat":
        model = "gcn"  # gat gathers
    for virtual in (1, 2, 5):
        config = settings(model, dtype="float32", virtual_stages=virtual, **OPTIONS[name])
        run = pipeline(graph, config, striped(graph, 4))
        found.append((losses(run, 5), weights_of(run)))
    for other, weights in found[1:]:
        assert other == found[0][0]
        assert all(torch.equal(weights[key], weight) for key, weight in found[0][1].items())


# --- without the noise of dropout


STILL: dict[str, Any] = {"lr": 1e-300, "num_layers": 1, "dropout": 0.5}


def one_dropout(name: str) -> list[Layer]:
    """One convolution with dropout; its input is the same in every epoch."""
    layers = one_layer_model(name)
    layers[1].dropout = 0.5
    return layers


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("name", ["gcn", "sage", "gin", "gcnii", "resgcn+"])
def test_while_weights_stand_still_clean_histories_are_exact(name: str, period: int) -> None:
    # One convolution: what it reads depends on the weights and this epoch's mask alone.
    graph = woven()
    plain = losses(pipeline(graph, settings(name, **STILL), layers=one_dropout(name)), 5)
    for keeps_dropout in (False, True):
        config = settings(name, keeps_dropout=keeps_dropout, period=period, **STILL)
        run = pipeline(graph, config, striped(graph, 4), layers=one_dropout(name))
        found = losses(run, 5)
        if keeps_dropout:
            assert all(abs(a - b) > 1e-6 for a, b in zip(found[1:], plain[1:], strict=True))
        else:
            assert found == pytest.approx(plain, rel=0, abs=1e-12)


def test_drift_without_the_noise_is_what_training_has_changed() -> None:
    graph = woven()
    drift: dict[bool, float] = {}
    for keeps_dropout in (False, True):
        config = settings("gcnii", keeps_dropout=keeps_dropout, **STILL)
        run = pipeline(graph, config, striped(graph, 4), layers=one_dropout("gcnii"))
        losses(run, 2)
        run.train_epoch(3, is_measured=True)
        (value,) = run.staleness()
        assert value is not None
        drift[keeps_dropout] = value
    assert drift[False] == pytest.approx(0.0, abs=1e-12)
    assert drift[True] > 0.5


# --- smoothed and predicted

LIKE = torch.zeros(0, dtype=torch.float64)
ROWS = slice(0, 3)


def recall(**options: Any) -> Recall:
    return Recall(3, 1, like=LIKE, keeping=Keeping(**options), period=1)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def taken(memory: Recall, values: list[torch.Tensor]) -> list[list[float]]:
    """What each epoch reads; ``values`` are its fresh rows."""
    found = []
    for epoch, value in enumerate(values, start=1):
        memory.start_epoch(epoch)
        found.append(memory.rows().flatten().tolist())
        memory.take(slice(0, 1), value[:1])
        memory.take(slice(1, 3), value[1:])
        memory.end_epoch()
        memory.fit(memory.sums)
    return found


def test_momentum_is_a_moving_average() -> None:
    memory = recall(momentum=0.75)
    memory.warm(column(4.0, 8.0, 0.0))
    read = taken(memory, [column(0.0, 0.0, 4.0), column(0.0, 0.0, 4.0), column(9.0, 9.0, 9.0)])
    assert read == [[4.0, 8.0, 0.0], [3.0, 6.0, 1.0], [2.25, 4.5, 1.75]]


def test_a_steady_change_is_predicted() -> None:
    memory = recall(predict=True)
    memory.warm(column(1.0, 2.0, 3.0))
    steady = [column(1.0 + t, 2.0 - t, 3.0 + 2 * t) for t in range(1, 5)]
    read = taken(memory, steady)
    # Two epochs to see a change and that it goes on; then every reading is what will come.
    assert read[2:] == [value.flatten().tolist() for value in steady[2:]]
    assert read[:2] == [[1.0, 2.0, 3.0], [2.0, 1.0, 5.0]]


def test_the_fit_is_least_squares_within_its_bounds() -> None:
    memory = recall(predict=True)
    memory.warm(column(0.0, 0.0, 0.0))
    taken(memory, [column(2.0, 2.0, -4.0), column(3.0, 3.0, -6.0)])
    assert memory.slope == pytest.approx(0.5)
    taken(memory, [column(9.0, 9.0, -9.0)])  # runs ahead of the last change
    assert memory.slope == 1.0
    taken(memory, [column(0.0, 0.0, 0.0)])  # turns back, as noise does
    assert memory.slope == 0.0


# --- renewed


@pytest.mark.parametrize("period", [1, 3])
def test_the_forward_after_too_much_drift_is_exact(period: int) -> None:
    graph = woven()
    found: dict[float | None, list[float]] = {}
    for max_drift in (0.0, 1e9, None):
        config = settings("gcnii", dropout=0.0, max_drift=max_drift, period=period)
        run, plain = pipeline(graph, config, striped(graph, 4)), pipeline(graph, config)
        found[max_drift] = []
        is_exact = []
        for epoch in range(1, 6):
            plain.load_weights(weights_of(run))
            exact = plain.engine.train_step(epoch, [0])
            found[max_drift].append(run.train_epoch(epoch))
            is_exact.append(abs(found[max_drift][-1] - exact) < 1e-12)
        # Nothing has drifted after an exact forward, so every second history is renewed.
        renewed = [True, False, True, False, True]
        assert is_exact == (renewed if max_drift == 0.0 else [True, *[False] * 4])
    assert found[1e9] == found[None]


def test_drift_beyond_the_bound_renews_and_drift_within_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, chunk_id = woven(), striped(woven(), 4)
    measured = pipeline(graph, settings("gcnii"), chunk_id)
    measured.train_epoch(1, is_measured=True)
    drift = max(value for value in measured.staleness() if value is not None)
    for bound, expected in ((drift * 0.99, 1), (drift * 1.01, 0)):
        run = pipeline(graph, settings("gcnii", max_drift=bound), chunk_id)
        calls: list[bool] = []
        monkeypatch.setattr(run.engine, "infer", lambda calls=calls, **_: calls.append(True))
        run.train_epoch(1)
        assert len(calls) == expected


@pytest.mark.parametrize("options", [{}, {"keeps_dropout": False}, {"period": 2}])
def test_every_other_epoch_starts_from_exact_histories(options: dict[str, Any]) -> None:
    graph = woven()
    config = settings("gcnii", dropout=0.0, refresh_every=2, **options)
    run, plain = pipeline(graph, config, striped(graph, 4)), pipeline(graph, config)
    is_exact = []
    for epoch in range(1, 7):
        plain.load_weights(weights_of(run))
        exact = plain.engine.train_step(epoch, [0])
        is_exact.append(abs(run.train_epoch(epoch) - exact) < 1e-12)
    assert is_exact == [True, False] * 3


APART = [False, False, True, False, False]
"""Evaluations after four epochs, and before the third one a forward that refreshes."""


@pytest.mark.parametrize(
    ("options", "num_chunks", "expected"),
    [
        ({}, 4, [False, True, False, True]),
        ({}, 1, [False] * 4),
        ({"norm": "batch"}, 4, APART),
        ({"norm": "graph"}, 4, APART),
        ({"ema_decay": 0.5}, 4, APART),
        ({"history_dtype": "bfloat16", "dtype": "float32"}, 4, APART),
    ],
)
def test_evaluation_refreshes_where_it_is_the_same_forward_and_changes_no_loss(
    options: dict[str, Any], num_chunks: int, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("gcnii", refresh_every=2, **options)
    run, other = (pipeline(woven(), config, striped(woven(), num_chunks)) for _ in range(2))
    infer, inferred = run.engine.infer, []

    def noted(*, into_tables: bool = False) -> torch.Tensor | None:
        inferred.append(into_tables)
        return infer(into_tables=into_tables)

    monkeypatch.setattr(run.engine, "infer", noted)
    for epoch in range(1, 5):
        assert run.train_epoch(epoch) == other.train_epoch(epoch)
        run.evaluate()
    assert inferred == expected


# --- last epoch's gradients


@pytest.mark.parametrize("name", ["gcn", "sage", "gin", "gcnii", "resgcn+"])
def test_while_weights_stand_still_late_gradients_become_exact(name: str) -> None:
    graph = woven(is_directed=True)
    still: dict[str, Any] = {"lr": 1e-300, "dropout": 0.0, "num_layers": 3}
    chunk_id, order = striped(graph, 4), {"cross_chunk_gradient": 1.0}
    exact = pipeline(graph, settings(name, **still))
    exact.train_epoch(1)
    wanted = gradients_of(exact)
    for factor in (1.0, 0.0):
        options: dict[str, Any] = {"late_gradient": factor, **still, **order}
        run = pipeline(graph, settings(name, **options), chunk_id)
        losses(run, 5)
        found = gradients_of(run)
        # The last layer's are exact at once, and each epoch hands them one layer down.
        gaps = [float((found[key] - wanted[key]).abs().max()) for key in wanted]
        assert (max(gaps) < 1e-12) == (factor == 1.0)


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_averaged_late_gradients_are_weighted_means_from_the_first_epoch_on(
    is_on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_on_cpu:  # What another device runs, run by this one.
        monkeypatch.setattr(cpu, "owns", lambda _: False)
    late = LateGradients(3, 2, like=torch.zeros(1).double(), factor=0.5, momentum=0.6)
    seen = [torch.randn(3, 2).double() for _ in range(5)]
    for epoch, gradients in enumerate(seen, start=1):
        late.start_epoch(epoch)
        place = gradients.clone()
        late.prepare_show(place, slice(0, 2))()
        assert torch.equal(late.rows[:2], gradients[:2])
        late.settle(place, slice(0, 2))
        ages = torch.arange(epoch).flip(0).double()
        weights = 0.6**ages
        mean = torch.tensordot(weights / weights.sum(), torch.stack(seen[:epoch]), dims=1)
        torch.testing.assert_close(late.rows[:2], mean[:2] / 2, rtol=0, atol=1e-12)
        assert not late.rows[2].any()  # Its chunk has had no backward.


def test_a_run_averages_its_late_gradients() -> None:
    # Weights, chunks' order and masks stand still, so an epoch's gradient of the last layer does.
    still: dict[str, Any] = {"lr": 1e-300, "dropout": 0.0, "num_layers": 1, "order": "fixed"}
    late: dict[str, Any] = {"late_gradient": 1.0, "late_gradient_momentum": 0.6}
    run = pipeline(woven(), settings("gcn", **late, **still), striped(woven(), 4))
    (table,) = tables_of(run).values()
    assert table.late is not None
    run.train_epoch(1)
    first = table.late.rows.clone()
    assert first.abs().max() > 0
    table.late.rows.zero_()
    run.train_epoch(2)  # A mean of zeros and the same gradient again.
    share = 0.4 / (1.0 - 0.6**2)
    torch.testing.assert_close(table.late.rows, share * first, rtol=0, atol=1e-14)


def test_one_chunk_has_no_late_gradients() -> None:
    run = pipeline(woven(), settings("gcn", late_gradient=1.0))
    assert [table.late for table in tables_of(run).values()] == [None] * 3


def test_the_planner_measures_layers_with_their_late_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans, graph = [], woven()

    def noted(*args: Any, plan: Any, **kwargs: Any) -> Any:
        plans.append(plan)
        return build_engine(*args, plan=plan, **kwargs)

    monkeypatch.setattr("gnnpipe.profiling.build_engine", noted)
    cuts = [cut(graph, striped(graph, 4))]
    profile_of(graph, settings("gcn", late_gradient=0.5), cuts=cuts)
    assert [plan.late_gradient for plan in plans] == [0.5]


def test_late_gradients_are_refused_where_rows_are_gathered_unless_nobody_asked_for_them() -> None:
    with pytest.raises(UserError, match=r"`history.late_gradient` \(=0.5\) must be 0 for GATL"):
        pipeline(woven(), settings("gat", late_gradient=0.5))
    for name, has_late in {"gat": False, "gcnii": True}.items():
        config = settings(name, late_gradient=None)
        assert config.late_gradient == 0.5
        run = pipeline(woven(), config, striped(woven(), 4))
        tables = tables_of(run).values()
        assert [table.late is not None for table in tables] == [has_late] * len(tables)


# --- checkpoints, mistakes


@pytest.mark.parametrize(
    "options",
    [
        ["history.dropout=false", "history.refresh_every=3"],
        ["history.predict=linear", "model.dropout=0", "training.lr=0.1"],
        ["history.correct_every=2"],
    ],
)
def test_what_is_remembered_survives_a_restart(options: list[str], tmp_path: Path) -> None:
    write_ring(tmp_path)
    options = [*options, "history.momentum=0.3", "history.max_drift=1.0"]
    options += ["history.late_gradient=0.5", "history.late_gradient_momentum=0.4"]
    train_on(ring_run(tmp_path, tmp_path / "whole", *options))
    for epoch in (1, 4):
        run = ring_run(tmp_path, tmp_path / str(epoch), *options)
        train_until(run, epoch)
        train_on(run)
        assert losses_in(tmp_path / str(epoch)) == losses_in(tmp_path / "whole")


def test_a_branch_starts_anew_what_its_checkpoint_does_not_remember(tmp_path: Path) -> None:
    write_ring(tmp_path)
    train_on(ring_run(tmp_path, tmp_path / "plain", "history.late_gradient=0"))
    more = ["history.late_gradient=0.5", "history.dropout=false", "history.predict=linear"]
    more += ["training.epochs=10", f"checkpoint.resume={tmp_path / 'plain'}"]
    train_on(ring_run(tmp_path, tmp_path / "branch", *more))
    whole, branch = losses_in(tmp_path / "plain"), losses_in(tmp_path / "branch")
    assert branch[: len(whole)] == whole
    assert len(branch) == 10


def test_refresh_that_is_due_survives_a_restart(tmp_path: Path) -> None:
    write_ring(tmp_path)
    options = ["history.refresh_every=3", "training.eval_every=100"]
    train_on(ring_run(tmp_path, tmp_path / "whole", *options))
    run = ring_run(tmp_path, tmp_path / "parts", *options)
    train_until(run, 3)
    train_on(run)
    assert losses_in(tmp_path / "parts") == losses_in(tmp_path / "whole")


def test_memory_of_what_is_kept_is_counted() -> None:
    graph = woven()
    sizes = {}
    for name in ("clean", "predicted"):
        run = pipeline(graph, settings("gcn", strata=0, **OPTIONS[name]), striped(graph, 4))
        sizes[name] = {table.num_bytes for table in tables_of(run).values()}
    plain = pipeline(graph, settings("gcn", strata=0), striped(graph, 4))
    (size,) = {table.num_bytes for table in tables_of(plain).values()}
    assert sizes == {"clean": {size * 3 // 2}, "predicted": {size * 2}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["history.momentum=1"], r"`history.momentum` \(=1.0\) must be at least 0 and below 1"),
        (["history.refresh_every=-1"], r"`history.refresh_every` \(=-1\) must be at least 0"),
        (["history.late_gradient=2"], r"`history.late_gradient` \(=2.0\) must be between 0"),
        (
            ["history.late_gradient=1", "history.late_gradient_momentum=1"],
            r"`history.late_gradient_momentum` \(=1.0\) must be at least 0 and below 1",
        ),
        (["history.max_drift=-1"], r"`history.max_drift` \(=-1.0\) must be at least 0"),
        (
            ["history.predict=linear", "history.period=2"],
            r"`history.predict` \(=linear\) goes with `history.period` \(=2\) 1 only",
        ),
    ],
)
def test_mistakes_name_the_key(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, options)
