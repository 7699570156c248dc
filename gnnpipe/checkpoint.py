"""Checkpoints on disk: a ``.safetensors`` shard per rank under a manifest, whole or not at all.

Why not ``torch.distributed.checkpoint``: its metadata file is a pickle; its safetensors writer
keeps one block per tensor and rank, where a way holds C blocks of each table, and its reader does
not notice a shard that is missing. The names are the same kind: global, whatever the ranks::

    checkpoints/epoch-000050/manifest.json            epoch, state, size and SHA-256 of each file
                             rank-00000.safetensors   layers.0.lin.weight, history.3, node_id ...
                             rank-00001.safetensors
                             best.safetensors         the best weights so far

Rows of tables lie beside ``node_id``, the original ids of the rank's own rows, so that any other
number of ways finds its rows again.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gnnpipe.errors import UserError

FORMAT = "gnnpipe-checkpoint"
VERSION = 1
MANIFEST_FILE = "manifest.json"
BEST_FILE = "best.safetensors"
DRAFT_SUFFIX = ".tmp"

_NAME = re.compile(r"epoch-(\d{6,})")
_FILE = re.compile(r"(rank-\d{5}|best)\.safetensors")
_HASH = "manifest_sha256"


class CheckpointError(Exception):
    """A checkpoint is damaged or incomplete; the text says how."""


class FileFacts(NamedTuple):
    """What the manifest says of one file."""

    num_bytes: int
    sha256: str
    """Hexadecimal."""


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    path: Path
    epoch: int
    """The last epoch that it holds, counted from 1."""
    manifest: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """Everything that is no tensor."""
        return dict(self.manifest["state"])


def directory_name(epoch: int) -> str:
    """Name of the directory of an epoch's checkpoint."""
    return f"epoch-{epoch:06d}"


def draft_path(folder: Path, epoch: int) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return folder / f".{directory_name(epoch)}{DRAFT_SUFFIX}"


def shard_name(rank: int) -> str:
    """Name of one rank's file."""
    return f"rank-{rank:05d}.safetensors"


def shard_paths(path: str | Path) -> list[Path]:
    """The files of the ranks in a checkpoint that has been checked, in their order."""
    return sorted(Path(path).glob("rank-*.safetensors"))


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that nobody writes to; the format wants them contiguous and sharing no memory."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileFacts:
    """Writes one rank's tensors (see :func:`host_copies`) and forces them to disk.

    Raises:
        OSError: the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # It hides the number of the operating system's error.
        code = re.search(r"os error (\d+)", str(error))
        number = int(code.group(1)) if code else 5
        raise OSError(number, os.strerror(number), str(path)) from error
    return sync_file(path)


def sync_file(path: Path) -> FileFacts:
    """Forces a file to disk and describes it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return FileFacts(os.fstat(file.fileno()).st_size, digest)


def publish(
    draft: Path, *, epoch: int, files: Mapping[str, FileFacts], state: Mapping[str, Any]
) -> Path:
    """Writes the manifest of a complete draft and gives the checkpoint its name.

    Args:
        draft: the directory with all files, see :func:`draft_path`.
        epoch: the last epoch that it holds.
        files: what was written, by name.
        state: everything that is no tensor.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "epoch": epoch,
        "files": {name: {"bytes": f.num_bytes, "sha256": f.sha256} for name, f in files.items()},
        "state": dict(state),
    }
    manifest[_HASH] = _manifest_hash(manifest)
    with (draft / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(draft)
    target = draft.parent / directory_name(epoch)
    if target.exists():  # Damaged, or of a run that went back: not to be mixed with ours.
        old = target.with_name(f".{target.name}.old{DRAFT_SUFFIX}")
        target.rename(old)
        draft.rename(target)
        shutil.rmtree(old)
    else:
        draft.rename(target)
    _sync_directory(target.parent)
    return target


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint's manifest and every byte that it vouches for.

    Raises:
        CheckpointError: something is missing, damaged or foreign.
    """
    manifest = _read_manifest(path)
    files = manifest["files"]
    if not isinstance(files, dict) or shard_name(0) not in files:
        raise CheckpointError(f"{MANIFEST_FILE} lists no file of rank 0")
    for name, facts in files.items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{MANIFEST_FILE} lists a foreign file")
        _check_file(path / name, FileFacts(facts["bytes"], facts["sha256"]))
    return Checkpoint(path, manifest["epoch"], manifest)


def names(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, sound or not, the newest first."""
    found = os.listdir(folder) if folder.is_dir() else []
    return sorted((name for name in found if _NAME.fullmatch(name)), key=_epoch_of, reverse=True)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint, and what is wrong with each newer one."""
    complaints: list[str] = []
    for name in names(folder):
        try:
            return read(folder / name), complaints
        except CheckpointError as error:
            complaints.append(f"{folder / name}: {error}")
    return None, complaints


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` checkpoints and the best of them all.

    The best is the one whose own epoch had the highest validation figure, the earliest of ties.
    """
    present = names(folder)
    figures: dict[str, float] = {}
    for name in reversed(present):
        try:
            val = _read_manifest(folder / name)["state"].get("val")
        except CheckpointError:
            continue
        if val is not None:
            figures[name] = val
    best = max(figures, key=lambda name: figures[name], default=None)
    for name in present[keep:]:
        if name != best:
            remove(folder / name)


def remove(path: Path) -> None:
    """Deletes a checkpoint; one that is half deleted does not look like one."""
    doomed = path.with_name(f".{path.name}.old{DRAFT_SUFFIX}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def clean(folder: Path) -> None:
    """Deletes what a killed run was writing or deleting."""
    for name in os.listdir(folder) if folder.is_dir() else []:
        if name.startswith(".epoch-") and name.endswith(DRAFT_SUFFIX):
            shutil.rmtree(folder / name, ignore_errors=True)


def damaged(complaints: Sequence[str]) -> UserError:
    """The error for a folder whose checkpoints are all damaged."""
    return UserError(
        f"`checkpoint.resume` finds no sound checkpoint ({'; '.join(complaints)}); restore one,"
        " or delete them to start from the first epoch"
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{MANIFEST_FILE} cannot be read ({error.strerror})") from None
    except ValueError:
        raise CheckpointError(f"{MANIFEST_FILE} is no JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{MANIFEST_FILE} is not of the format {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"version {manifest.get('version')} is not {VERSION}")
    if manifest.get(_HASH) != _manifest_hash(manifest):
        raise CheckpointError(f"{MANIFEST_FILE} does not match its SHA-256")
    if _NAME.fullmatch(path.name) and _epoch_of(path.name) != manifest["epoch"]:
        raise CheckpointError(f"it holds epoch {manifest['epoch']}")
    return manifest


def _check_file(path: Path, facts: FileFacts) -> None:
    try:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != facts.num_bytes:
                raise CheckpointError(f"{path.name} has {num_bytes} of {facts.num_bytes} bytes")
            if hashlib.file_digest(file, "sha256").hexdigest() != facts.sha256:
                raise CheckpointError(f"{path.name} does not match its SHA-256")
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from None


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != _HASH}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _epoch_of(name: str) -> int:
    return int(name.removeprefix("epoch-"))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
