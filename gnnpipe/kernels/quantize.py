"""Rows as 8-bit integers under one scale per row, rounded up or down at random by counter.

``q = floor(x / scale + u)`` with ``scale = max |x| / 127`` and ``u`` uniform in [0, 1): the mean
of many roundings is x itself, so errors cancel over rows and epochs instead of adding up.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from gnnpipe.kernels import cpu, fallback
from gnnpipe.kernels.vector import draw

LARGEST = 127


def quantize_rows(x: Tensor, *, key: int, levels: Tensor, scale: Tensor) -> None:
    """Writes the 8-bit levels and the scale of each row.

    Args:
        x: ``[num_rows, F]``; a row that is not finite gets the scale NaN.
        key: unsigned 64-bit key of the random stream; rows and columns are counted from 0.
        levels: the result, ``[num_rows, F]``, int8.
        scale: the result, ``[num_rows]``, float32.
    """
    if not cpu.owns(x):
        _in_torch(x, key, levels, scale)
        return
    arrays = (x.contiguous().numpy(), np.uint64(key), levels.numpy(), scale.numpy())
    _kernel(*arrays, work=x.numel())


def _in_torch(x: Tensor, key: int, levels: Tensor, scale: Tensor) -> None:
    """The same for other devices, and the oracle of the kernel's test."""
    x = x.float()
    row_keys = fallback.keys((torch.arange(x.shape[0], device=x.device),), key)
    column = torch.arange(x.shape[1], device=x.device)
    bits = fallback._draw(row_keys.unsqueeze(1), column)
    u = (bits >> 8).to(torch.float32) * 2.0**-24
    largest = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    is_finite = torch.isfinite(x).all(dim=1)
    scale.copy_(torch.where(is_finite, largest / LARGEST, torch.nan))
    divisor = torch.where(is_finite & (largest > 0), scale, 1.0).unsqueeze(1)
    finite = torch.where(is_finite.unsqueeze(1), x, 0.0)
    levels.copy_(torch.floor(finite / divisor + u).clamp(-LARGEST, LARGEST).to(torch.int8))


def _quantize(x, key, levels, scale):  # type: ignore[no-untyped-def]
    limit = np.float32(LARGEST)
    unit = np.float32(2.0**-24)
    for i in prange(x.shape[0]):
        largest = np.float32(0)
        is_finite = True
        for column in range(x.shape[1]):
            size = np.float32(abs(x[i, column]))
            if not size <= np.float32(3.4028235e38):  # NaN compares false
                is_finite = False
            largest = max(largest, size)
        row_scale = largest / limit if is_finite else np.float32(np.nan)
        scale[i] = row_scale
        divisor = row_scale if is_finite and row_scale > np.float32(0) else np.float32(1)
        row_key = cpu.mix((np.uint64(i) * cpu.GOLDEN) ^ key)
        for column in range(x.shape[1]):
            u = np.float32(draw(row_key, column) >> np.uint32(8)) * unit
            value = np.float32(x[i, column]) if is_finite else np.float32(0)
            level = np.floor(value / divisor + u)
            levels[i, column] = np.int8(min(max(level, -limit), limit))


_kernel = cpu.compiled(_quantize)
