"""METIS as a function: it runs in a child process, so its crash is an error message here.

METIS answers bad or huge input with a signal, an exit or empty parts, without a word. The child
gets plain array files in a temporary directory and leaves one; nothing is pickled.
"""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from partition.errors import PartitionError

BYTES_PER_EDGE = 100
"""METIS's peak memory per directed edge, measured on graphs of 20 and 115 million edges."""

MIN_TIMEOUT_S = 300.0
TIMEOUT_S_PER_EDGE = 20e-6
"""Twenty times the measured time per directed edge."""

GIB = 2**30


def cut(
    adjacency: csr_array,
    work: NDArray[np.int64],
    *,
    num_parts: int,
    seed: int,
    least: int | None = None,
) -> NDArray[np.int32]:
    """Cuts a graph into parts of equal work with few edges between them.

    Args:
        adjacency: ``[N, N]``, symmetric, without self loops (:func:`adjacency.symmetrised`).
        work: vertex weights, ``[N]``.
        num_parts: number of parts; none of them is empty in the result.
        seed: METIS's seed; the same seed gives the same parts.
        least: so many parts will do if METIS leaves some of a few nodes each empty; those that
            have nodes are counted anew. None: ``num_parts``.

    Returns:
        Part of each node, ``[N]``, in ``[0, num_parts)``.

    Raises:
        PartitionError: too little memory, a crash, a timeout, an absurd or an empty result.
    """
    num_nodes = len(work)
    if num_parts == 1:
        return np.zeros(num_nodes, dtype=np.int32)
    if num_parts > num_nodes:
        raise _empty_parts(num_parts - num_nodes, num_parts, num_nodes)
    require_memory(adjacency.nnz)
    part_id = _run_child(adjacency, work, num_parts=num_parts, seed=seed)
    _require_sane(part_id, num_parts=num_parts, num_nodes=num_nodes)
    found, part_id = np.unique(part_id, return_inverse=True)
    if len(found) < (least or num_parts):
        raise _empty_parts(num_parts - len(found), num_parts, num_nodes)
    return part_id.astype(np.int32)


def require_memory(num_edges: int) -> None:
    """Refuses a graph for which METIS would need more memory than there is.

    Args:
        num_edges: directed edges, both directions counted.

    Raises:
        PartitionError: the estimate exceeds the available memory.
    """
    available = available_bytes()
    needed = BYTES_PER_EDGE * num_edges
    if available is not None and needed > available:
        raise PartitionError(
            f"`method` (=metis) needs about {needed / GIB:.1f} GiB for {num_edges} directed edges "
            f"but {available / GIB:.1f} GiB are available; use method bfs or contiguous"
        )


def available_bytes() -> int | None:
    """Memory that a new process can have, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kib[0]) * 1024 if kib else None


def child_command(directory: str, num_parts: int, seed: int) -> list[str]:
    """The command line of the child.

    The file itself with -P, not -m: no folder of the user's or of this package comes first on the
    import path, and the package, with scipy, is not loaded again.
    """
    program = Path(__file__).with_name("metis_child.py")
    return [sys.executable, "-P", str(program), directory, str(num_parts), str(seed)]


def timeout_s(num_edges: int) -> float:
    """Time after which a child counts as stuck, in seconds."""
    return MIN_TIMEOUT_S + TIMEOUT_S_PER_EDGE * num_edges


def _run_child(
    adjacency: csr_array, work: NDArray[np.int64], *, num_parts: int, seed: int
) -> NDArray[Any]:
    """Hands the graph to the child through files and reads its answer."""
    with tempfile.TemporaryDirectory(prefix="partition-") as directory:
        folder = Path(directory)
        arrays = {"indptr": adjacency.indptr, "indices": adjacency.indices, "work": work}
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        limit_s = timeout_s(adjacency.nnz)
        try:
            done = subprocess.run(
                child_command(directory, num_parts, seed),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PartitionError(
                f"METIS did not finish within {limit_s:.0f} s; use method bfs or contiguous"
            ) from None
        if done.returncode != 0:
            raise PartitionError(_failure(done.returncode, done.stderr))
        try:
            return np.asarray(np.load(folder / "part.npy", allow_pickle=False))
        except (OSError, ValueError, EOFError):
            raise PartitionError(
                "METIS left no readable result; use method bfs or contiguous"
            ) from None


def _failure(returncode: int, stderr: bytes) -> str:
    """What ended the child, in one line."""
    if returncode < 0:
        try:
            name = signal.Signals(-returncode).name
        except ValueError:
            name = f"signal {-returncode}"
        return f"METIS was ended by {name}; use method bfs or contiguous"
    lines = stderr.decode(errors="replace").strip().splitlines()
    reason = lines[-1].rstrip(".") if lines else "no message"
    return f"METIS failed with exit status {returncode} ({reason}); use method bfs or contiguous"


def _require_sane(part_id: NDArray[Any], *, num_parts: int, num_nodes: int) -> None:
    """Refuses results of the wrong form."""
    is_ids = part_id.shape == (num_nodes,) and np.issubdtype(part_id.dtype, np.integer)
    if not is_ids or part_id.min() < 0 or part_id.max() >= num_parts:
        raise PartitionError(
            f"METIS answered {part_id.dtype} {list(part_id.shape)} where {num_nodes} part ids in "
            f"[0, {num_parts}) were asked for; use method bfs or contiguous"
        )


def _empty_parts(num_empty: int, num_parts: int, num_nodes: int) -> PartitionError:
    return PartitionError(
        f"METIS leaves {num_empty} of {num_parts} parts empty on {num_nodes} nodes; "
        "cut into fewer chunks or use method bfs or contiguous"
    )
