"""What a CUDA graph does, on a CPU: the same operations on the same memory, without Python."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS = ("nonzero", "_local_scalar_dense", "unique", "masked_select", "bincount")
"""Operations that make the host wait for the device: a capture fails on them."""


class Operation(NamedTuple):
    """One recorded operation, and where its results lie."""

    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    results: list[Tensor]


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(  # Any: whatever torch calls
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        assert not any(part in str(func) for part in ASKS), f"{func} waits for the device"
        for part in _dense((args, keywords)):
            storage = part.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before.setdefault(storage.data_ptr(), (whole, whole.clone()))
        out = func(*args, **keywords)
        self.operations.append(Operation(func, args, keywords, _dense(out)))
        return out

    def undo(self) -> None:
        """Puts back what has been overwritten: recording a graph runs no kernel."""
        for whole, before in self._before.values():
            whole.copy_(before)
        self._before.clear()


class Tapes:
    """Stands in for :class:`gnnpipe.kernels.graphs.CudaGraphs`."""

    recorded = 0
    replayed = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        recording = _Recording()
        with recording:
            work()
        recording.undo()
        Tapes.recorded += 1

        def replay() -> None:
            Tapes.replayed += 1
            with torch.no_grad():
                for func, args, kwargs, results in recording.operations:
                    again = _dense(func(*args, **kwargs))
                    for place, part in zip(results, again, strict=True):
                        if place.data_ptr() != part.data_ptr():  # Neither a view nor in place.
                            place.copy_(part)

        return replay


def _dense(tree: Any) -> list[Tensor]:
    leaves = tree_leaves(tree)
    return [x for x in leaves if isinstance(x, Tensor) and x.layout == torch.strided]
