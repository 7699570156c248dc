"""The program that :mod:`partition.metis` runs: reads a graph's arrays, calls METIS, writes parts.

It imports nothing of the package: it starts as a plain file.
"""

import sys
from pathlib import Path

import numpy as np
import pymetis

MAX_BISECTED_PARTS = 8
"""Up to here recursive bisection balances better than METIS's k-way method and cuts no more."""


def main(directory: str, num_parts: int, seed: int) -> None:
    """Writes ``part.npy`` beside ``indptr.npy``, ``indices.npy`` and ``work.npy``."""
    folder = Path(directory)
    indptr, indices, work = (
        np.load(folder / f"{name}.npy", allow_pickle=False).astype(pymetis.zero_copy_dtype())
        for name in ("indptr", "indices", "work")
    )
    result = pymetis.part_graph(
        num_parts,
        pymetis.CSRAdjacency(indptr, indices),
        vweights=work,
        recursive=num_parts <= MAX_BISECTED_PARTS,
        options=pymetis.Options(seed=seed),
    )
    part_id = np.asarray(result.vertex_part, dtype=np.int32)  # [N]
    np.save(folder / "part.npy", part_id, allow_pickle=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
