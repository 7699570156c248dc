"""The same kernels in plain torch, for devices without their own and as an oracle."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gnnpipe.counter import GOLDEN_64, signed

_LOW_32 = 0xFFFFFFFF


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift(value, 27)) * signed(0x94D049BB133111EB)
    return value ^ _shift(value, 31)


def _draw(row_key: Tensor, column: Tensor) -> Tensor:
    z = (row_key & _LOW_32) ^ ((column * 0x9E3779B9) & _LOW_32)
    z = (z + _shift(row_key, 32)) & _LOW_32
    z = ((z ^ (z >> 16)) * 0x7FEB352D) & _LOW_32
    z = ((z ^ (z >> 15)) * 0x846CA68B) & _LOW_32
    return z ^ (z >> 16)


def keys(ids: Sequence[Tensor], key: int | Tensor) -> Tensor:
    """The 64-bit key of each row: ids are ``(node,)``, or ``(source, target)`` of edges."""
    number = signed(key) if isinstance(key, int) else key
    result = torch.zeros_like(ids[0]) + number
    for part in ids:
        result = _mix((part * signed(GOLDEN_64)) ^ result)
    return result


def keep_mask(row_keys: Tensor, num_columns: int, threshold: int) -> Tensor:
    """Which entries ``[num_rows, num_columns]`` stay."""
    column = torch.arange(num_columns, device=row_keys.device)
    return _draw(row_keys.unsqueeze(1), column) >= threshold


def keep_entries(entry_keys: Tensor, column: Tensor, threshold: int) -> Tensor:
    """Which entries stay, one key and one column each."""
    return _draw(entry_keys, column.long()) >= threshold
