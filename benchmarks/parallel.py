"""Graph parallelism, pipeline, hybrid and the planner's pick over links of one speed.

    python benchmarks/parallel.py --quick             # under 5 minutes
    python benchmarks/parallel.py                     # all 16 cells
    python benchmarks/parallel.py --report FILE       # the table of a results file

Ranks sleep their measured single-threaded times and send real messages over shaped links
(emulation, see slept_stage.py). Finished cells are kept in the results file and not run again.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from shaped_links import inside, shaped_links, why_not
from slept_stage import Shape, SleptStage

from gnnpipe import chunk
from gnnpipe.assembly import Plan, build_engine, stage_bounds
from gnnpipe.comm import KINDS, Comm
from gnnpipe.config import Config, load_config
from gnnpipe.configured import model_layers
from gnnpipe.costs import Links, Profile, load_profile, save_profile
from gnnpipe.datasets import load_graph
from gnnpipe.graph import Graph
from gnnpipe.mesh import Mesh
from gnnpipe.metrics import time_shares
from gnnpipe.planner import Planner, Setting, choose, settings
from gnnpipe.planning import profile_of, shape_of
from gnnpipe.reports import Reports
from gnnpipe.world import World, join, make_groups
from partition import assign

DATA = Path(os.environ.get("GNNPIPE_DATA", Path(__file__).resolve().parents[2] / "shared/data"))
GRAPHS = ("squirrel", "coauthor_physics", "amazon_computers", "ogbn_arxiv")
MODELS = ("gcn", "sage", "gcnii", "resgcn+")
QUICK = (("squirrel", "gcn"), ("amazon_computers", "gcnii"))
PUBLISHED_SHARE = 0.63
"""Of graph parallelism's epoch spent in communication, mean of the published cells."""
WARM_UP, EPOCHS = 1, 3
CHUNKS = 32
LATENCY_US = 300.0
CELL_S = 900.0
"""Longest wait for all settings of a cell."""


