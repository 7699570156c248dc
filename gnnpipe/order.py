"""In which order an epoch works through the chunks, and where its optimizer steps end."""

from gnnpipe.counter import stream_key
from gnnpipe.errors import UserError


def chunk_order(seed: int, epoch: int, num_chunks: int, *, kind: str) -> list[int]:
    """The order in which an epoch works through the chunks.

    It depends on nothing but the arguments: every rank draws it alone, and a resumed run
    draws what the interrupted one would have.

    Args:
        seed: The run's seed.
        epoch: Counted from 1.
        num_chunks: Number of chunks ``C``.
        kind: ``shuffled``; ``antithetic``, where every second epoch takes the order before it
            reversed, so that of each pair of chunks each is fresh to the other exactly once in
            the two (antithetic variates; as sampling without replacement, Rajput et al.,
            "Permutation-based SGD: is random optimal?"); or ``fixed`` for ``0, 1, ... C - 1``.

    Returns:
        A permutation of the chunks, ``[C]``: position in the epoch to chunk.
    """
    if kind == "fixed":
        return list(range(num_chunks))
    if kind == "antithetic" and epoch % 2 == 0:
        return chunk_order(seed, epoch - 1, num_chunks, kind="shuffled")[::-1]
    if kind in ("shuffled", "antithetic"):
        return sorted(range(num_chunks), key=lambda chunk: stream_key(seed, epoch, chunk))
    raise UserError(
        f"`kind` (={kind!r}) must be 'shuffled', 'antithetic' or 'fixed'; name one of them"
    )


def step_bounds(num_chunks: int, steps: int) -> list[int]:
    """First position of each step's chunks in the epoch's order and, last, their number.

    As even as possible, the first steps get more: 8 chunks in 3 steps are ``[0, 3, 6, 8]``.

    Args:
        num_chunks: Chunks ``C`` of the epoch.
        steps: Optimizer steps of the epoch, at most ``C``.
    """
    if not 1 <= steps <= max(1, num_chunks):
        raise UserError(
            f"`steps` (={steps}) must be at least 1 and at most the number of chunks"
            f" (={num_chunks}); take fewer steps or cut into more chunks"
        )
    return [-(-num_chunks * step // steps) for step in range(steps + 1)]
