"""Columns of numbers in ``.csv`` and ``.csv.gz`` files, a block at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gnnpipe.errors import UserError

BLOCK_BYTES = 2**24


def csv_blocks(path: Path, *, dtype: str, delimiter: str = ",") -> Iterator[NDArray[Any]]:
    """Reads a file without a header, about 16 MiB of text at a time.

    Args:
        path: text, or gzip if it ends in ``.gz``.
        dtype: ``int64`` or ``float32``; empty fields and ``nan`` of real numbers are NaN.
        delimiter: between the columns of a line.

    Yields:
        ``[rows, columns]``.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    import pyarrow
    from pyarrow import csv

    kind = pyarrow.int64() if dtype == "int64" else pyarrow.float32()
    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(pyarrow.input_stream(str(path)))
            width = _width(path, delimiter)
            if not width:
                return
            names = [f"column{i}" for i in range(width)]
            reader = csv.open_csv(
                stream,
                read_options=csv.ReadOptions(column_names=names, block_size=BLOCK_BYTES),
                parse_options=csv.ParseOptions(delimiter=delimiter),
                convert_options=csv.ConvertOptions(
                    column_types=dict.fromkeys(names, kind), null_values=["", "nan", "NaN"]
                ),
            )
            for batch in reader:
                columns = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
                yield np.stack(columns, axis=1).astype(dtype, copy=False)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} cannot be read as a table of {dtype}: {reason}") from error


def csv_array(path: Path, *, dtype: str) -> NDArray[Any]:
    """The whole file, ``[rows, columns]``; an empty one is ``[0, 1]``."""
    blocks = list(csv_blocks(path, dtype=dtype))
    return np.concatenate(blocks) if blocks else np.empty((0, 1), dtype)


def _width(path: Path, delimiter: str) -> int:
    """Number of columns in the first line; 0 of an empty file."""
    import pyarrow

    with pyarrow.input_stream(str(path)) as stream:
        head = bytes(stream.read(2**16)).split(b"\n", 1)[0]
    return head.count(delimiter.encode()) + 1 if head else 0
