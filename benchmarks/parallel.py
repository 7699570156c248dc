"""Graph parallelism, pipeline, hybrid and the planner's pick over links of one speed.

    python benchmarks/parallel.py --quick             # two cells and a check, under 5 minutes
    python benchmarks/parallel.py                     # all 16 cells
    python benchmarks/parallel.py --part check        # emulation beside real epochs, 2 ranks
    python benchmarks/parallel.py --part bandwidth    # one cell, 100 Mbit/s to 10 Gbit/s
    python benchmarks/parallel.py --part depth        # one cell, 8 to 128 layers
    python benchmarks/parallel.py --report            # the tables of what is there

Ranks sleep their measured single-threaded times and send real messages over shaped links
(emulation, see slept_stage.py). Cells that are in the results file are not run again, and
``--budget-s`` ends before a cell that would not fit. Layer times and cuts are measured and made
once for each graph and model, and kept in ``--work``: remove it to measure them anew. Needs root.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from parallel_rank import run_rank
from parallel_table import table
from shaped_links import inside, shaped_links, why_not

from gnnpipe import chunk
from gnnpipe.config import Config, load_config
from gnnpipe.configured import model_layers
from gnnpipe.costs import Links, Profile, load_profile, save_profile
from gnnpipe.datasets import load_graph
from gnnpipe.graph import Graph
from gnnpipe.planner import GraphShape, Planner, Setting, choose, settings
from gnnpipe.planning import profile_of, shape_of
from partition import assign

DATA = Path(os.environ.get("GNNPIPE_DATA", Path(__file__).resolve().parents[2] / "shared/data"))
GRAPHS = ("squirrel", "amazon_computers", "coauthor_physics", "ogbn_arxiv")
MODELS = ("gcn", "sage", "gcnii", "resgcn+")
QUICK = (("squirrel", "gcn"), ("amazon_computers", "gcnii"))
CURVE = ("amazon_computers", "gcn")
CHECKED = (("squirrel", "gcn"), ("amazon_computers", "gcnii"))
LAYERS, HIDDEN, RANKS = 32, 100, 8
SPEEDS_MBIT = (100.0, 300.0, 1000.0, 3000.0, 10_000.0)
DEPTHS = (8, 16, 32, 64, 128)
PUBLISHED_SHARE = 0.63
"""Of graph parallelism's epoch spent in communication, mean of the published cells."""
WARM_UP, EPOCHS = 1, 3
CHUNKS = 32
PLANNED_CHUNKS = (8, 16, 32, 64)
LATENCY_US = 300.0
CELL_S = 600.0
"""Longest wait for all settings of a cell."""


class Cell(NamedTuple):
    """One line of the results."""

    part: str
    graph: str
    model: str
    num_ranks: int = RANKS
    num_layers: int = LAYERS
    mbit: float | None = None
    """None: the speed that gives graph parallelism the published balance."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its line from others."""
        name = f"{self.graph} {self.model}"
        asked = {"asked_mbit": self.mbit, "layers": self.num_layers, "ranks": self.num_ranks}
        return {"part": self.part, "cell": name} | asked

    @property
    def overrides(self) -> list[str]:
        """The model."""
        depth = f"model.num_layers={self.num_layers}"
        return [f"model.name={self.model}", depth, f"model.hidden_channels={HIDDEN}"]


