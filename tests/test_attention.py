"""Fused attention, ReLU masks and gated rows against plain torch."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gnnpipe.kernels import EdgeDrop, EdgeOrder, RowBlock, aggregate, attend, dropout_edges, relu
from gnnpipe.kernels.attention import attend_plainly
from gnnpipe.models.gat import edge_softmax

SOURCES, TARGETS, HEADS, EDGES = 9, 7, 3, 40


def block() -> Tensor:
    """Edges at random, some twice; target 5 has none."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(TARGETS, (EDGES,), generator=generator).sort().values
    target = torch.where(target == 5, 4, target)
    return torch.stack((torch.randint(SOURCES, (EDGES,), generator=generator), target))


def plain(x: Tensor, logits: list[Tensor], edges: Tensor, drop: EdgeDrop | None) -> Tensor:
    source, target = edges
    logit = functional.leaky_relu(logits[0][source] + logits[1][target], 0.2)
    alpha = edge_softmax(logit, target, TARGETS)
    if drop is not None:
        alpha = dropout_edges(alpha, drop.source_id, drop.target_id, p=drop.p, key=drop.key)
    messages = alpha.unsqueeze(2) * x.view(SOURCES, HEADS, -1)[source]
    return x.new_zeros(TARGETS, x.shape[1]).index_add(0, target, messages.flatten(1))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("size", [1, 8, 25])
def test_attention_equals_plain_torch(size: int, p: float) -> None:
    torch.manual_seed(size)
    inputs = [
        torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
        for rows, width in ((SOURCES, HEADS * size), (SOURCES, HEADS), (TARGETS, HEADS))
    ]
    edges = block()
    drop = EdgeDrop(edges[0].clone(), edges[1].clone(), p, 11) if p else None
    order = EdgeOrder(edges, num_sources=SOURCES, num_targets=TARGETS)
    ours = attend(*inputs, order=order, slope=0.2, drop=drop)
    theirs = plain(inputs[0], inputs[1:], edges, drop)
    torch.testing.assert_close(ours, theirs)
    elsewhere = attend_plainly(*inputs, order=order, slope=0.2, drop=drop)
    torch.testing.assert_close(elsewhere, theirs)
    y = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, y), torch.autograd.grad(theirs, inputs, y), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3), (4, 8), (37, 5)])
def test_relu_keeps_values_and_gradients_of_torch(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = torch.randn(shape, dtype=dtype)
    results = [(out, torch.autograd.grad(out, x, y)[0]) for out in (relu(1.0 * x), x.relu())]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_rows_behind_a_closed_gate_are_not_read() -> None:
    table = torch.tensor([[1.0], [float("nan")], [4.0]])
    matrix = RowBlock(torch.tensor([0, 3, 4]), torch.tensor([0, 1, 2, 1], dtype=torch.int32))
    out = aggregate(matrix, table, gate=torch.tensor([1.0, 0.0, 2.0]))
    assert out.flatten().tolist() == [9.0, 0.0]


@pytest.mark.parametrize("num_channels", [1, 15, 16, 17, 100, 112, 113, 128, 129, 300])
def test_rows_of_any_width_are_summed(num_channels: int) -> None:
    torch.manual_seed(num_channels)
    table, weight = torch.randn(50, num_channels), torch.rand(60)
    indptr, indices = torch.tensor([0, 0, 1, 20, 60]), torch.randint(50, (60,))
    ours = aggregate(RowBlock(indptr, indices.int(), weight=weight), table)
    dense = torch.zeros(4, 50).index_put_(
        (torch.arange(4).repeat_interleave(indptr.diff()), indices), weight, accumulate=True
    )
    torch.testing.assert_close(ours, dense @ table, rtol=1e-4, atol=1e-4)
