"""Assignments that someone else made: a text or .npy file with one row per node."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partition.errors import PartitionError
from partition.methods import Assignment


def read(file: str, *, num_nodes: int, num_chunks: int, num_ways: int) -> Assignment:
    """Reads chunk ids ``[N]``, or ``[N, 2]`` rows of chunk id and way id.

    The text form, one integer per line, is what ``gpmetis`` and ParMETIS write.

    Args:
        file: path ending in ``.npy``, or a text file.
        num_nodes: rows to expect.
        num_chunks: ids must cover ``[0, num_chunks)``.
        num_ways: likewise for the second column, which may lack when it is 1.

    Raises:
        PartitionError: an unreadable file, another shape, ids out of range, an empty chunk or way.
    """
    table = _integers(file)
    if table.ndim not in (1, 2) or len(table) != num_nodes or table.shape[1:] not in ((), (2,)):
        raise PartitionError(
            f"`file` (={file}) holds {list(table.shape)} where [{num_nodes}] chunk ids or "
            f"[{num_nodes}, 2] chunk and way ids belong; write one row per node"
        )
    chunk_id, way_id = (table, np.zeros_like(table)) if table.ndim == 1 else table.T
    _require_ids(file, "num_chunks", chunk_id, num_chunks)
    _require_ids(file, "num_ways", way_id, num_ways)
    return Assignment(chunk_id.astype(np.int32), way_id.astype(np.int32))


def _integers(file: str) -> NDArray[Any]:
    """The file's array; anything that is not made of integers is refused."""
    try:
        if Path(file).suffix == ".npy":
            table = np.asarray(np.load(file, allow_pickle=False))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # an empty file: its shape says it
                with open(file, encoding="ascii") as lines:
                    table = np.loadtxt(lines, dtype=np.int64, ndmin=2)
            table = table[:, 0] if table.shape[1] == 1 else table
    except OSError as error:
        raise PartitionError(
            f"`file` (={file}) cannot be read: {error.strerror}; name an assignment file"
        ) from None
    except (ValueError, EOFError):
        table = np.empty(0)
    if not np.issubdtype(table.dtype, np.integer):
        raise PartitionError(
            f"`file` (={file}) must hold integers, as .npy or one row of text per node; "
            "write chunk ids"
        )
    return table


def _require_ids(file: str, name: str, ids: NDArray[Any], count: int) -> None:
    """Refuses ids that do not cover ``[0, count)``."""
    if ids.min() < 0 or ids.max() >= count:
        raise PartitionError(
            f"`file` (={file}) holds ids {ids.min()}..{ids.max()} but `{name}` (={count}) allows "
            f"0..{count - 1}; set `{name}` to match the file"
        )
    num_empty = count - len(np.unique(ids))
    if num_empty:
        raise PartitionError(
            f"`file` (={file}) leaves {num_empty} of `{name}` (={count}) empty; "
            "number them without gaps"
        )
