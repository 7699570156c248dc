"""`training.precision: bf16`: which products round, by how much, and what stays bit for bit."""

from typing import Any

import pytest
import torch
from drawn import woven
from one_process import losses, pipeline, settings, striped
from torch import nn

from gnnpipe import runs
from gnnpipe.config import load_config
from gnnpipe.errors import UserError
from gnnpipe.kernels import HalfProducts

SMALL = {"dtype": "float32", "dropout": 0.2}


def trained(name: str, **changes: Any) -> tuple[list[float], Any]:
    graph = woven()
    run = pipeline(graph, settings(name, **{**SMALL, **changes}), striped(graph, 4))
    return losses(run, 3), run.evaluate()


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().double()


def test_operands_are_rounded_and_sums_are_not() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 300, generator=generator, requires_grad=True)
    layer = nn.Linear(300, 20)
    with HalfProducts():
        out = layer(x)
        plain = x @ layer.weight.t()
    exact = rounded(x) @ rounded(layer.weight).t()
    assert out.dtype == torch.float32
    # The result of a bfloat16 product is one, so it is off by half a unit in its last place.
    torch.testing.assert_close(plain.double(), exact, rtol=2**-8, atol=1e-2)
    torch.testing.assert_close((out - layer.bias).double(), exact, rtol=2**-8, atol=1e-2)
    assert not torch.equal(plain, x @ layer.weight.t())
    grad = torch.randn(50, 20, generator=generator)
    found = torch.autograd.grad(out, [x, layer.weight, layer.bias], grad)
    wanted = (rounded(grad) @ rounded(layer.weight), rounded(grad).t() @ rounded(x))
    for one, other in zip(found, wanted, strict=False):
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=2e-2)
    assert torch.equal(found[2], grad.sum(0))


def test_other_products_are_left_alone() -> None:
    a, b = torch.rand(3, 4, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    batch = torch.rand(2, 3, 4), torch.rand(2, 4, 5)
    exact = a @ b
    with HalfProducts():
        assert torch.equal(a @ b, exact)
        assert (batch[0] @ batch[1]).shape == (2, 3, 5)


@pytest.mark.parametrize("name", ["sage", "gat"])
def test_training_is_near_and_evaluation_exact(name: str) -> None:
    half, plain = trained(name, precision="bf16"), trained(name)
    assert half[0] != plain[0]
    assert half[0] == pytest.approx(plain[0], rel=5e-2)


@pytest.mark.parametrize("name", ["sage", "gcnii"])
def test_stages_and_recomputation_change_no_bit(name: str) -> None:
    half = trained(name, precision="bf16")
    assert trained(name, precision="bf16", virtual_stages=3) == half
    assert trained(name, precision="bf16", mode="recompute") == half


def test_a_word_where_it_gains_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gains in (True, False):
        monkeypatch.setattr(runs, "half_products_gain", lambda gains=gains: gains)
        caplog.clear()
        pipeline(woven(), settings("gcn", dtype="float32", precision="bf16"))
        assert ("no quicker than fp32" in caplog.text) != gains


def test_double_precision_does_not_go_with_it() -> None:
    with pytest.raises(UserError, match=r"`training.precision` \(=bf16\) must be fp32 with"):
        load_config(None, ["training.precision=bf16", "model.dtype=float64"])
