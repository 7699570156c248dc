"""A directory of plain arrays under a manifest: written whole or not at all, checked when read.

The manifest lists size, dtype, shape and SHA-256 of every array file, and its own SHA-256.
Arrays are memory-mapped, so that a rank reads only the pages it needs.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from gnnpipe.errors import UserError
from gnnpipe.renumbering import TakenRows

MANIFEST = "manifest.json"

Stored: TypeAlias = NDArray[Any] | TakenRows

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # From <sys/mman.h>.

ALWAYS_HASHED_BYTES = 2**20
"""Array files up to this size are hashed on every load, larger ones when asked to."""


def write(
    directory: str | Path,
    arrays: Mapping[str, Stored],
    header: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes arrays under a temporary name beside ``directory`` and renames it when complete.

    Args:
        directory: new, empty, or holding exactly this content already.
        arrays: name (the file's stem) to array, or to rows that are read as they are written.
        header: JSON-able facts; ``format`` and ``version`` among them.
        overwrite: replace another store of the same format; never a foreign directory.

    Returns:
        The manifest.

    Raises:
        UserError: the directory holds something else, or cannot be written.
    """
    require_free(directory, header["format"])
    target = Path(directory).resolve()  # a link to an empty directory is followed
    with _mistakes_of_writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
        draft.mkdir()
        try:
            manifest = _write_draft(draft, arrays, header)
            _publish(draft, target, manifest, overwrite=overwrite)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return manifest


def read(
    directory: str | Path, *, format_name: str, version: int, verify: bool = False
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Opens a store: arrays memory-mapped and read-only, and its manifest.

    Args:
        directory: what :func:`write` was given.
        format_name: the format to expect.
        version: the version to expect.
        verify: read every byte and compare all hashes.

    Raises:
        UserError: missing, foreign, newer, truncated or damaged files.
    """
    folder = Path(directory)
    manifest = _read_manifest(folder, format_name)
    if manifest.get("version") != version:
        raise UserError(
            f"`version` (={manifest.get('version')}) of {folder / MANIFEST} must be {version}; "
            "write it again with this gnnpipe, or read it with the one that wrote it"
        )
    _require_whole(folder / MANIFEST, manifest)
    arrays = {
        name: _read_array(folder / f"{name}.npy", entry, verify=verify)
        for name, entry in manifest["arrays"].items()
    }
    return arrays, manifest


def require_free(directory: str | Path, format_name: str) -> None:
    """Refuses a target that holds anything but a store of this format, or cannot be written.

    Raises:
        UserError: with the way out; worth asking for before long work.
    """
    target = Path(directory)
    ancestor = next(parent for parent in target.absolute().parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(
            f"`directory` (={target}) cannot be written: {ancestor} is no directory to write in; "
            "choose another directory"
        )
    if target.is_dir():
        if not any(target.iterdir()):
            return
        with contextlib.suppress(UserError):
            _read_manifest(target, format_name)
            return
    if target.exists() or target.is_symlink():
        raise UserError(
            f"`directory` (={target}) must be new, empty or hold {format_name}; "
            "choose another directory"
        )


def _write_draft(
    draft: Path, arrays: Mapping[str, Stored], header: Mapping[str, Any]
) -> dict[str, Any]:
    """Fills the temporary directory and makes it durable."""
    entries = {}
    for name, array in arrays.items():
        path = draft / f"{name}.npy"
        with path.open("wb") as file:
            if isinstance(array, TakenRows):
                _write_blocks(file, array)
            else:
                np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        entries[name] = {
            "bytes": path.stat().st_size,
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "sha256": _sha256(path),
        }
    manifest: dict[str, Any] = {**header, "arrays": entries}
    manifest["manifest_sha256"] = _manifest_sha256(manifest)
    with (draft / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(draft)
    return manifest


def _write_blocks(file: Any, rows: TakenRows) -> None:  # Any: a binary file
    """What ``np.save`` writes, without the whole in memory."""
    facts = {"descr": rows.dtype.str, "fortran_order": False, "shape": rows.shape}
    npy_format.write_array_header_1_0(file, facts)
    for block in rows.blocks():
        file.write(np.ascontiguousarray(block).data)


def _publish(draft: Path, target: Path, manifest: Mapping[str, Any], *, overwrite: bool) -> None:
    """Gives the finished draft its name, which another store may have to give up."""
    if not target.exists() or not any(target.iterdir()):
        draft.rename(target)
    elif overwrite or _read_manifest(target, manifest["format"]) == manifest:
        # The same content is replaced as well: that mends damaged files.
        old = draft.with_suffix(".old")
        target.rename(old)
        draft.rename(target)
        shutil.rmtree(old)
    else:
        raise UserError(
            f"`directory` (={target}) holds other {manifest['format']}; "
            "choose another directory or overwrite it"
        )
    _sync_directory(target.parent)


def _read_manifest(folder: Path, format_name: str) -> dict[str, Any]:
    """Parses the manifest and compares its format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"`directory` (={folder}) must hold {format_name}, but its {MANIFEST} cannot be read: "
            f"{error.strerror}; make one with python -m partition"
        ) from None
    except ValueError:
        raise UserError(f"{path} is damaged: it must be JSON; write it again") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != format_name:
        raise UserError(
            f"`format` (={found}) of {path} must be {format_name}; name another directory"
        )
    assert isinstance(manifest, dict)
    return manifest


def _require_whole(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses a manifest that is not the one that was written."""
    if manifest.get("manifest_sha256") != _manifest_sha256(manifest):
        raise UserError(f"{path} is damaged: its SHA-256 must match its content; write it again")


def _read_array(path: Path, entry: Mapping[str, Any], *, verify: bool) -> NDArray[Any]:
    """Maps one array file and compares it with its entry in the manifest."""
    try:
        found_bytes = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; write it again") from None
    if found_bytes != entry["bytes"]:
        raise UserError(
            f"{path} is damaged: its size (={found_bytes}) must be {entry['bytes']} bytes; "
            "write it again"
        )
    is_hashed = verify or found_bytes <= ALWAYS_HASHED_BYTES
    if is_hashed and _sha256(path) != entry["sha256"]:
        raise UserError(f"{path} is damaged: its SHA-256 must match {MANIFEST}; write it again")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path} is damaged: it must be an array file; write it again") from None
    if [array.dtype.str, list(array.shape)] != [entry["dtype"], entry["shape"]]:
        raise UserError(
            f"{path} is damaged: {array.dtype.str} {list(array.shape)} must be "
            f"{entry['dtype']} {entry['shape']}; write it again"
        )
    return np.asarray(array)  # a plain view: memmap's subclass survives slicing and slows it


def private_map(array: Any) -> NDArray[Any] | None:
    """The same values as a map of the same file whose pages are copied when written to.

    torch knows no read-only tensors: a layer that works in place on a mapped one would end the
    process. Memory for the copies is not reserved, so the file may be larger than the host's.

    Args:
        array: that :func:`read` gave; None comes back for any other.
    """
    base = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    if not isinstance(base, np.memmap) or base.shape != array.shape or base.filename is None:
        return None
    flags = mmap.MAP_PRIVATE | MAP_NORESERVE
    with open(base.filename, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    values = np.frombuffer(pages, base.dtype, count=base.size, offset=base.offset)
    return values.reshape(base.shape)


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Hash of everything in the manifest but the hash, whatever its layout."""
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _mistakes_of_writing(target: Path) -> Iterator[None]:
    """Turns a full or read-only disk into the user's kind of error."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"`directory` (={target}) cannot be written: {error.strerror}; "
            "choose a directory that can be"
        ) from error