def main() -> None:
    """Runs the cells that have no result yet, then prints the table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Leaves no namespace behind.
    options = _options()
    if options.case is not None:
        return run_rank(Path(options.case))
    results = Path(options.results)
    if not options.report:
        reason = why_not()
        if reason is not None:
            sys.exit(f"error: {reason}")
        cells = QUICK if options.quick else [(g, m) for g in GRAPHS for m in MODELS]
        for graph, model in cells:
            run_cell(graph, model, options, results)
    sys.stdout.write(table([json.loads(line) for line in results.read_text().splitlines()]) + "\n")


def run_cell(name: str, model: str, options: argparse.Namespace, results: Path) -> None:
    """Profiles one cell, chooses the link speed, runs every setting; appends one line."""
    done = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    identity = {"cell": f"{name} {model}", "layers": options.layers, "ranks": options.ranks}
    if any(all(line[k] == v for k, v in identity.items()) for line in done):
        return
    config = load_config(
        None,
        [
            f"model.name={model}",
            f"model.num_layers={options.layers}",
            f"model.hidden_channels={options.hidden}",
        ],
    )
    graph = load_graph(
        str(DATA / f"{name}.npz"), features="auto" if name != "ogbn_arxiv" else "surrogate"
    )
    torch.set_num_threads(1)
    profile = profile_of(graph, config)
    mbit = options.mbit or balanced_mbit(graph, config, profile, options.ranks)
    links = Links(mbit / 1e3, LATENCY_US, mbit / 1e3, 1)
    planner = Planner(model_layers(config, graph), shape_of(graph), profile=profile, links=links)
    ranks = options.ranks
    wanted = {
        "graph": Setting(1, ranks, 1, 1),
        "pipeline": Setting(ranks, 1, CHUNKS, 1),
        "interleaved": Setting(ranks, 1, CHUNKS, 2),
        "hybrid": Setting(ranks // 2, 2, CHUNKS // 2, 1),
    }
    num_layers = options.layers + 2
    found = [
        planner.predict(s)
        for s in settings(
            ranks, num_layers=num_layers, chunks=[8, 16, 32, 64], num_nodes=graph.num_nodes
        )
    ]
    wanted["planner"] = choose(found).setting
    line: dict[str, Any] = identity | {"mbit": mbit, "hidden": options.hidden}
    line["one_rank_s"] = planner.predict(Setting(1, 1, 1, 1)).epoch_s
    with tempfile.TemporaryDirectory() as folder:
        figures: dict[Setting, dict[str, Any]] = {}
        for size in {s.num_stages * s.num_ways for s in wanted.values()}:
            own = {s for s in wanted.values() if s.num_stages * s.num_ways == size}
            figures |= measure(config, graph, sorted(own), profile, mbit, Path(folder) / f"{size}")
        for label, setting in wanted.items():
            predicted = planner.predict(setting)
            line[label] = figures[setting] | {
                "setting": list(setting),
                "predicted_s": predicted.epoch_s,
                "predicted_bubble": predicted.bubble_fraction,
            }
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def balanced_mbit(graph: Graph, config: Config, profile: Profile, ranks: int) -> float:
    """Link speed at which graph parallelism would communicate for 63% of its epoch, unhidden."""
    free = Links(1e9, 0.0, 1e9, 1)
    planner = Planner(model_layers(config, graph), shape_of(graph), profile=profile, links=free)
    found = planner.predict(Setting(1, ranks, 1, 1))
    rank_bytes = sum(found.comm_bytes.values()) / ranks
    comm_s = found.epoch_s * PUBLISHED_SHARE / (1 - PUBLISHED_SHARE)
    return rank_bytes * 8e-6 / comm_s


def measure(
    config: Config,
    graph: Graph,
    wanted: list[Setting],
    profile: Profile,
    mbit: float,
    folder: Path,
) -> dict[Setting, dict[str, Any]]:
    """Emulates settings of one world size, in the same processes; rank 0's figures of each."""
    folder.mkdir()
    save_profile(profile, folder / "profile.json")
    for number, setting in enumerate(wanted):
        counts = {"num_chunks": setting.num_chunks, "num_ways": setting.num_ways}
        ids = assign(graph.indptr, graph.indices, **counts)
        cut = chunk.cut(graph, *ids, num_ways=setting.num_ways, method="metis", seed=0)
        chunk.save(cut, folder / f"partition-{number}")
    case = {
        "overrides": [
            f"model.name={config.model.name}",
            f"model.num_layers={config.model.num_layers}",
            f"model.hidden_channels={config.model.hidden_channels}",
        ],
        "settings": wanted,
        "directory": str(folder),
    }
    path = folder / "case.json"
    path.write_text(json.dumps(case))
    command = [sys.executable, str(Path(__file__).resolve()), "--case", str(path)]
    size = wanted[0].num_stages * wanted[0].num_ways
    with shaped_links(size, mbit) as names:
        children = [
            subprocess.Popen(inside(name, command), env=_environment(rank, size, folder))
            for rank, name in enumerate(names)
        ]
        try:
            statuses = [child.wait(timeout=CELL_S) for child in children]
        finally:
            for child in children:
                child.kill()
    assert not any(statuses), statuses
    found = json.loads((folder / "figures.json").read_text())
    return dict(zip(wanted, found, strict=True))


def run_rank(path: Path) -> None:
    """One rank of the emulated settings, one after the other."""
    case = json.loads(path.read_text())
    folder = Path(case["directory"])
    torch.set_num_threads(1)
    config = load_config(None, case["overrides"])
    profile = load_profile(folder / "profile.json")
    with join(device="cpu", timeout_s=200.0) as world:
        found = [
            emulate(config, Setting(*each), profile, folder / f"partition-{number}", world)
            for number, each in enumerate(case["settings"])
        ]
    if world.rank == 0:
        (folder / "figures.json").write_text(json.dumps(found))


