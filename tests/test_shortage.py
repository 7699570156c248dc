"""Out of memory: one line that names the layer and the settings, at every place that may ask."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import woven

from gnnpipe import assembly
from gnnpipe.config import load_config, to_dict
from gnnpipe.errors import UserError
from gnnpipe.history import Table
from gnnpipe.models.gcn import GCNLayer
from gnnpipe.run_directory import flatten
from gnnpipe.shortage import WAYS_OUT, AskingFor
from gnnpipe.trainer import Trainer

CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.6 GiB"


def fail(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError(CUDA)


def train(tmp_path: Path) -> None:
    overrides = ["model.name=gcn", "model.num_layers=3", "model.hidden_channels=8"]
    overrides += ["partition.num_chunks=3", "partition.method=random", "run.tensorboard=false"]
    config = load_config(None, [*overrides, f"run.dir={tmp_path / 'run'}", "training.epochs=1"])
    Trainer(config, graph=woven(30)).fit()


def in_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GCNLayer.forward

    def failing(self: GCNLayer, x: Any, graph: Any) -> Any:
        return fail() if torch.is_grad_enabled() else forward(self, x, graph)

    monkeypatch.setattr(GCNLayer, "forward", failing)


def in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "backward", fail)


def in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GCNLayer, "forward", fail)


def in_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "Table", fail)


def in_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.Adam, "step", fail)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (in_tables, "the table of layer 1, .* history.period=1"),
        (in_forward, "activations of layer 1, .* memory.mode=recompute .* parallel.num_stages"),
        (in_backward, "gradients of layer 4, .* partition.num_chunks"),
        (in_evaluation, "all rows of layer 1, .* parallel.num_ways"),
        (in_the_optimizer, "the optimizer's moments, .* parallel.num_stages"),
    ],
)
def test_it_is_said_who_asked_and_what_frees_memory(
    where: Callable[[pytest.MonkeyPatch], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where(monkeypatch)
    with pytest.raises(UserError, match=f"memory ran out for {message}") as caught:
        train(tmp_path)
    assert ", which asked for 2.50 GiB; " in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_the_settings_that_free_memory_are_there() -> None:
    text = " ".join(WAYS_OUT.values())
    known = flatten(to_dict(load_config(None, [])))
    assert set(re.findall(r"\b[a-z]+\.[a-z_]+", text)) <= known.keys()
    load_config(None, re.findall(r"[a-z]+\.[a-z_]+=\w+", text))


def test_a_real_allocation_that_fails_is_recognised() -> None:
    like = torch.empty(0)
    asked = r"for a table, which asked for \d+ bytes"
    with pytest.raises(UserError, match=asked) as caught, AskingFor("table", "a table"):
        Table(1 << 40, 1 << 40, 1 << 10, like=like, period=1)
    assert re.search("DefaultCPUAllocator", str(caught.value.__cause__))


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), AskingFor("forward", "x"):
        raise RuntimeError("shape")
