"""What travels between ranks: the message both ends agree on, and the format of its rows.

A format decides the bytes only. ``fp32`` sends rows as they were computed (64-bit models send
64 bits), ``bf16`` half of a 32-bit row, ``int8`` a quarter and one scale per row. Rounding to
8 bits is random by counter, keyed by the action that sends, so the numbers do not depend on
timing or on the order of actions.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gnnpipe.kernels.quantize import quantize_rows

Kind = Literal["boundary", "carried", "halo", "gradient", "evaluation"]
KINDS: tuple[Kind, ...] = ("boundary", "carried", "halo", "gradient", "evaluation")

Format = Literal["fp32", "bf16", "int8"]

SCALE_BYTES = 4


class Message(NamedTuple):
    """One tensor between two ranks, known to both ends beforehand."""

    peer: int
    """Rank at the other end."""
    tag: int
    """Distinguishes messages between the same two ranks."""
    shape: tuple[int, ...]
    kind: Kind
    channel: Literal["forward", "backward"]
    """Which communicator carries it."""
    name: str
    """What an error calls it, such as ``2B17``."""

    def complaint(self, verb: str) -> str:
        """What an error says when the peer never ``sent`` or ``took`` it."""
        return f"rank {self.peer} never {verb} {self.kind} rows {self.name}"


class Formats(NamedTuple):
    """The format of each kind of message, and the seed of random rounding."""

    boundary: Format = "fp32"
    carried: Format = "fp32"
    halo: Format = "fp32"
    gradient: Format = "fp32"
    seed: int = 0

    def of(self, kind: Kind) -> Format:
        """The format of a kind; evaluations are always exact."""
        if kind == "evaluation":
            return "fp32"
        found: Format = getattr(self, kind)
        return found


def pack(rows: Tensor, form: Format, *, key: int) -> Tensor:
    """Rows as they travel.

    Args:
        rows: ``[num_rows, F]``.
        form: the format.
        key: of the random rounding.
    """
    if form == "fp32":
        return rows.contiguous()
    if form == "bf16":
        return rows.to(torch.bfloat16).contiguous().view(torch.uint8)
    payload = rows.new_empty(payload_bytes(rows, form), dtype=torch.uint8)
    quantize_rows(rows, key=key, levels=_levels(payload, rows), scale=_scale(payload, rows))
    return payload


def buffer_for(target: Tensor, form: Format) -> Tensor:
    """Where the payload for ``target [num_rows, F]`` arrives: the target itself if it can."""
    if form == "fp32":
        return target
    shape = (target.shape[0], 2 * target.shape[1]) if form == "bf16" else (-1,)
    empty = target.new_empty(payload_bytes(target, form), dtype=torch.uint8)
    return empty.view(shape)


def unpack(payload: Tensor, form: Format, *, target: Tensor) -> None:
    """Writes the rows that a payload stands for into ``target``."""
    if form == "bf16":
        target.copy_(payload.view(torch.bfloat16))
    elif form == "int8":
        scale = _scale(payload, target).to(target.dtype)
        torch.mul(_levels(payload, target), scale.unsqueeze(1), out=target)


def payload_bytes(rows: Tensor, form: Format) -> int:
    """Size of ``rows [num_rows, F]`` under way."""
    num_rows, channels = rows.shape
    if form == "int8":
        return num_rows * (channels + SCALE_BYTES)
    return num_rows * channels * (2 if form == "bf16" else rows.element_size())


def _scale(payload: Tensor, rows: Tensor) -> Tensor:
    return payload[: rows.shape[0] * SCALE_BYTES].view(torch.float32)


def _levels(payload: Tensor, rows: Tensor) -> Tensor:
    return payload[rows.shape[0] * SCALE_BYTES :].view(torch.int8).view(rows.shape)
