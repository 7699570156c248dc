"""Chunks whose kernels are captured once and replayed: the same bits as kernel by kernel.

A tape of operations stands in for CUDA graphs: replayed on the same memory with the same plain
numbers, it repeats what was true while it was recorded, and fails on what cannot be captured.
"""

import dataclasses
from typing import Any

import pytest
import torch
from drawn import woven
from one_process import layers_of, pipeline, settings, striped
from tape import Tapes

from gnnpipe.cell import Exchange
from gnnpipe.config import Config, load_config
from gnnpipe.errors import UserError
from gnnpipe.kernels import cpu
from gnnpipe.runs import PipelineRun
from gnnpipe.sections import KernelsConfig

EPOCHS, CHUNKS = 5, 4


@pytest.fixture(autouse=True)
def _tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU as a device of plain torch whose operations can be captured."""
    monkeypatch.setattr(Config, "check_device", lambda *_: None)
    monkeypatch.setattr("gnnpipe.assembly.CudaGraphs", Tapes)
    monkeypatch.setattr(cpu, "owns", lambda _: False)
    monkeypatch.setattr(Tapes, "recorded", 0)
    monkeypatch.setattr(Tapes, "replayed", 0)


def built(name: str, *, replays: bool, **changes: Any) -> PipelineRun:
    config = settings(name, **{"num_layers": 5, "dropout": 0.3, **changes})
    kernels = KernelsConfig(backend="torch", cuda_graphs=replays)
    graph = woven(is_directed=True)
    return pipeline(graph, dataclasses.replace(config, kernels=kernels), striped(graph, CHUNKS))


def trained(run: PipelineRun, measured: int | None = None) -> tuple[list[float], Any]:
    losses = [run.train_epoch(e, is_measured=e == measured) for e in range(1, EPOCHS + 1)]
    return losses, [p.clone() for local in layers_of(run) for p in local.layer.parameters()]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as it is"),
        pytest.param({"dropout": 0.0}, id="without dropout"),
        pytest.param({"mode": "recompute"}, id="recomputed"),
        pytest.param({"late_gradient": 1.0, "late_gradient_momentum": 0.5}, id="late gradients"),
        pytest.param({"steps_per_epoch": 2, "order": "antithetic"}, id="steps"),
        pytest.param({"history_dtype": "bfloat16", "dtype": "float32"}, id="rounded tables"),
        pytest.param({"period": 2}, id="snapshots"),
    ],
)
@pytest.mark.parametrize("name", ["gcn", "sage", "gcnii"])
def test_replayed_chunks_give_the_same_bits(name: str, changes: dict[str, Any]) -> None:
    plain, replayed = (trained(built(name, replays=which, **changes)) for which in (False, True))
    assert Tapes.recorded == 2 * CHUNKS  # forward and backward of each, all epochs and orders
    assert Tapes.replayed == 2 * CHUNKS * (EPOCHS - 1)
    assert replayed[0] == plain[0]
    assert all(map(torch.equal, replayed[1], plain[1]))


def test_an_epoch_that_measures_staleness_runs_as_it_comes() -> None:
    runs = [built("gcnii", replays=which) for which in (False, True)]
    plain, replayed = (trained(run, measured=3) for run in runs)
    assert Tapes.replayed == 2 * CHUNKS * (EPOCHS - 2)
    assert replayed[0] == plain[0]
    assert all(map(torch.equal, replayed[1], plain[1]))


def test_kept_rows_are_not_captured() -> None:
    changes = {"keeps_dropout": False, "history_momentum": 0.3}
    plain, kept = (trained(built("gcn", replays=which, **changes)) for which in (False, True))
    assert (Tapes.recorded, kept[0]) == (0, plain[0])


def test_layers_that_need_messages_are_not_captured() -> None:
    (stage,) = built("gcn", replays=True).engine.stages.values()
    (stretch,) = stage.stretches
    hand = stretch.hands[0]
    assert hand.is_steady
    cells, message = hand.cells, [Exchange(1, torch.zeros(1, dtype=torch.int64), slice(0, 0))]
    whole = cells.whole
    for with_messages in (
        whole._replace(in_exchanges=message),
        whole._replace(out_exchanges=message),
    ):
        hand.cells = cells._replace(whole=with_messages)
        assert not hand.is_steady


def test_models_under_autograd_are_not_captured() -> None:
    trained(built("gin", replays=True))
    assert Tapes.recorded == 0


def test_graphs_are_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"`kernels.cuda_graphs` \(=true\) must be false on a CPU"):
        load_config(None, ["device=cpu", "kernels.cuda_graphs=true"])
