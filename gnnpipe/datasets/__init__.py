"""Data sets by name or path: every one arrives as a validated Graph."""

import difflib
from dataclasses import replace
from pathlib import Path

from gnnpipe.datasets.digits import digits
from gnnpipe.datasets.features import choose_features, normalise_rows
from gnnpipe.datasets.npz import load_npz
from gnnpipe.datasets.ogb import OGB_NAMES, read_ogb
from gnnpipe.datasets.planetoid import PLANETOID_NAMES, planetoid
from gnnpipe.datasets.pyg import from_pyg, load_pt
from gnnpipe.datasets.synthetic import synthetic
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph

__all__ = ["NAMES", "from_pyg", "load_graph"]

NAMES = ("digits", *PLANETOID_NAMES, *OGB_NAMES)
FILE_READERS = {".npz": load_npz, ".pt": load_pt}
UNDIRECTED = {"auto": False, "false": False, "true": True}


def load_graph(  # the fields of the `data` section, and its seed
    name: str,
    *,
    root: str | None = None,
    split: str = "public",
    undirected: str | bool = "auto",
    features: str = "auto",
    row_normalize: bool = False,
    seed: int = 0,
) -> Graph:
    """Reads a data set.

    Args:
        name: ``digits``; ``cora``, ``citeseer``, ``pubmed``; ``ogbn-arxiv``, ``-products``,
            ``-proteins``, ``-papers100M``, ``-mag``; or a path that ends in ``.npz`` or ``.pt``
            (a PyG ``Data``).
        root: folder of the Planetoid or OGB files, see
            :func:`gnnpipe.datasets.planetoid.planetoid` and :func:`gnnpipe.datasets.ogb.read_ogb`;
            the folder that a relative path starts from.
        split: ``public`` is the data set's own; Planetoid also has ``full`` and ``random``.
        undirected: True adds the reverse of each edge, False keeps the data's own directions;
            so does ``auto``, except of ogbn-arxiv, whose models read citations both ways.
        features: ``auto`` keeps the data's own; ``surrogate`` and ``degree`` make them from the
            graph and say so in ``features_note``.
        row_normalize: divide each node's features by the sum of their magnitudes.
        seed: of the digits' split, random splits and surrogate features.

    Raises:
        UserError: there is no such data set, or its files are not sound.
    """
    symmetrise = UNDIRECTED.get(str(undirected).lower())
    if symmetrise is None:
        raise UserError(f"`data.undirected` (={undirected}) must be one of auto, true, false")
    graph = _read(name, root=root, split=split, seed=seed)
    is_usual = name.lower() == "ogbn-arxiv" and str(undirected).lower() == "auto"
    if symmetrise or is_usual:
        graph = graph.symmetrised()
    graph = choose_features(graph, features, seed=seed)
    if row_normalize:
        graph = replace(graph, features=normalise_rows(graph.features))
    graph.validate()
    return graph


def _read(name: str, *, root: str | None, split: str, seed: int) -> Graph:
    if name.lower() in PLANETOID_NAMES:
        return planetoid(name.lower(), root=root, split=split, seed=seed)
    if split != "public":
        raise UserError(
            f"`data.split` (={split}) must be public, the data set's own; "
            f"only {', '.join(PLANETOID_NAMES)} have others"
        )
    if name.lower() == "digits":
        return digits(seed=seed)
    if name.lower() in OGB_NAMES:
        return read_ogb(name.lower(), root=root)
    if name.lower().startswith("synthetic:"):
        return synthetic(name.lower(), seed=seed)
    path = Path(root or "", name).expanduser()
    reader = FILE_READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(_unknown(name))
    if not path.is_file():
        raise UserError(f"`data.name` (={name}) must be an existing file; there is no {path}")
    return reader(path)


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.0)[0]
    return (
        f"`data.name` (={name}) must be one of {', '.join(NAMES)} or a path that ends in .npz "
        f"or .pt; the nearest name is {nearest}"
    )
