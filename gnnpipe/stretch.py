"""Consecutive layers that run by hand: forward and backward of one chunk, and their replay.

On a GPU the kernels of a small chunk run in less time than it takes to launch them one by one. So
a chunk's second forward, and its second backward, can be captured as CUDA graphs, which later
epochs replay. A graph repeats the same kernels on the same memory with the same plain numbers;
what changes between epochs therefore stands in tensors that stay where they are: keys of dropout,
matrices and gradients of the weights (:class:`gnnpipe.by_hand.ByHand`), which rows are fresh
(``Table.gate``), and what goes in and comes out here.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gnnpipe.by_hand import ByHand
from gnnpipe.shortage import AskingFor

Later = list[Callable[[], None]]
"""Takes what will add the gradients of weights."""
Work = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what some work does to memory, without doing it; the result does it."""


class Stretch:
    """The layers, and what a chunk's backward needs of its forward besides the tables.

    Args:
        hands: consecutive layers; more may follow until they run.
        capture: None runs every kernel as it comes.
    """

    def __init__(self, hands: Sequence[ByHand], capture: Capture | None = None) -> None:
        self.hands = hands
        self._replays = None if capture is None else Replays(capture)
        self._read: dict[int, dict[str, Tensor]] = {}
        """What each chunk's forward has read of the carried tensors."""

    def start_epoch(self, epoch: int) -> None:
        """Epochs count from 1."""
        for hand in self.hands:
            hand.start_epoch(epoch)

    def start_step(self) -> None:
        """Weights have changed."""
        for hand in self.hands:
            hand.start_step()

    def forward(self, chunk_index: int, x: Tensor, carried: Mapping[str, Tensor]) -> Tensor:
        """Computes a chunk.

        Args:
            chunk_index: which.
            x: input of the first layer, ``[num_rows, in_channels]``.
            carried: tensors that later layers read, by name.
        """
        names = sorted({hand.affine.carried for hand in self.hands if hand.affine.carried})
        self._read[chunk_index] = {name: carried[name] for name in names}

        def work(rows: Sequence[Tensor]) -> list[Tensor]:
            return [self._forward(chunk_index, rows[0], dict(zip(names, rows[1:], strict=True)))]

        inputs = [x, *self._read[chunk_index].values()]
        return self._run(("forward", chunk_index), work, inputs)[0]

    @torch.no_grad()
    def _forward(self, chunk_index: int, x: Tensor, read: Mapping[str, Tensor]) -> Tensor:
        for hand in self.hands:
            with AskingFor("forward", f"activations of layer {hand.layer_index}"):
                # What leaves, or what autograd may hold on to, is no shared buffer.
                if hand is self.hands[-1]:
                    out = x.new_empty((x.shape[0], hand.affine.out_channels))
                else:
                    out = hand.rows(like=x)
                x = hand.on(chunk_index).forward(x, _read_by(hand, read), out)
        return x

    def backward(
        self,
        chunk_index: int,
        dx: Tensor,
        carried: dict[str, Tensor],
        *,
        later: Later | None = None,
        layer_done: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Adds the gradients of the weights; returns that of the input.

        Args:
            chunk_index: a chunk whose forward has run.
            dx: gradient of its result.
            carried: gradients of carried tensors so far; those of what the layers read are added.
            later: takes what will add the gradients of weights; None adds them here.
            layer_done: called with the index of each layer when its backward has run.
        """
        read = self._read.pop(chunk_index)
        if later is not None or self._replays is None:
            return self._backward(chunk_index, dx, read, carried, later, layer_done)
        known = [name for name in read if name in carried]

        def work(rows: Sequence[Tensor]) -> list[Tensor]:
            values = dict(zip(read, rows[1:], strict=False))
            sums = dict(zip(known, rows[1 + len(read) :], strict=True))
            dx = self._backward(chunk_index, rows[0], values, sums)
            return [dx, *(sums[name] for name in read)]

        inputs = [dx, *read.values(), *(carried[name] for name in known)]
        dx, *sums = self._run(("backward", chunk_index, *known), work, inputs)
        carried.update(zip(read, sums, strict=True))
        if layer_done is not None:
            for hand in reversed(self.hands):
                layer_done(hand.layer_index)
        return dx

    @torch.no_grad()
    def _backward(
        self,
        chunk_index: int,
        dx: Tensor,
        read: Mapping[str, Tensor],
        carried: dict[str, Tensor],
        later: Later | None = None,
        layer_done: Callable[[int], None] | None = None,
    ) -> Tensor:
        for hand, before in reversed(list(zip(self.hands, [None, *self.hands], strict=False))):
            with AskingFor("backward", f"gradients of layer {hand.layer_index}"):
                if before is None:
                    out = dx.new_empty((dx.shape[0], hand.table.values.shape[1]))
                else:
                    out = before.rows(like=dx)
                on_chunk = hand.on(chunk_index)
                dx, to_carried = on_chunk.backward(dx, _read_by(hand, read), out, later)
                if to_carried is not None:
                    add_carried(carried, str(hand.affine.carried), to_carried)
            if layer_done is not None:
                layer_done(hand.layer_index)
        return dx

    def forget(self) -> None:
        """No backward will come for the forwards that have run."""
        self._read.clear()

    def _run(
        self, key: tuple[object, ...], work: Work, inputs: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        if self._replays is None or not all(hand.is_steady for hand in self.hands):
            return work(inputs)
        return self._replays.run(key, work, inputs)


class Replays:
    """Work that is captured at its second call, when all it needs has been made by the first.

    Args:
        capture: how.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._known: set[object] = set()
        self._captured: dict[
            object, tuple[Sequence[Tensor], Callable[[], None], Sequence[Tensor]]
        ] = {}

    def run(self, key: object, work: Work, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the work makes of its inputs; holds until the next call with the key.

        Args:
            key: the same for the same work on inputs of the same shapes.
            work: touches no memory but its inputs and what stays where it is.
            inputs: tensors, wherever they lie.
        """
        if key not in self._known:
            self._known.add(key)
            return work(inputs)
        if key not in self._captured:
            self._captured[key] = self._capture_on(work, [rows.clone() for rows in inputs])
        places, replay, results = self._captured[key]
        for place, rows in zip(places, inputs, strict=True):
            place.copy_(rows)
        replay()
        return results

    def _capture_on(
        self, work: Work, places: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Callable[[], None], Sequence[Tensor]]:
        results: list[Tensor] = []
        replay = self._capture(lambda: results.extend(work(places)))
        return places, replay, results


def add_carried(carried: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    """Of several readers of a carried tensor the gradients add up."""
    carried[name] = carried[name] + gradient if name in carried else gradient


def _read_by(hand: ByHand, read: Mapping[str, Tensor]) -> Tensor | None:
    return None if hand.affine.carried is None else read[hand.affine.carried]
