"""``python -m partition``: cuts a data set into chunks, reports the quality, writes the result."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from gnnpipe import chunk, store
from gnnpipe.datasets import load_graph
from gnnpipe.errors import UserError
from gnnpipe.graph import Graph
from partition import METHODS, PartitionError, Quality, assign, quality, table, verdict

EXAMPLES = """\
examples:
  python -m partition --dataset digits --num-chunks 16 --out parts/digits
  python -m partition --dataset graph.npz --num-chunks 32 --method metis-grouped --out parts/g
  python -m partition --dataset cora --root data --num-chunks 8 --num-ways 2 --out parts/c --json
  python -m partition --dataset graph.npz --num-chunks 4 --method file --file ids.txt --out parts/f

A run reads the result with partition.path=DIR; its data options must be the same.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Returns:
        0, or 2 after one ``error:`` line for a user's mistake.
    """
    options = _parser().parse_args(argv)
    try:
        figures = _run(options)
    except (UserError, PartitionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(_report(options, figures), allow_nan=False))
    else:
        print(table(figures))
        print(f"written: {options.out}")
    return 0


def _run(options: argparse.Namespace) -> Quality:
    """Loads, cuts, measures, writes."""
    store.require_free(options.out, chunk.FORMAT)
    _say(f"loading {options.dataset}")
    graph = _load(options)
    numbers = {"num_chunks": options.num_chunks, "num_ways": options.num_ways}
    _say(f"cutting {graph.num_nodes} nodes and {graph.num_edges} edges with {options.method}")
    assignment = assign(
        graph.indptr,
        graph.indices,
        **numbers,
        method=options.method,
        parts_per_chunk=options.parts_per_chunk,
        seed=options.seed,
        file=options.file,
    )
    _say("measuring")
    figures = quality(graph.indptr, graph.indices, assignment, **numbers)
    _say(f"writing {options.out}")
    chunked = chunk.cut(
        graph, *assignment, num_ways=options.num_ways, method=options.method, seed=options.seed
    )
    chunk.save(chunked, options.out, overwrite=options.overwrite)
    return figures


def _load(options: argparse.Namespace) -> Graph:
    return load_graph(
        options.dataset,
        root=options.root,
        split=options.split,
        undirected="auto" if options.undirected is None else options.undirected,
        features=options.features,
        row_normalize=options.row_normalize,
        seed=options.data_seed,
    )


def _report(options: argparse.Namespace, figures: Quality) -> dict[str, Any]:
    return {
        "dataset": options.dataset,
        "method": options.method,
        "parts_per_chunk": options.parts_per_chunk,
        "seed": options.seed,
        "out": options.out,
        "verdict": verdict(figures),
        **figures.to_dict(),
    }


def _say(step: str) -> None:
    """Shows a person what takes so long; elsewhere stderr holds nothing but an error line."""
    if sys.stderr.isatty():
        print(f"{step} ...", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """Usage errors are one ``error:`` line, as all mistakes are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see python -m partition --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m partition",
        description="Cut a graph into chunks (and ways), report the quality, write the result.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME|PATH", help="data set, .npz or PyG .pt file")
    add("--num-chunks", required=True, type=int, metavar="C", help="chunks of the pipeline")
    add("--num-ways", type=int, default=1, metavar="W", help="finest ways of a stage (1)")
    add("--method", choices=METHODS, default="metis", help="how to cut (metis)")
    add("--parts-per-chunk", type=int, metavar="K", help="METIS parts of metis-grouped (4)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the method (0)")
    add("--file", metavar="F", help="assignment of --method file: .npy or text, a row per node")
    add("--out", required=True, metavar="DIR", help="directory to write")
    add("--overwrite", action="store_true", help="replace another partition in DIR")
    add("--json", action="store_true", help="print the report as JSON")
    data = parser.add_argument_group("data options (as in a run's data section)")
    add = data.add_argument
    add("--root", metavar="DIR", help="where the data set's files are")
    add("--split", default="public", metavar="NAME", help="split (public)")
    add("--features", choices=("auto", "surrogate", "degree"), default="auto", help="(auto)")
    add("--undirected", action=argparse.BooleanOptionalAction, help="add reverse edges (auto)")
    add("--row-normalize", action="store_true", help="scale each row of features to sum 1")
    add("--data-seed", type=int, default=0, metavar="N", help="seed of splits and surrogates (0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
