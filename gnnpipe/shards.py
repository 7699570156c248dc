"""Reads a checkpoint's tensors by their global names, whichever ranks wrote them."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gnnpipe.errors import UserError

NODE_ID = "node_id"


class Shards:
    """The ``.safetensors`` files of one checkpoint, memory-mapped; a context manager.

    Args:
        paths: one file of each rank.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._holders: dict[str, list[int]] = {}
        self._files: list[Any] = []  # safetensors ships no types
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}
        with ExitStack() as stack:
            for number, path in enumerate(paths):
                file = stack.enter_context(safe_open(path, framework="pt"))
                self._files.append(file)
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    self._holders.setdefault(name, []).append(number)
            self._stack = stack.pop_all()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._holders

    def names(self, prefix: str) -> list[str]:
        """All names that begin with ``prefix``."""
        return [name for name in self._holders if name.startswith(prefix)]

    def tensor(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """One tensor that a single rank has written.

        Raises:
            UserError: it is missing or has another shape: the model is another one.
        """
        if name not in self._holders:
            raise UserError(f"the checkpoint must hold `{name}`; it is of another model")
        tensor: Tensor = self._files[self._holders[name][0]].get_tensor(name)
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise UserError(
                f"`{name}` of the checkpoint (of shape {list(tensor.shape)}) must have the shape"
                f" {list(shape)}; it is of another model"
            )
        return tensor

    def rows(self, name: str, node_id: Tensor) -> Tensor:
        """Rows of a table that several ranks have written, in the order of ``node_id``.

        Args:
            name: of the table.
            node_id: original ids of the wanted rows, ``[num_rows]``, int64.

        Raises:
            UserError: some node's row is missing.
        """
        node_id = node_id.cpu()
        found = torch.zeros(node_id.numel(), dtype=torch.bool)
        out: Tensor | None = None
        for number in self._holders.get(name, []):
            ids, order = self._order(number)
            position = torch.searchsorted(ids, node_id).clamp_(max=ids.numel() - 1)
            is_here = ids[position] == node_id if ids.numel() else found & False
            part: Tensor = self._files[number].get_tensor(name)
            out = part.new_empty((node_id.numel(), part.shape[1])) if out is None else out
            out[is_here] = part[order[position[is_here]]]
            found |= is_here
        if out is None or not bool(found.all()):
            raise UserError(
                f"the checkpoint must hold every row of `{name}`; it is of another graph"
            )
        return out

    def _order(self, number: int) -> tuple[Tensor, Tensor]:
        """The ids of one file in ascending order, and where each row lies in the file."""
        if number not in self._orders:
            ids, order = self._files[number].get_tensor(NODE_ID).sort()
            self._orders[number] = (ids, order)
        return self._orders[number]
