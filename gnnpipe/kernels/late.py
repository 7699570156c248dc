"""How rows change from late gradients to the step's own, for :mod:`gnnpipe.recall`."""

from collections.abc import Callable

import torch
from numba import prange
from torch import Tensor

from gnnpipe.kernels import cpu


def prepare_show(
    own: Tensor, seen: Tensor, *, factor: float, share: Tensor
) -> Callable[[], object]:
    """``own, seen = (1 - share) seen + share factor own, own``.

    Prepared once, as looking at tensors as numpy arrays takes as long as the rows of a small
    chunk do; on CPUs each row is read once.

    Args:
        own: ``[n, H]``.
        seen: ``[n, H]``.
        factor: on what is taken over.
        share: ``[1]``, read when the result is called.

    Returns:
        Does it.
    """
    if not cpu.owns(own):

        def run() -> None:
            late = torch.lerp(seen, own * factor, share)
            seen.copy_(own)
            own.copy_(late)

        return run
    kernel = _show.chosen(own.numel())
    rows, others, shares = (part.numpy() for part in (own, seen, share))
    scale = rows.dtype.type(factor)
    return lambda: kernel(rows, others, scale, shares)


def _show_rows(own, seen, factor, share):  # type: ignore[no-untyped-def]
    taken = share[0]
    left = share.dtype.type(1) - taken
    for i in prange(own.shape[0]):
        for column in range(own.shape[1]):
            new = own[i, column]
            own[i, column] = left * seen[i, column] + taken * (factor * new)
            seen[i, column] = new


_show = cpu.compiled(_show_rows)