def main() -> None:
    """Runs the cells that have no result yet, then prints the tables."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Leaves no namespace behind.
    options = _options()
    if options.case is not None:
        return run_rank(Path(options.case))
    results, work = Path(options.results), Path(options.work).resolve()
    if not options.report:
        reason = why_not()
        if reason is not None:
            sys.exit(f"error: {reason}")
        torch.set_num_threads(1)
        work.mkdir(parents=True, exist_ok=True)
        run_all(list(_cells(options)), results, work, budget_s=options.budget_s)
    sys.stdout.write(table(_lines(results)) + "\n")


def run_all(cells: list[Cell], results: Path, work: Path, *, budget_s: float) -> None:
    """Runs what is missing, as long as there is time for a cell like the longest so far."""
    start_s, longest_s = time.monotonic(), 0.0
    for cell in cells:
        if any(cell.identity.items() <= line.items() for line in _lines(results)):
            continue
        cell_start_s = time.monotonic()
        if cell_start_s - start_s + longest_s > budget_s:
            sys.stderr.write("no time for the rest; the same command goes on\n")
            return
        line = cell.identity | run_cell(cell, work)
        lasted_s = time.monotonic() - cell_start_s
        longest_s = max(longest_s, lasted_s)
        with results.open("a") as file:
            file.write(json.dumps(line | {"cell_s": lasted_s}) + "\n")
        sys.stderr.write(f"{cell.part}: {line['cell']}: {lasted_s:.0f} s\n")


def run_cell(cell: Cell, work: Path) -> dict[str, Any]:
    """Profiles one cell, chooses the link speed, runs every setting."""
    config, (graph, shape) = load_config(None, cell.overrides), _graph(cell.graph)
    profile, path = _profile(cell, config, graph, work)
    mbit = cell.mbit or _balanced_mbit(cell, config, profile)
    links = Links(mbit / 1e3, LATENCY_US, mbit / 1e3, 1)
    planner = Planner(model_layers(config, graph), shape, profile=profile, links=links)
    wanted = _settings(cell, planner, graph)
    case = {"overrides": cell.overrides, "profile": str(path), "is_slept": True}
    figures = _measured(case, wanted, graph, mbit=mbit, work=work)
    line: dict[str, Any] = {"mbit": mbit, "hidden": HIDDEN}
    line["one_rank_s"] = planner.predict(Setting(1, 1, 1, 1)).epoch_s
    for label, setting in wanted.items():
        predicted = planner.predict(setting)
        line[label] = figures[label] | {
            "setting": list(setting),
            "predicted_s": predicted.epoch_s,
            "predicted_bubble": predicted.bubble_fraction,
        }
    if cell.part == "check":
        real = _measured(case | {"is_slept": False}, wanted, graph, mbit=mbit, work=work)
        line |= {f"real {label}": found for label, found in real.items()}
    return line


def _settings(cell: Cell, planner: Planner, graph: Graph) -> dict[str, Setting]:
    """What is compared: the curves and checks leave out what the headline cells show."""
    ranks = cell.num_ranks
    wanted = {"graph": Setting(1, ranks, 1, 1), "pipeline": Setting(ranks, 1, CHUNKS, 1)}
    if cell.part == "check":
        return wanted
    if cell.part == "cells":
        wanted["interleaved"] = Setting(ranks, 1, CHUNKS, 2)
        wanted["hybrid"] = Setting(ranks // 2, 2, CHUNKS // 2, 1)
    counts = {"num_layers": cell.num_layers + 2, "num_nodes": graph.num_nodes}
    possible = settings(ranks, chunks=PLANNED_CHUNKS, **counts)
    wanted["planner"] = choose([planner.predict(s) for s in possible]).setting
    return wanted


def _profile(cell: Cell, config: Config, graph: Graph, work: Path) -> tuple[Profile, Path]:
    """Times of this graph's and model's layers; depth does not matter."""
    path = work / f"{cell.graph}-{cell.model}-{HIDDEN}.json"
    if not path.exists():
        save_profile(profile_of(graph, config), path)
    return load_profile(path), path


def _balanced_mbit(cell: Cell, config: Config, profile: Profile) -> float:
    """Link speed at which graph parallelism would communicate for 63% of its epoch, unhidden."""
    graph, shape = _graph(cell.graph)
    layers, free = model_layers(config, graph), Links(1e9, 0.0, 1e9, 1)
    planner = Planner(layers, shape, profile=profile, links=free)
    found = planner.predict(Setting(1, cell.num_ranks, 1, 1))
    rank_bytes = sum(found.comm_bytes.values()) / cell.num_ranks
    comm_s = found.epoch_s * PUBLISHED_SHARE / (1 - PUBLISHED_SHARE)
    return rank_bytes * 8e-6 / comm_s


def _measured(
    case: dict[str, Any],
    wanted: Mapping[str, Setting],
    graph: Graph,
    *,
    mbit: float,
    work: Path,
) -> dict[str, dict[str, Any]]:
    """Figures by label; settings of one world size share their processes."""
    figures: dict[Setting, dict[str, Any]] = {}
    for size in sorted({setting.num_ranks for setting in wanted.values()}):
        own = sorted({s for s in wanted.values() if s.num_ranks == size})
        cuts = [str(_cut(graph, setting, work)) for setting in own]
        counts = {"warm_up": WARM_UP, "epochs": EPOCHS}
        path = work / "case.json"
        path.write_text(json.dumps(case | counts | {"settings": own, "partitions": cuts}))
        _run_ranks(path, size, mbit)
        found = json.loads((work / "figures.json").read_text())
        figures |= dict(zip(own, found, strict=True))
    return {label: figures[setting] for label, setting in wanted.items()}


def _run_ranks(path: Path, size: int, mbit: float) -> None:
    """One process in each namespace; none is left."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", str(path)]
    path.with_name("rendezvous").unlink(missing_ok=True)
    with shaped_links(size, mbit) as names:
        children = [
            subprocess.Popen(inside(name, command), env=_environment(rank, size, path.parent))
            for rank, name in enumerate(names)
        ]
        try:
            statuses = [child.wait(timeout=CELL_S) for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
    assert not any(statuses), statuses


def _cut(graph: Graph, setting: Setting, work: Path) -> Path:
    """Directory of the graph cut for a setting, made once."""
    C, W = setting.num_chunks, setting.num_ways
    path = work / f"{Path(graph.name).stem}-{C}-{W}"
    if not path.exists():
        ids = assign(graph.indptr, graph.indices, num_chunks=C, num_ways=W)
        chunk.save(chunk.cut(graph, *ids, num_ways=W, method="metis", seed=0), path)
    return path


@cache
def _graph(name: str) -> tuple[Graph, GraphShape]:
    """The graph, and its counts; cutting it into ways, which counts mirrors, happens once."""
    features = "surrogate" if name == "ogbn_arxiv" else "auto"
    graph = load_graph(str(DATA / f"{name}.npz"), features=features)
    shape = shape_of(graph)
    return graph, shape._replace(ways=cache(shape.ways))


def _lines(results: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, results.read_text().splitlines())) if results.exists() else []


