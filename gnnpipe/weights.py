"""Weights on disk: named tensors in a ``.safetensors`` file, all of it or nothing.

The format itself detects truncated and foreign files but not flipped bits, so a digest of the
tensors travels in the metadata; files of other programs, which have none, load without it.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gnnpipe.errors import UserError

DIGEST_KEY = "sha256"


def save_weights(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes tensors under a temporary name, forces them to disk and renames the file.

    Args:
        path: The ``.safetensors`` file; its directory is created.
        tensors: By name, any shapes and devices; views and shared tensors are written out.
        metadata: Any texts; the key ``sha256`` is the file's own.
    """
    assert DIGEST_KEY not in metadata, f"metadata key {DIGEST_KEY!r} is reserved"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # Copies: the format refuses tensors that share memory.
    copies = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    try:
        save_file(copies, temporary, {**metadata, DIGEST_KEY: _digest(copies)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what :func:`save_weights` wrote.

    Returns:
        Tensors by name, on the CPU, and the metadata.

    Raises:
        UserError: The file is missing, truncated, damaged or not a ``.safetensors`` file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            metadata = dict(file.metadata() or {})
    except OSError as error:
        raise UserError(
            f"`weights` (={path}) must be readable ({error.strerror or error}); name the"
            " .safetensors file of a run"
        ) from None
    except SafetensorError as error:
        raise UserError(
            f"`weights` (={path}) must be a whole .safetensors file ({error}); train again or"
            " fetch a fresh copy"
        ) from None
    digest = metadata.pop(DIGEST_KEY, None)
    if digest is not None and digest != _digest(tensors):
        raise UserError(
            f"`weights` (={path}) must match its SHA-256, the tensors are damaged; train again"
            " or fetch a fresh copy"
        )
    return tensors, metadata


def check_weights(tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Checks that weights are those of a model.

    Args:
        tensors: Loaded weights by name.
        expected: Shape of each of the model's parameters by name.

    Raises:
        UserError: A tensor is missing, has another shape, or is not the model's.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"weights must hold `{name}`; load the weights of this very model")
        if tuple(tensors[name].shape) != tuple(shape):
            raise UserError(
                f"`{name}` (of shape {list(tensors[name].shape)}) must have the model's shape"
                f" {list(shape)}; load the weights of this very model"
            )
    for name in tensors:
        if name not in expected:
            raise UserError(
                f"`{name}` must be one of the model's parameters; load the weights of this very"
                " model"
            )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
