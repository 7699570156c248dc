"""Memory and time of converting an edge list of any size into rows.

    python benchmarks/interchange.py --edges 100000000 --nodes 10000000 --work /tmp/edges

The file is drawn here, block by block, and deleted afterwards. The conversion runs in a fresh
process whose peak resident memory is what the kernel says of it; libraries are part of it.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import csv, parquet

from gnnpipe.interchange import edge_list_rows

BLOCK = 2**22
BOUND_GIB = 8


def main() -> int:
    """Draws the file, converts it in a child, writes the figures."""
    options = _parser().parse_args()
    if options.convert:
        return _convert(options)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        lines = [_row(Path(folder), kind, options) for kind in options.kinds]
    text = "\n".join([*_head(), *lines])
    options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return 0


def _row(folder: Path, kind: str, options: argparse.Namespace) -> str:
    """One line of the table."""
    path = folder / f"edges.{kind}"
    _draw(path, options.edges, options.nodes)
    size_gb = path.stat().st_size / 1e9
    counts = ["--edges", str(options.edges), "--nodes", str(options.nodes)]
    command = [sys.executable, __file__, "--convert", str(path), *counts]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    path.unlink()
    seconds, peak = (float(word) for word in done.stdout.split())
    rows = (8 * (options.nodes + 1) + 4 * options.edges) / 2**30
    assert peak < BOUND_GIB, f"{peak:.2f} GiB"
    return (
        f"| {kind} | {options.edges:,} | {options.nodes:,} | {size_gb:.2f} | {rows:.2f} | "
        f"{peak:.2f} | {seconds:.0f} |"
    )


def _convert(options: argparse.Namespace) -> int:
    """In the child: the conversion alone."""
    start_s = time.perf_counter()
    indptr, indices = edge_list_rows(options.convert, num_nodes=options.nodes)
    seconds = time.perf_counter() - start_s
    assert len(indptr) == options.nodes + 1
    assert len(indices) == options.edges
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sys.stdout.write(f"{seconds} {peak}\n")
    return 0


def _draw(path: Path, num_edges: int, num_nodes: int) -> None:
    """Edges with a heavy tail of sources, uniform targets; never all in memory."""
    draw = np.random.default_rng(0)
    schema = pyarrow.schema([("source", pyarrow.int64()), ("target", pyarrow.int64())])
    plain = csv.WriteOptions(include_header=False)
    is_parquet = path.suffix == ".parquet"
    writer = (
        parquet.ParquetWriter(path, schema)
        if is_parquet
        else csv.CSVWriter(path, schema, write_options=plain)
    )
    with writer:
        for start in range(0, num_edges, BLOCK):
            count = min(BLOCK, num_edges - start)
            source = (draw.random(count) ** 2 * num_nodes).astype(np.int64)
            target = draw.integers(num_nodes, size=count)
            writer.write_table(pyarrow.table([source, target], schema=schema))


def _head() -> list[str]:
    command = " ".join(["python benchmarks/interchange.py", *sys.argv[1:]])
    return [
        "# Edge lists as rows: memory of the streamed conversion",
        "",
        f"`{command}`; {os.cpu_count()} CPU cores (shared), {platform.machine()}; seed 0.",
        "",
        "`rows` is what the result takes (8 bytes per node, 4 per edge), `peak` the largest "
        f"resident memory of the converting process, libraries included; the bound is "
        f"{BOUND_GIB} GiB.",
        "",
        "| file | edges | nodes | file, GB | rows, GiB | peak, GiB | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--edges", type=int, default=100_000_000)
    add("--nodes", type=int, default=10_000_000)
    add("--kinds", nargs="+", default=["csv", "parquet"])
    add("--work", type=Path, default=None, help="where the file is drawn")
    add("--convert", type=Path, default=None, help=argparse.SUPPRESS)
    add("--out", type=Path, default=Path("benchmarks/results/interchange.md"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