def _environment(rank: int, size: int, directory: Path) -> dict[str, str]:
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "GNNPIPE_RENDEZVOUS": directory / "rendezvous",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": 1,
        "MKL_NUM_THREADS": 1,
        "NUMBA_NUM_THREADS": 1,
    }
    return os.environ | {name: str(value) for name, value in own.items()}


def _cells(options: argparse.Namespace) -> Iterator[Cell]:
    if options.quick or options.part == "cells":
        pairs = QUICK if options.quick else [(g, m) for g in GRAPHS for m in MODELS]
        chosen = set(options.only or [])
        for graph, model in pairs:
            if not chosen or f"{graph}:{model}" in chosen:
                yield Cell("cells", graph, model)
    if options.quick:
        yield Cell("check", *CHECKED[0], num_ranks=2)
    elif options.part == "check":
        yield from (Cell("check", *pair, num_ranks=2) for pair in CHECKED)
    elif options.part == "bandwidth":
        yield from (Cell("bandwidth", *CURVE, mbit=mbit) for mbit in SPEEDS_MBIT)
    elif options.part == "depth":
        yield from (Cell("depth", *CURVE, num_layers=layers) for layers in DEPTHS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two cells and a check")
    parts = ("cells", "check", "bandwidth", "depth")
    parser.add_argument("--part", choices=parts, default="cells", help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="GRAPH:MODEL", help="these cells")
    parser.add_argument("--budget-s", type=float, default=float("inf"), metavar="S")
    parser.add_argument("--results", default="benchmarks/results/parallel.jsonl")
    parser.add_argument("--work", default="runs/parallel", help="layer times and cuts")
    parser.add_argument("--report", action="store_true", help="print the tables, run nothing")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
