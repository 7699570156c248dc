"""Update rules, learning rates, the bound on gradients and early stopping."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import woven
from one_process import losses, pipeline, reference, settings, striped, weights_of
from resuming import losses as losses_in
from resuming import ring_run, train_on, train_until, write_ring
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

from gnnpipe.config import load_config
from gnnpipe.errors import UserError
from gnnpipe.metrics import read_metrics
from gnnpipe.optimizer import (
    Updates,
    averaged_weights,
    clip,
    learning_rate,
    make_optimizer,
    squared_norm,
)
from gnnpipe.weights import load_weights

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "momentum": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.5},
    "cosine": {"schedule": "cosine", "epochs": 20, "warm_up_epochs": 3},
    "step": {"schedule": "step", "decay_every": 5, "decay": 0.3},
    "clip": {"clip_norm": 0.05},
    "smoothing": {"label_smoothing": 0.2},
}


# --- one chunk is exact training, whatever the options


@pytest.mark.parametrize("name", OPTIONS)
def test_one_chunk_equals_full_graph_with_every_option(name: str) -> None:
    graph, config = woven(is_directed=True), settings("gcnii", virtual_stages=3, **OPTIONS[name])
    run, plain = pipeline(graph, config), reference(graph, config)
    found = losses(run, 20)
    assert found == pytest.approx(losses(plain, 20), rel=0, abs=1e-9)
    for key, weight in weights_of(plain).items():
        torch.testing.assert_close(weights_of(run)[key], weight, rtol=0, atol=1e-9, msg=key)
    default = settings("gcnii", virtual_stages=3)
    assert abs(losses(pipeline(graph, default), 20)[-1] - found[-1]) > 1e-4


@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_are_bit_equal_for_every_cut_with_every_option(name: str) -> None:
    graph, found = woven(), []
    for virtual in (1, 2, 5):
        config = settings("gcnii", dtype="float32", virtual_stages=virtual, **OPTIONS[name])
        run = pipeline(graph, config, striped(graph, 4))
        found.append((losses(run, 4), weights_of(run)))
    for other, weights in found[1:]:
        assert other == found[0][0]
        assert all(torch.equal(weights[key], weight) for key, weight in found[0][1].items())


# --- update rules


@pytest.mark.parametrize(
    ("updates", "theirs"),
    [
        (Updates("adam", 0.1, 0.2), lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.2)),
        (Updates("adamw", 0.1, 0.2), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.2)),
        (
            Updates("sgd", 0.1, 0.2, 0.7),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.7, weight_decay=0.2),
        ),
    ],
)
def test_rules_are_torchs(updates: Updates, theirs: Any) -> None:
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine, plain = make_optimizer([one], updates), theirs([other])
    for _ in range(4):
        for parameter, optimizer in ((one, mine), (other, plain)):
            parameter.grad = parameter.detach().cos()
            optimizer.step()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    assert not torch.allclose(one, start)


@pytest.mark.parametrize("rule", ["adam", "adamw", "sgd"])
def test_no_bit_depends_on_the_cut_into_stages_or_on_threads(rule: Any) -> None:
    # Sizes with and without a rest behind the last vector; the first is split between threads.
    shapes = [(1433, 129), (64, 64), (7, 13), (3,)]

    def trained(cut: int, threads: int) -> list[Tensor]:
        generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
        weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        updates = Updates(rule, 0.1, 0.2, ema_decay=0.7)
        optimizers = [make_optimizer(part, updates) for part in (weights[:cut], weights[cut:])]
        torch.set_num_threads(threads)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()
        torch.set_num_threads(before)
        states = {weight: state for each in optimizers for weight, state in each.state.items()}
        return [*weights, *(states[weight]["average"] for weight in weights)]

    whole = trained(4, 1)
    for cut, threads in ((0, 1), (1, 1), (3, 2), (4, 3)):
        for mine, theirs in zip(trained(cut, threads), whole, strict=True):
            assert torch.equal(mine, theirs)


# --- learning rates


def torchs_rates(make: Any, epochs: int, *, lr: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    scheduler, found = make(optimizer), []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def rates(updates: Updates, epochs: int) -> list[float]:
    return [learning_rate(epoch, updates) for epoch in range(1, epochs + 1)]


def test_a_cosine_falls_as_torchs_does() -> None:
    updates = Updates(lr=0.3, schedule="cosine", epochs=12)
    expected = torchs_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 12), 12, lr=0.3)
    assert rates(updates, 12) == pytest.approx(expected, rel=1e-12)


def test_steps_fall_as_torchs_do() -> None:
    updates = Updates(lr=0.3, schedule="step", decay_every=4, decay=0.1)
    expected = torchs_rates(lambda o: lr_scheduler.StepLR(o, 4, 0.1), 12, lr=0.3)
    assert rates(updates, 12) == pytest.approx(expected, rel=1e-12)


def test_warm_up_rises_to_the_learning_rate_and_the_schedule_follows() -> None:
    assert rates(Updates(lr=1.0, warm_up_epochs=3), 5) == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = Updates(lr=1.0, schedule="cosine", epochs=7, warm_up_epochs=3)
    plain = Updates(lr=1.0, schedule="cosine", epochs=4)
    assert rates(cosine, 7)[3:] == rates(plain, 4)
    assert rates(Updates(lr=0.5, epochs=3), 4) == [0.5] * 4


# --- the bound on gradients


def test_clipping_bounds_the_norm_of_all_weights_together() -> None:
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 5, 2)]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    norm = math.sqrt(float(squared_norm(parameters)))
    stacked = torch.cat([p.grad for p in parameters if p.grad is not None])
    assert norm == pytest.approx(float(stacked.norm()), rel=1e-12)
    clip(parameters, norm=norm, max_norm=norm * 2)
    assert math.sqrt(float(squared_norm(parameters))) == norm
    clip(parameters, norm=norm, max_norm=0.5)
    assert math.sqrt(float(squared_norm(parameters))) == pytest.approx(0.5, rel=1e-5)


# --- averaged weights


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_averaged_weights_are_weighted_means_of_all_steps(rule: Any) -> None:
    weight = nn.Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double())
    optimizer, seen = make_optimizer([weight], Updates(rule, 0.1, ema_decay=0.7)), []
    with averaged_weights(optimizer):  # Before the first step there is nothing to average.
        before = weight.detach().clone()
    assert torch.equal(before, weight)
    for step in range(1, 6):
        weight.grad = weight.detach().cos()
        optimizer.step()
        seen.append(weight.detach().clone())
        shares = 0.7 ** torch.arange(step).flip(0).double()
        mean = torch.tensordot(shares / shares.sum(), torch.stack(seen), dims=1)
        with averaged_weights(optimizer):
            torch.testing.assert_close(weight.detach(), mean, rtol=0, atol=1e-12)
        assert torch.equal(weight, seen[-1])
    with pytest.raises(ZeroDivisionError), averaged_weights(optimizer):
        _ = 1 / 0
    assert torch.equal(weight, seen[-1])


def test_evaluations_and_saved_weights_are_averages_and_training_is_not() -> None:
    graph = woven(is_directed=True)
    changes: dict[str, Any] = {"lr": 0.05, "ema_decay": 0.9}
    config, plain = settings("gcnii", **changes), settings("gcnii", lr=0.05)
    run, whole = pipeline(graph, config), reference(graph, config)
    alone = reference(graph, plain)
    for epoch in range(1, 7):
        found = [each.train_epoch(epoch) for each in (run, whole, alone)]
        assert found == pytest.approx([found[2]] * 3, rel=0, abs=1e-9)
        assert run.evaluate() == whole.evaluate()
    for key, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(run)[key], weight, rtol=0, atol=1e-9, msg=key)
    gaps = [float((weights_of(alone)[k] - w).abs().max()) for k, w in weights_of(whole).items()]
    assert min(gaps) > 1e-4


def test_averages_are_bit_equal_for_every_cut_and_survive_a_restart(tmp_path: Path) -> None:
    graph, found = woven(), []
    for virtual in (1, 5):
        config = settings("gcnii", dtype="float32", virtual_stages=virtual, ema_decay=0.9)
        run = pipeline(graph, config, striped(graph, 4))
        losses(run, 4)
        found.append(weights_of(run))
    assert all(torch.equal(found[1][key], weight) for key, weight in found[0].items())
    write_ring(tmp_path)
    directories = [tmp_path / name for name in ("whole", "parts")]
    for directory in directories:
        run_of = ring_run(tmp_path, directory, "training.ema_decay=0.8")
        if directory.name == "parts":
            train_until(run_of, 4)
        train_on(run_of)
    one, other = (load_weights(each / "weights" / "last.safetensors")[0] for each in directories)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses_in(directories[0]) == losses_in(directories[1])


# --- label smoothing


def test_smoothing_equals_torchs() -> None:
    from gnnpipe.losses import cross_entropy

    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    labels, train = torch.arange(9) % 4, torch.arange(9) % 2 == 0
    leaf = logits.clone().requires_grad_()
    expected = functional.cross_entropy(leaf[train], labels[train], label_smoothing=0.3)
    loss, gradient = cross_entropy(logits, labels, train, num_train=5, smoothing=0.3)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


# --- early stopping


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ring")
    write_ring(folder)
    return folder


# So slow that no validation figure ever changes: the first evaluation stays the best.
STILL = ["training.lr=1e-12", "training.epochs=30", "training.eval_every=2"]


def epochs_of(directory: Path) -> int:
    return len(read_metrics(directory / "metrics.jsonl"))


def test_training_ends_when_nothing_gets_better(ring: Path, tmp_path: Path) -> None:
    run = ring_run(ring, tmp_path / "run", *STILL, "training.early_stop=5", "checkpoint.every=4")
    train_on(run)
    assert epochs_of(tmp_path / "run") == 8  # best in epoch 2; 7 is not evaluated
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints[-1] == "epoch-000008"
    before = losses_in(tmp_path / "run")
    train_on(run)  # finished: nothing more happens
    train_on([*run, "training.epochs=40"])  # nor with more epochs to go
    assert losses_in(tmp_path / "run") == before


def test_patience_survives_a_restart(ring: Path, tmp_path: Path) -> None:
    run = ring_run(ring, tmp_path / "run", *STILL, "training.early_stop=6", "checkpoint.every=1")
    train_until(run, 5)
    train_on(run)
    assert epochs_of(tmp_path / "run") == 8


def test_early_stopping_needs_validation_nodes(ring: Path, tmp_path: Path) -> None:
    import numpy as np

    with np.load(ring / "ring.npz") as arrays:
        values = dict(arrays)
    values["val_mask"] = np.zeros_like(values["val_mask"])
    np.savez(tmp_path / "blind.npz", **values)
    run = ring_run(ring, tmp_path / "run", *STILL, "training.early_stop=5")
    run += [f"data.name={tmp_path / 'blind.npz'}", "partition.path=null"]
    with pytest.raises(UserError, match=r"`training.early_stop` \(=5\) must have labelled valid"):
        train_on(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.momentum=1", r"`training.momentum` \(=1.0\) must be at least 0 and below 1"),
        ("training.label_smoothing=-1", r"`training.label_smoothing` \(=-1.0\) must be at least"),
        ("training.ema_decay=1", r"`training.ema_decay` \(=1.0\) must be at least 0 and below 1"),
        ("training.decay=0", r"`training.decay` \(=0.0\) must be above 0 and at most 1"),
        ("training.clip_norm=0", r"`training.clip_norm` \(=0.0\) must be above 0, or null"),
        ("training.early_stop=0", r"`training.early_stop` \(=0\) must be at least 1"),
        ("training.warm_up_epochs=-1", r"`training.warm_up_epochs` \(=-1\) must be at least 0"),
        ("training.schedule=line", r"`training.schedule` \(=line\) must be one of cosine, step"),
    ],
)
def test_mistakes_name_the_key(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, [text])
