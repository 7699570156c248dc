"""Saved weights as one plain module."""

from pathlib import Path

import numpy as np
import pytest
import torch
from resuming import ring_run, train_on, write_ring

from gnnpipe.datasets import load_graph
from gnnpipe.errors import UserError
from gnnpipe.inference import predict_run
from gnnpipe.pretrained import PretrainedModel
from gnnpipe.weights import load_weights, save_weights


@pytest.mark.parametrize("name", ["gcnii", "gat"])
def test_the_module_predicts_what_the_run_predicts(name: str, tmp_path: Path) -> None:
    write_ring(tmp_path)
    run = tmp_path / "run"
    train_on([*ring_run(tmp_path, run), f"model.name={name}", "training.epochs=3"])
    model = PretrainedModel.from_pretrained(run, weights="last")
    scores = model(load_graph(str(tmp_path / "ring.npz")))
    assert not model.training
    wanted = np.load(predict_run(str(run), weights="last"))
    assert torch.allclose(scores, torch.from_numpy(wanted), atol=1e-6)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    write_ring(tmp_path)
    run = tmp_path / "run"
    train_on([*ring_run(tmp_path, run), "training.epochs=1"])
    path = run / "weights" / "best.safetensors"
    tensors, metadata = load_weights(path)
    save_weights(path, {n: t for n, t in tensors.items() if "layers.0." not in n}, metadata)
    with pytest.raises(
        UserError, match=r"weights must hold `layers.0.lin.weight`; load the weigh"
    ):
        PretrainedModel.from_pretrained(run)
    with pytest.raises(UserError, match=r"must be readable \(.*No such file"):
        PretrainedModel.from_pretrained(run, weights="first")
