"""What cutting ways first costs the chunks: edge cut and halo of nested cells, beside plain METIS.

    python benchmarks/nesting.py --data ../shared/data

W = 1 is plain METIS into C chunks. With more ways a chunk is the union of one METIS cell of each
way, several small clusters instead of one large one, so that every way has its share of it.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from gnnpipe.datasets import load_graph
from partition import Quality, assign, quality

GRAPHS = ["cora", "coauthor_cs", "coauthor_physics", "amazon_computers", "squirrel"]
WAYS = (1, 2, 4, 8)


def main() -> int:
    """Cuts every graph for every number of ways and writes one table."""
    options = _parser().parse_args()
    text = "\n".join(_report(options))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return 0


def _report(options: argparse.Namespace) -> Iterator[str]:
    command = " ".join(["python benchmarks/nesting.py", *sys.argv[1:]])
    yield f"# Chunks of nested ways, C = {options.chunks}"
    yield ""
    yield f"`{command}`; {os.cpu_count()} CPU cores, {platform.machine()}; METIS seed 0."
    yield ""
    yield (
        "Edge cut: edges between chunks, of all edges. Replication: rows held per row, of chunks "
        "and of ways. Imbalance: largest over mean, of the work of chunks, of ways over an epoch, "
        "and of the cells of one chunk."
    )
    yield ""
    yield (
        "| graph | W | edge cut | chunk replication | way cut | way replication "
        "| chunk imbalance | way imbalance | cell imbalance |"
    )
    yield "| --- " + "| ---: " * 8 + "|"
    for name in options.graphs:
        graph = load_graph(str(options.data / f"{name}.npz"))
        for ways in WAYS:
            counts = {"num_chunks": options.chunks, "num_ways": ways}
            arrays = (graph.indptr, graph.indices)
            figures = quality(*arrays, assign(*arrays, **counts), **counts)
            yield f"| {name} | {ways} | {_figures(figures)} |"


def _figures(figures: Quality) -> str:
    shares = [f"{figures.edge_cut_fraction:.1%}", f"{figures.replication_factor:.2f}"]
    ways = [f"{figures.way_cut_fraction:.1%}", f"{figures.way_replication_factor:.2f}"]
    balance = (figures.work_imbalance, figures.way_work_imbalance, figures.cell_work_imbalance)
    return " | ".join([*shares, *ways, *(f"{value:.2f}" for value in balance)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="folder of the .npz graphs")
    add("--graphs", nargs="+", default=GRAPHS)
    add("--chunks", type=int, default=16)
    add("--out", type=Path, default=Path("benchmarks/results/nesting.md"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
