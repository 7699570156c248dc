"""Graph parallelism, pipeline, hybrid and the planner's pick over links of one speed.

    python benchmarks/parallel.py --quick             # two cells and a check, under 5 minutes
    python benchmarks/parallel.py --part profiles     # times the layers: on a quiet machine
    python benchmarks/parallel.py                     # all 16 cells
    python benchmarks/parallel.py --part every        # four cells, every setting
    python benchmarks/parallel.py --part dilation     # one cell at several dilations
    python benchmarks/parallel.py --part check        # emulation beside real epochs, 2 ranks
    python benchmarks/parallel.py --part bandwidth    # one cell, 100 Mbit/s to 10 Gbit/s
    python benchmarks/parallel.py --part depth        # one cell, 8 to 128 layers
    python benchmarks/parallel.py --report            # the tables of what is there

Ranks sleep their measured single-threaded times and send real messages over shaped links, all of
it slowed down alike (emulation in dilated time, see slept_stage.py). Cells that are in the results
file are not run again, and ``--budget-s`` ends before a cell that would not fit. Layer times and
cuts are measured and made once for each graph and model, and kept in ``--work``: remove it to
measure them anew. Needs root.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from parallel_rank import run_rank
from parallel_table import table
from parallel_world import Case, cut_of, dilation_of, measured
from shaped_links import why_not

from gnnpipe import chunk
from gnnpipe.config import Config, load_config
from gnnpipe.configured import model_layers
from gnnpipe.costs import Links, Profile, load_profile, save_profile
from gnnpipe.datasets import load_graph
from gnnpipe.graph import Graph
from gnnpipe.planner import Planner
from gnnpipe.planning import PROFILE_CHUNKS, profile_of, shape_of
from gnnpipe.preflight import thread_variables
from gnnpipe.setting import GraphShape, Prediction, Setting, choose, settings

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
CHUNKS = 32
PLANNED_CHUNKS = (8, 16, 32, 64)
EVERY = (
    ("squirrel", "gcn"),
    ("squirrel", "sage"),
    ("amazon_computers", "gcnii"),
    ("coauthor_physics", "resgcn+"),
)
"""Where every setting is tried."""
HOPELESS = 1.5
"""Settings that are predicted to take that many times the quickest one's epoch are left out."""

DILATIONS = (0.5, 1.0, 2.0, 4.0)
"""Times the one that the rule gives."""


class Cell(NamedTuple):
    """One line of the results."""

    part: str
    graph: str
    model: str
    num_ranks: int = RANKS
    num_layers: int = LAYERS
    mbit: float | None = None
    """None: the speed that gives graph parallelism the published balance."""
    slower: float = 1.0
    """Factor on the dilation that the rule gives."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its line from others."""
        name = f"{self.graph} {self.model}"
        asked = {"asked_mbit": self.mbit, "layers": self.num_layers, "ranks": self.num_ranks}
        asked["slower"] = self.slower
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
    work = Path(options.work).resolve()
    if options.case is not None:
        return run_rank(Path(options.case))
    if options.profile_of is not None:
        graph, model, path = options.profile_of
        return _save_profile(Cell("profiles", graph, model), Path(path), work)
    results = Path(options.results)
    if not options.report:
        reason = why_not()
        if reason is not None:
            sys.exit(f"error: {reason}")
        torch.set_num_threads(1)
        work.mkdir(parents=True, exist_ok=True)
        if options.part == "profiles":
            for cell in _cells(options):
                _profile(cell, work)
            return None
        run_all(list(_cells(options)), results, work, budget_s=options.budget_s)
    sys.stdout.write(table(_lines(results)) + "\n")
    return None


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
    config, graph = load_config(None, cell.overrides), _graph(cell.graph)[0]
    profile, path = _profile(cell, work)
    mbit = cell.mbit or _balanced_mbit(cell, config, profile)
    planner = _planner(config, cell, profile, mbit)
    wanted = _settings(cell, planner, graph)
    dilation = 1.0 if cell.part == "check" else dilation_of(cell.num_ranks, mbit) * cell.slower
    case = Case(cell.overrides, path, graph, mbit, work, dilation)
    figures = measured(case, wanted)
    line: dict[str, Any] = {"mbit": mbit, "hidden": HIDDEN, "dilation": dilation}
    line["one_rank_s"] = planner.predict(Setting(1, 1, 1, 1)).epoch_s
    for label, predicted in wanted.items():
        line[label] = figures[label] | {
            "setting": list(predicted.setting),
            "predicted_s": predicted.epoch_s,
            "predicted_bubble": predicted.bubble_fraction,
        }
    if cell.part == "check":
        real = measured(case._replace(dilation=None), wanted)
        line |= {f"real {label}": found for label, found in real.items()}
    return line


def _planner(config: Config, cell: Cell, profile: Profile, mbit: float) -> Planner:
    graph, shape = _graph(cell.graph)
    links = Links(mbit / 1e3, 0.0, mbit / 1e3, 1)  # Shaped links have no delay of their own.
    return Planner(model_layers(config, graph), shape, profile=profile, links=links)