def emulate(
    config: Config, setting: Setting, profile: Profile, partition: Path, world: World
) -> dict[str, Any]:
    """Some epochs of one setting; the middle one's figures on rank 0."""
    S, W, C, v = setting
    chunked = chunk.load(partition)
    layers = model_layers(config, chunked)
    like, mesh = torch.empty(0), Mesh(S, W)
    groups = make_groups(mesh, world.device)
    comm = Comm(mesh, world.rank, groups=groups, like=like, timeout_s=200.0)
    bounds = stage_bounds(layers, chunked, num_stages=S * v, sizes=None)
    plan = Plan(seed=0, bounds=bounds, virtual_stages=v, period=1, cross_chunk_gradient=1.0)
    engine = build_engine(chunked, layers, plan=plan, comm=comm, like=like)
    shape = Shape(profile, len(layers))
    for index, stage in engine.stages.items():
        engine.stages[index] = SleptStage(stage, comm, shape)  # type: ignore[assignment]
    reports = Reports(comm)
    epochs = []
    for epoch in range(1, WARM_UP + EPOCHS + 1):
        comm.sum_over_ranks(torch.zeros(1))
        comm.wait_s.clear()
        comm.sent_bytes.clear()
        comm.recorder.start()
        start_s = time.perf_counter()
        engine.train_step(epoch, list(range(C)))
        epoch_s = time.perf_counter() - start_s
        reports.take(comm.recorder.stop())
        sent = sum(comm.sent_bytes[kind] for kind in KINDS)
        own = [epoch_s, epoch_s - sum(comm.wait_s.values()), sent]
        parts = reports.send(torch.tensor(own, dtype=torch.float64))
        if parts and epoch > WARM_UP:
            lasted, computed, bytes_sent = torch.stack(parts).T.tolist()
            shares = time_shares(lasted, computed, reports.trace.transfer_s())
            epochs.append({"epoch_s": max(lasted), "sent_bytes": sum(bytes_sent), **shares})
    comm.flush()
    reports.flush()
    comm.sum_over_ranks(torch.zeros(1))
    if not epochs:
        return {}
    middle = sorted(epochs, key=lambda each: each["epoch_s"])[len(epochs) // 2]
    return middle | {"all_s": [each["epoch_s"] for each in epochs]}


def table(lines: list[dict[str, Any]]) -> str:
    """All cells, and true geometric means."""
    labels = ("graph", "pipeline", "interleaved", "hybrid", "planner")
    text = [
        "emulated: slept durations, real messages over shaped links",
        f"{'cell':<28}{'Mbit/s':>8}"
        + "".join(f"{label + ' ms':>16}" for label in labels)
        + f"{'graph/pipe':>12}{'bytes':>8}{'plan err':>10}",
    ]
    speed, volume = [], []
    for line in lines:
        ratio = line["graph"]["epoch_s"] / line["pipeline"]["epoch_s"]
        sent = line["graph"]["sent_bytes"] / line["pipeline"]["sent_bytes"]
        errors = [abs(line[x]["predicted_s"] / line[x]["epoch_s"] - 1) for x in labels]
        speed.append(ratio)
        volume.append(sent)
        times = "".join(f"{line[x]['epoch_s'] * 1e3:>16.1f}" for x in labels)
        text.append(
            f"{line['cell']:<28}{line['mbit']:>8.0f}{times}"
            f"{ratio:>12.2f}{sent:>8.2f}{max(errors):>10.1%}"
        )
        text.append(
            "    shares compute/wait/transfer  "
            + "  ".join(
                f"{x} {line[x]['compute']:.2f}/{line[x]['wait']:.2f}/{line[x]['transfer']:.2f}"
                for x in labels
            )
        )
    means = [math.exp(statistics.fmean(map(math.log, values))) for values in (speed, volume)]
    return "\n".join([*text, f"geometric means: time {means[0]:.2f}, bytes {means[1]:.2f}"])


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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two cells, under five minutes")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--mbit", type=float, help="link speed (default: the published balance)")
    parser.add_argument("--results", default="benchmarks/results/parallel.jsonl")
    parser.add_argument("--report", action="store_true", help="print the table and run nothing")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
