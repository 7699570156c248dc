"""A convolution's forward and backward by hand: dropout, neighbour sums, products, ReLU.

Why not autograd: on a small chunk its bookkeeping takes longer than the kernels, and each of its
steps makes a new array. By hand a result, and later its gradient, lies in one of two buffers that
all layers of a stage share, the gradient of the sums is made in the table where others read it,
and what a backward needs is the table and one bit of each number::

    forward    rows = dropout(x)    sums = A values    result = relu(sums W + rows V + bias)
    backward   g = gradient where result > 0     gradients = g W^T
               gradient of x = dropout(A^T gradients + g V^T)
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gnnpipe.cell import Cells
from gnnpipe.counter import signed, stream_key
from gnnpipe.history import Table
from gnnpipe.kernels import keep_where, multiply, prepare_drop, rectify
from gnnpipe.models.convolution import Affine
from gnnpipe.reader import Halo, Reader, alias


class Buffers:
    """Rows on their way through the layers of a stage.

    The result of a layer lies in the slot of the layer's parity, and so does its gradient. What a
    split backward leaves for the weights has slots of its own, used again by the next chunk.
    """

    def __init__(self) -> None:
        self._flat: dict[object, Tensor] = {}
        self._rows: dict[tuple[object, int, int], Tensor] = {}

    def rows(self, layer_index: int, num_rows: int, channels: int, *, like: Tensor) -> Tensor:
        """Rows ``[num_rows, channels]`` that hold until another layer's of the same parity."""
        return self._in(layer_index % 2, num_rows, channels, like)

    def left(self, layer_index: int, name: str, *, like: Tensor) -> Tensor:
        """Rows like others that hold until the layer's next backward."""
        return self._in((layer_index, name), like.shape[0], like.shape[1], like)

    def _in(self, slot: object, num_rows: int, channels: int, like: Tensor) -> Tensor:
        rows = self._rows.get((slot, num_rows, channels))
        if rows is None:
            size = num_rows * channels
            if slot not in self._flat or self._flat[slot].numel() < size:
                self._flat[slot] = like.new_empty(size)
            rows = self._flat[slot][:size].view(num_rows, channels)
            self._rows[slot, num_rows, channels] = rows
        return rows


class Shared(NamedTuple):
    """What the layers of a stage have in common."""

    halo: Halo
    seed: int
    factor: float
    """On gradients that cross chunks."""
    is_half: bool
    """Whether products round their operands to bfloat16."""
    buffers: Buffers
    is_captured: bool = False
    """Whether what changes between epochs stands in tensors that stay where they are."""


class ByHand:
    """One layer on all its chunks.

    Args:
        affine: what the layer is.
        table: its table.
        cells: its chunks.
        shared: with the other layers of the stage.
        layer_index: its place in the model.
        dropout: of its input.
    """

    def __init__(
        self,
        affine: Affine,
        table: Table,
        cells: Cells,
        shared: Shared,
        *,
        layer_index: int,
        dropout: float,
    ) -> None:
        self.affine = affine
        self.table = table
        self.cells = cells
        self.shared = shared
        self.layer_index = layer_index
        self.dropout = dropout
        self.key: int | Tensor = 0
        """Of the epoch's dropout."""
        self._on_chunks: dict[int, OnChunk] = {}
        self._matrix: Tensor | None = None
        self._sums: dict[nn.Parameter, Tensor] = {}
        """Gradients of the weights, where they are captured."""

    def start_epoch(self, epoch: int) -> None:
        """Epochs count from 1."""
        key = stream_key(self.shared.seed, epoch, self.layer_index, 0)
        if not self.shared.is_captured:
            self.key = key
        elif isinstance(self.key, Tensor):
            self.key.fill_(signed(key))
        else:
            self.key = torch.tensor(signed(key), device=self.table.values.device)

    @torch.no_grad()
    def start_step(self) -> None:
        """Weights have changed."""
        if not self.shared.is_captured:
            self._matrix = None
            return
        if self._matrix is not None and self.affine.beta is not None:  # Else it is a view.
            self._matrix.copy_(self.affine.matrix())
        for parameter in self.affine.parameters:
            if parameter.requires_grad:
                if parameter not in self._sums:
                    self._sums[parameter] = torch.zeros_like(parameter)
                parameter.grad = self._sums[parameter].zero_()

    @property
    def is_steady(self) -> bool:
        """Whether a chunk does the same in every epoch, on this rank alone."""
        table, whole = self.table, self.cells.whole
        is_alone = not whole.in_exchanges and not whole.out_exchanges
        return is_alone and table.drift is None and table.recall is None

    @property
    def matrix(self) -> Tensor:
        """What the sums are multiplied with, ``[in_channels, out_channels]``."""
        if self._matrix is None:
            self._matrix = self.affine.matrix()
        return self._matrix

    def on(self, chunk_index: int) -> "OnChunk":
        """The layer on one chunk."""
        if chunk_index not in self._on_chunks:
            self._on_chunks[chunk_index] = OnChunk(self, chunk_index)
        return self._on_chunks[chunk_index]

    def rows(self, *, like: Tensor) -> Tensor:
        """Where the result for a chunk goes, and its gradient; ``like`` has as many rows."""
        num_rows, channels = like.shape[0], self.affine.out_channels
        return self.shared.buffers.rows(self.layer_index, num_rows, channels, like=like)

    def left(self, name: str, like: Tensor) -> Tensor:
        """Where a backward leaves rows for the weights."""
        return self.shared.buffers.left(self.layer_index, name, like=like)


