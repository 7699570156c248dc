"""The citation networks cora, citeseer and pubmed, read by torch_geometric's Planetoid.

PyG writes beside what it reads and downloads what it misses. Here it always works in a temporary
folder, so the user's files stay as they are and a broken download leaves nothing behind. The
files are Python pickles, which run code when read: take them from a source you trust.
"""

import contextlib
import io
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from gnnpipe.datasets.pyg import from_pyg, pyg_classes_allowed
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

PLANETOID_NAMES = ("cora", "citeseer", "pubmed")
SPLITS = ("public", "full", "random")
SUFFIXES = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")

logger = logging.getLogger(__name__)


def planetoid(name: str, *, root: str | None, split: str = "public", seed: int = 0) -> Graph:
    """Reads a Planetoid data set, features kept sparse.

    Args:
        name: ``cora``, ``citeseer`` or ``pubmed``.
        root: folder that holds ``NAME/raw/ind.*``, ``raw/ind.*`` or ``ind.*``; where there are
            none they are downloaded into ``root/NAME/raw``. None is ``$GNNPIPE_CACHE``, by
            default ``~/.cache/gnnpipe``.
        split: ``public``: 20 nodes of each class train, 500 validation, 1,000 test; ``full``:
            all others train; ``random``: public sizes, drawn from ``seed``.
        seed: of the random split.

    Raises:
        UserError: files are missing, damaged or cannot be downloaded.
    """
    if split not in SPLITS:
        raise UserError(f"`data.split` (={split}) must be one of {', '.join(SPLITS)} for {name}")
    if root is not None and not Path(root).expanduser().is_dir():
        raise UserError(f"`data.root` (={root}) must be an existing folder; create it")
    cache = root or os.environ.get("GNNPIPE_CACHE") or "~/.cache/gnnpipe"
    home = Path(cache).expanduser()
    raw = _find_raw(name, home) or _download(name, home)
    with tempfile.TemporaryDirectory(prefix="gnnpipe-") as scratch:
        Path(scratch, name).mkdir()
        Path(scratch, name, "raw").symlink_to(raw.resolve())
        try:
            data = _pyg_planetoid(Path(scratch), name, split=split, seed=seed)
        except Exception as error:  # damaged pickles raise anything
            reason = type(error).__name__
            raise UserError(
                f"{raw} holds damaged files ind.{name}.* ({reason}); replace them"
            ) from error
    return from_pyg(data, name=name, sparse_features=True)


def _file_names(name: str) -> list[str]:
    return [f"ind.{name}.{suffix}" for suffix in SUFFIXES]


def _find_raw(name: str, root: Path) -> Path | None:
    """The folder at or below ``root`` that holds the files, None when there is no trace."""
    own = [entry / "raw" for entry in sorted(root.glob("*")) if entry.name.lower() == name]
    for folder in (*own, root / "raw", root):
        missing = [file for file in _file_names(name) if not (folder / file).is_file()]
        if not missing:
            return folder
        if len(missing) < len(SUFFIXES):
            raise UserError(f"{folder} lacks {', '.join(missing)}; add the files or remove all")
    return None


def _download(name: str, home: Path) -> Path:
    target = home / name / "raw"
    logger.info("downloading %s into %s", name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".download-") as scratch:
            _pyg_planetoid(Path(scratch), name, split="public", seed=0)
            _move(Path(scratch, name, "raw"), target)
    except Exception as error:  # without a network fsspec raises what its transport raises
        files = ", ".join(_file_names(name))
        raise UserError(
            f"`data.name` (={name}) could not be downloaded ({type(error).__name__}); "
            f"put {files} into {target}, or set data.root to the folder that has them"
        ) from error
    return target


def _move(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first: its files are as good
            raise


def _pyg_planetoid(root: Path, name: str, *, split: str, seed: int) -> Any:  # untyped library
    # PyG reports its progress on stderr, where commands print one `error:` line.
    with pyg_classes_allowed(), contextlib.redirect_stderr(io.StringIO()):
        import torch
        from torch_geometric.datasets import Planetoid

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # PyG draws random splits from the global generator
            return Planetoid(str(root), name, split=split)[0]
