"""Out of memory in a run's own words: what asked for it, and which settings free some."""

import re
from types import TracebackType
from typing import Literal

import torch

from gnnpipe.errors import UserError

Purpose = Literal["table", "forward", "backward", "evaluation", "optimizer"]

WAYS_OUT = {
    "table": "a larger parallel.num_stages or parallel.num_ways, history.dtype=bfloat16,"
    " history.period=1, or a smaller model.hidden_channels",
    "forward": "memory.mode=recompute or offload, a larger parallel.num_stages or"
    " parallel.num_ways, or a smaller model.hidden_channels or model.num_layers",
    "backward": "a larger partition.num_chunks or parallel.num_ways, or a smaller"
    " model.hidden_channels",
    "evaluation": "a larger parallel.num_ways (evaluations hold all rows of a way at once), or a"
    " smaller model.hidden_channels",
    "optimizer": "a larger parallel.num_stages, or a smaller model.hidden_channels",
}


class AskingFor:
    """Turns a failed allocation inside the block into a mistake that can be mended.

    A class, because it stands around every layer of every chunk: a generator costs more.
    """

    __slots__ = ("_purpose", "_what")

    def __init__(self, purpose: Purpose, what: str) -> None:
        self._purpose = purpose
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and is_shortage(error):
            tried = re.search(r"[Tt]rie[ds] to allocate ([\d.]+ ?\w+)", str(error))
            wanted = f", which asked for {tried[1]}" if tried else ""
            raise UserError(
                f"memory ran out for {self._what}{wanted}; {WAYS_OUT[self._purpose]} frees some"
            ) from error


def is_shortage(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, in torch's CPU allocator, or in numpy's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