class OnChunk:
    """One layer on one chunk: what is the same in every epoch, and this one's mask.

    Whoever calls has autograd switched off.
    """

    def __init__(self, by_hand: ByHand, chunk: int) -> None:
        table, shared = by_hand.table, by_hand.shared
        cell = by_hand.cells.at(chunk)
        self._by_hand = by_hand
        self._reader = Reader(table, cell, shared.halo, chunk=chunk, factor=shared.factor)
        self._values = alias(table.values, cell.rows)
        self._sums = alias(table.gradients, cell.rows)
        self._drop = prepare_drop(cell.node_id, p=by_hand.dropout, like=self._sums)
        self._mask: Tensor | None = None

    @property
    def _rows(self) -> Tensor:
        """The chunk's own rows as neighbours read them."""
        return self._values.to(self._sums.dtype)

    def forward(self, x: Tensor, carried: Tensor | None, out: Tensor) -> Tensor:
        """Computes the layer.

        Args:
            x: its input, ``[num_rows, in_channels]``.
            carried: what is mixed with the sums, if anything is.
            out: where the result goes, ``[num_rows, out_channels]``.
        """
        hand, reader = self._by_hand, self._reader
        affine, is_half = hand.affine, hand.shared.is_half
        if hand.dropout:
            reader.keep(x)
            x = self._drop(x, hand.key, reader.own_rows(x))
        wait = reader.write(x)
        reader.sum(wait, self._sums)
        self._mix(carried)
        multiply(self._sums, hand.matrix, out=out, base=affine.bias, is_half=is_half)
        if affine.rows is not None:
            multiply(self._rows, affine.rows.t(), out=out, base=out, is_half=is_half)
        self._mask = rectify(out, self._mask)
        return out

    def _mix(self, carried: Tensor | None) -> None:
        if carried is not None:
            self._sums.lerp_(carried, self._by_hand.affine.share)

    def backward(
        self,
        grad: Tensor,
        carried: Tensor | None,
        out: Tensor,
        later: list[Callable[[], None]] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Adds the gradients of the weights.

        Args:
            grad: of the result; it may lie where results do, and is overwritten there.
            carried: as in the forward.
            out: where the gradient of the input goes, ``[num_rows, in_channels]``.
            later: takes what will add the gradients of the weights; None adds them here.

        Returns:
            That, and the gradient of the carried rows, which holds until the next backward.
        """
        hand, affine, is_half = self._by_hand, self._by_hand.affine, self._by_hand.shared.is_half
        assert self._mask is not None
        place = hand.rows(like=grad) if later is None else hand.left("gradient", grad)
        grad = keep_where(grad.contiguous(), self._mask, out=place)
        if hand.table.is_shared:  # Another layer's sums lie there; the values are still these.
            self._reader.sum(_at_once, self._sums)
            self._mix(carried)
        if later is None:
            self._add_weights(grad, self._sums)
        else:
            sums = hand.left("sums", self._sums).copy_(self._sums)
            later.append(partial(self._add_weights, grad, sums))
        multiply(grad, hand.matrix.t(), out=self._sums, is_half=is_half)
        to_carried = None
        if carried is not None:
            to_carried = self._sums * affine.share
            self._sums.mul_(1.0 - affine.share)
        self._reader.back(out)
        if affine.rows is not None:
            multiply(grad, affine.rows, out=out, base=out, is_half=is_half)
        if hand.dropout:
            self._drop(out, hand.key, out)
        return out, to_carried

    def _add_weights(self, grad: Tensor, sums: Tensor) -> None:
        affine, is_half = self._by_hand.affine, self._by_hand.shared.is_half
        if affine.bias is not None and affine.bias.requires_grad:
            add_gradient(affine.bias, grad.sum(0))
        pairs = [(affine.sums, sums)]
        if affine.rows is not None:
            pairs.append((affine.rows, self._rows))
        for weight, rows in pairs:
            if weight.requires_grad:
                ends = (rows, grad) if affine.beta is not None else (grad, rows)
                product = torch.empty_like(weight)
                multiply(ends[0].t(), ends[1], out=product, is_half=is_half)
                add_gradient(weight, product if affine.beta is None else product * affine.beta)


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """As autograd does."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def _at_once() -> None:
    """There is no message to wait for."""
