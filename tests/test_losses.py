"""The loss of some rows against torch's own, and counts that can be checked by eye."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from gnnpipe.losses import Targets, accuracies, count_correct, cross_entropy


def torchs_loss(
    logits: Tensor, labels: Tensor, train_mask: Tensor, num_train: int
) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    total = functional.cross_entropy(logits[train_mask], labels[train_mask], reduction="sum")
    loss = total / num_train
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@settings(max_examples=50)
@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 2**31), st.floats(0.1, 300.0))
def test_loss_and_gradient_equal_torchs(
    num_rows: int, num_classes: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    train_mask = torch.rand(num_rows, generator=generator) < 0.5
    labels[~train_mask] = -1  # where nothing is trained, nobody looks at the label
    num_train = 7
    loss, gradient = cross_entropy(logits, labels, train_mask, num_train=num_train)
    expected, expected_gradient = torchs_loss(logits, labels, train_mask, num_train)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_losses_of_chunks_add_up_to_the_mean() -> None:
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    labels, train = torch.arange(10) % 3, torch.arange(10) % 2 == 0
    whole = functional.cross_entropy(logits[train], labels[train])
    parts = [
        cross_entropy(logits[rows], labels[rows], train[rows], num_train=5)[0]
        for rows in (slice(0, 1), slice(1, 2), slice(2, 10))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    assert parts[1] == 0.0  # row 1 does not train


def test_rows_without_training_nodes_have_no_loss() -> None:
    logits = torch.tensor([[float("inf"), 1.0], [2.0, float("nan")]])
    none = torch.zeros(2, dtype=torch.bool)
    loss, gradient = cross_entropy(logits, torch.tensor([-1, 0]), none, num_train=3)
    assert loss == 0.0
    assert not gradient.any()


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4]])
    train = torch.ones(1, dtype=torch.bool)
    loss, gradient = cross_entropy(logits, torch.tensor([1]), train, num_train=1)
    assert loss == 2e4
    assert gradient.tolist() == [[1.0, -1.0]]


def test_inputs_stay_as_they_were() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, -1])
    train = labels >= 0
    before = logits.clone(), labels.clone(), train.clone()
    cross_entropy(logits, labels, train, num_train=3)
    assert all(torch.equal(a, b) for a, b in zip((logits, labels, train), before, strict=True))


#          row   0      1      2      3      4
# prediction     0      1      1      0      0
# label          0      0      1     -1      0
# split        train  train   val   test   test      row 3 has no label: no mask holds it
TARGETS = Targets(
    labels=torch.tensor([0, 0, 1, -1, 0]),
    masks=torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]).bool(),
)
LOGITS = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 5.0], [1.0, 0.0], [3.0, -3.0]])


def test_counts_of_a_drawn_table() -> None:
    counts = count_correct(LOGITS, TARGETS)
    assert counts.tolist() == [[1, 2], [1, 1], [1, 1]]
    assert counts.dtype == torch.int64
    assert accuracies(counts) == {"train": 0.5, "val": 1.0, "test": 1.0}


def test_counts_of_parts_add_up() -> None:
    parts = [
        count_correct(LOGITS[rows], Targets(TARGETS.labels[rows], TARGETS.masks[:, rows]))
        for rows in (slice(0, 2), slice(2, 2), slice(2, 5))
    ]
    assert torch.stack(parts).sum(0).tolist() == [[1, 2], [1, 1], [1, 1]]


def test_an_unlabelled_row_is_never_right() -> None:
    mask = torch.ones(3, 1, dtype=torch.bool)
    counts = count_correct(torch.tensor([[1.0]]), Targets(torch.tensor([-1]), mask))
    assert counts.tolist() == [[0, 1]] * 3


def test_a_split_without_labelled_nodes_has_no_accuracy() -> None:
    counts = torch.tensor([[1, 4], [0, 2], [0, 0]])
    assert accuracies(counts) == {"train": 0.25, "val": 0.0, "test": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_has_the_dtype_of_the_scores(dtype: torch.dtype) -> None:
    logits, train = torch.zeros(2, 2, dtype=dtype), torch.ones(2, dtype=torch.bool)
    loss, gradient = cross_entropy(logits, torch.tensor([0, 1]), train, num_train=2)
    assert loss.dtype == gradient.dtype == dtype
    assert gradient.tolist() == [[-0.25, 0.25], [0.25, -0.25]]
