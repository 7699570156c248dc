"""Layers that run without autograd: which they are, and that their numbers are autograd's."""

from typing import Any

import pytest
import torch
from drawn import woven
from one_process import gradients_of, losses, pipeline, settings, striped
from torch import Tensor, nn

from gnnpipe.memory import left_numbers
from gnnpipe.models.convolution import affine_of
from gnnpipe.models.gcn import GCNLayer
from gnnpipe.models.layer import GraphView
from gnnpipe.runs import PipelineRun

BY_HAND = ("gcn", "sage", "gcnii")


def stages_of(run: PipelineRun) -> list[Any]:
    return list(run.engine.stages.values())


def trained(name: str, num_chunks: int, *, by_hand: bool, **changes: Any) -> Any:
    graph = woven(is_directed=True)
    run = pipeline(graph, settings(name, **changes), striped(graph, num_chunks))
    for stage in stages_of(run):
        (stretch,) = stage.stretches
        assert [hand.layer_index for hand in stretch.hands] == [1, 2, 3]
        if not by_hand:
            stage.run_by_autograd()
    return losses(run, 3), gradients_of(run), run.evaluate()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as it is"),
        pytest.param({"dropout": 0.0}, id="without dropout"),
        pytest.param({"mode": "recompute"}, id="recomputed"),
        pytest.param({"late_gradient": 0.5}, id="late gradients"),
        pytest.param({"keeps_dropout": False, "history_momentum": 0.3}, id="recalled histories"),
        pytest.param({"cross_chunk_gradient": 2.0, "steps_per_epoch": 2}, id="steps"),
    ],
)
@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand_is_what_autograd_computes(
    name: str, num_chunks: int, changes: dict[str, Any]
) -> None:
    if num_chunks == 1:
        changes = {**changes, "steps_per_epoch": 1}
    one, other = (trained(name, num_chunks, by_hand=which, **changes) for which in (True, False))
    assert one[0] == pytest.approx(other[0], abs=1e-12)
    assert one[2] == other[2]
    for key, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as it is"),
        pytest.param({"mode": "recompute"}, id="recomputed"),
        pytest.param({"virtual_stages": 2, "steps_per_epoch": 2}, id="stages and steps"),
        pytest.param({"precision": "bf16"}, id="rounded"),
    ],
)
@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("name", [*BY_HAND, "resgcn+", "gat"])
def test_split_backwards_are_whole_ones_to_the_bit(
    name: str, num_chunks: int, changes: dict[str, Any]
) -> None:
    if num_chunks == 1:
        changes = {**changes, "steps_per_epoch": 1}
    graph, found = woven(is_directed=True), []
    for order in ("fill_drain", "split_backward"):
        config = settings(name, dtype="float32", order_of_actions=order, **changes)
        run = pipeline(graph, config, striped(graph, num_chunks))
        found.append((losses(run, 3), gradients_of(run)))
    (whole, wanted), (split, gradients) = found
    assert split == whole
    assert all(torch.equal(gradients[key], gradient) for key, gradient in wanted.items())


def test_split_backwards_leave_weights_for_later() -> None:
    graph = woven()
    run = pipeline(graph, settings("sage", order_of_actions="split_backward"), striped(graph, 3))
    (stage,) = stages_of(run)
    came: list[set[str]] = []
    finish = stage.finish_backward

    layers, left = [local.layer for local in stage.layers], []

    def watched(chunk_index: int, **options: Any) -> None:
        kept = [numbers for add in stage._later[chunk_index] for numbers in add.args]
        left.append(sum(numbers.numel() for numbers in kept))
        assert left[-1] == left_numbers(layers, kept[0].shape[0])
        before = gradients_of(run).keys()
        finish(chunk_index, **options)
        came.append({key.split(".")[1] for key in gradients_of(run).keys() - before})

    stage.finish_backward = watched
    run.train_epoch(1)
    assert came == [{"1", "2", "3"}, set(), set()]
    assert min(left) > 0


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"history_dtype": "bfloat16"}])
def test_rounded_numbers_are_rounded_where_autograd_rounds_them(
    name: str, changes: dict[str, Any]
) -> None:
    changes = {**changes, "dtype": "float32"}
    one, other = (trained(name, 4, by_hand=which, **changes)[0] for which in (True, False))
    assert one == pytest.approx(other, rel=1e-3)
    assert one[0] == pytest.approx(other[0], rel=1e-6)  # the same roundings, no step between


class Watched(GCNLayer):
    def convolve(self, x: Tensor, graph: GraphView) -> Tensor:
        return super().convolve(x, graph) + 1.0


def test_what_a_users_layer_adds_is_not_passed_over() -> None:
    assert affine_of(GCNLayer(4, 4)) is not None
    assert affine_of(Watched(4, 4)) is None
    assert affine_of(GCNLayer(4, 3)) is None  # aggregates the product
    hooked, normed, tied = GCNLayer(4, 4), GCNLayer(4, 4), GCNLayer(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    normed.norm = nn.LayerNorm(4)
    nn.utils.parametrizations.weight_norm(tied.lin)
    assert [affine_of(layer) for layer in (hooked, normed, tied)] == [None, None, None]


def test_frozen_weights_get_no_gradient() -> None:
    graph = woven()
    run = pipeline(graph, settings("sage"), striped(graph, 3))
    layer = stages_of(run)[0].layers[2].layer
    layer.lin_r.weight.requires_grad_(False)
    layer.lin_l.bias.requires_grad_(False)
    run.train_epoch(1)
    assert layer.lin_r.weight.grad is None
    assert layer.lin_l.bias.grad is None
    assert layer.lin_l.weight.grad.abs().sum() > 0


def test_rows_on_their_way_lie_in_two_buffers() -> None:
    graph = woven()
    run = pipeline(graph, settings("sage", num_layers=6), striped(graph, 3))
    losses(run, 2)
    (stretch,) = stages_of(run)[0].stretches
    assert len(stretch.hands) == 6
    (flat,) = {hand.shared.buffers for hand in stretch.hands}
    assert {slot: part.numel() for slot, part in flat._flat.items()} == {0: 8 * 8, 1: 8 * 8}
