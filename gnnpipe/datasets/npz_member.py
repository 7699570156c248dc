"""Arrays inside ``.npz`` files as memory maps, so that they need not fit into memory.

A stored member is mapped where it lies in the archive. A compressed one is first unpacked beside
it, a block at a time, into ``NAME.KEY.npy``.
"""

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from gnnpipe.errors import UserError

_LOCAL_HEADER_BYTES = 30
_COPY_BYTES = 2**24


def member_names(path: Path) -> list[str]:
    """The keys of an archive.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no .npz file or is damaged; download it anew") from error


def mapped_member(path: Path, key: str) -> NDArray[Any]:
    """One array of an archive, read-only.

    Raises:
        UserError: the archive lacks it, or it is damaged.
    """
    if key not in member_names(path):
        raise UserError(f"{path} lacks the array {key}; download it anew")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{key}.npy")
        if info.compress_type == zipfile.ZIP_STORED:
            return _mapped(path, _data_offset(path, info))
        unpacked = path.with_name(f"{path.stem}.{key}.npy")
        if not unpacked.exists():
            _unpack(archive, info, unpacked)
    return _mapped(unpacked, 0)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return info.header_offset + _LOCAL_HEADER_BYTES + lengths


def _mapped(path: Path, offset: int) -> NDArray[Any]:
    """Maps an array in the ``.npy`` format that starts at a byte of a file."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            version = npy_format.read_magic(file)
            read = (
                npy_format.read_array_header_1_0
                if version == (1, 0)
                else npy_format.read_array_header_2_0
            )
            shape, is_fortran, dtype = read(file)
            start = file.tell()
        order: Any = "F" if is_fortran else "C"
        if not dtype.hasobject:
            is_empty = 0 in shape  # which cannot be mapped
            return (
                np.empty(shape, dtype)
                if is_empty
                else np.memmap(path, dtype, "r", start, shape, order)
            )
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); download it anew") from error
    raise UserError(f"{path} holds Python objects; only plain arrays are read")


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    try:
        with archive.open(info) as source, temporary.open("wb") as sink:
            shutil.copyfileobj(source, sink, _COPY_BYTES)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
