"""CUDA graphs: kernels that are launched together, again and again."""

from collections.abc import Callable
from typing import Any

import torch


class CudaGraphs:
    """Captures work that launches kernels on one device.

    All captures share one pool of memory for what they make, so they must be replayed one after
    the other, as the chunks of a rank are. Work must not ask the device for a value, and must
    have run before: compiling and the libraries' first calls cannot be captured.
    """

    def __init__(self) -> None:
        self._pool: Any = None  # torch's handle

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the work's kernels without running them; the result runs them."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may wait for messages on the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        self._pool = graph.pool()
        return graph.replay