def _settings(cell: Cell, planner: Planner, graph: Graph) -> dict[str, Prediction]:
    """What is compared: the curves and checks leave out what the headline cells show."""
    ranks = cell.num_ranks
    wanted = {"graph": Setting(1, ranks, 1, 1), "pipeline": Setting(ranks, 1, CHUNKS, 1)}
    if cell.part in ("cells", "dilation"):
        wanted["interleaved"] = Setting(ranks, 1, CHUNKS, 2)
        wanted["hybrid"] = Setting(ranks // 2, 2, CHUNKS // 2, 1)
    found = {label: planner.predict(setting) for label, setting in wanted.items()}
    if cell.part in ("check", "dilation"):
        return found
    counts = {"num_layers": cell.num_layers + 2, "num_nodes": graph.num_nodes}
    possible = [planner.predict(s) for s in settings(ranks, chunks=PLANNED_CHUNKS, **counts)]
    found["planner"] = choose(possible)
    if cell.part == "every":
        least_s = found["planner"].epoch_s
        emulated = [p for p in possible if p.setting.num_ranks == ranks]
        emulated = [p for p in emulated if p.epoch_s <= HOPELESS * least_s]
        found |= {" ".join(map(str, p.setting)): p for p in emulated}
    return found


def _profile(cell: Cell, work: Path) -> tuple[Profile, Path]:
    """Times of this graph's and model's layers, in a process of its own; depth does not matter.

    For a check two processes measure at once: as real ranks do, they share the memory's bandwidth.
    """
    is_check = cell.part == "check"
    name = f"{cell.graph}-{cell.model}-{HIDDEN}{'-beside' * is_check}"
    path = work / f"{name}.json"
    if not path.exists():
        for count in PROFILE_CHUNKS:
            cut_of(_graph(cell.graph)[0], Setting(1, 1, count, 1), work)
        made = [work / f"{name}-{number}.tmp" for number in range(1 + is_check)]
        program = [sys.executable, str(Path(__file__).resolve()), "--work", str(work)]
        program += ["--profile-of", cell.graph, cell.model]
        environment = os.environ | thread_variables(1)
        children = [subprocess.Popen([*program, str(own)], env=environment) for own in made]
        statuses = [child.wait() for child in children]
        assert not any(statuses), statuses
        made[0].rename(path)
    return load_profile(path), path


def _save_profile(cell: Cell, path: Path, work: Path) -> None:
    """Measures; started by :func:`_profile`, all loading before any has measured much."""
    graph, config = _graph(cell.graph)[0], load_config(None, cell.overrides)
    cuts = [chunk.load(cut_of(graph, Setting(1, 1, c, 1), work)) for c in PROFILE_CHUNKS]
    torch.set_num_threads(1)
    save_profile(profile_of(graph, config, cuts=cuts), path)


def _balanced_mbit(cell: Cell, config: Config, profile: Profile) -> float:
    """Link speed at which graph parallelism should wait for 63% of its epoch."""
    low, high = 1.0, 1e6
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        found = _planner(config, cell, profile, middle).predict(Setting(1, cell.num_ranks, 1, 1))
        low, high = (middle, high) if found.bubble_fraction > PUBLISHED_SHARE else (low, middle)
    return low


@cache
def _graph(name: str) -> tuple[Graph, GraphShape]:
    """The graph, and its counts; cutting it into ways, which counts mirrors, happens once."""
    features = "surrogate" if name == "ogbn_arxiv" else "auto"
    graph = load_graph(str(DATA / f"{name}.npz"), features=features)
    shape = shape_of(graph)
    return graph, shape._replace(ways=cache(shape.ways), chunks=cache(shape.chunks))


def _lines(results: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, results.read_text().splitlines())) if results.exists() else []


def _cells(options: argparse.Namespace) -> Iterator[Cell]:
    if options.quick or options.part in ("cells", "profiles"):
        pairs = QUICK if options.quick else [(g, m) for g in GRAPHS for m in MODELS]
        chosen = set(options.only or [])
        for graph, model in pairs:
            if not chosen or f"{graph}:{model}" in chosen:
                yield Cell("cells", graph, model)
        if options.part == "profiles":
            yield from (Cell("check", *pair, num_ranks=2) for pair in CHECKED)
    if options.quick:
        yield Cell("check", *CHECKED[0], num_ranks=2)
    elif options.part == "check":
        yield from (Cell("check", *pair, num_ranks=2) for pair in CHECKED)
    elif options.part == "every":
        yield from (Cell("every", *pair) for pair in EVERY)
    elif options.part == "dilation":
        yield from (Cell("dilation", *QUICK[0], slower=factor) for factor in DILATIONS)
    elif options.part == "bandwidth":
        yield from (Cell("bandwidth", *CURVE, mbit=mbit) for mbit in SPEEDS_MBIT)
    elif options.part == "depth":
        yield from (Cell("depth", *CURVE, num_layers=layers) for layers in DEPTHS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two cells and a check")
    parts = ("cells", "profiles", "every", "dilation", "check", "bandwidth", "depth")
    parser.add_argument("--part", choices=parts, default="cells", help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="GRAPH:MODEL", help="these cells")
    parser.add_argument("--budget-s", type=float, default=float("inf"), metavar="S")
    parser.add_argument("--results", default="benchmarks/results/parallel.jsonl")
    parser.add_argument("--work", default="runs/parallel", help="layer times and cuts")
    parser.add_argument("--report", action="store_true", help="print the tables, run nothing")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--profile-of", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
