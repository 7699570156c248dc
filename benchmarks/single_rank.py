"""One epoch on one rank, this project beside its peers, interleaved in one run.

    python benchmarks/single_rank.py --data ../shared/data --graphs physics --models gcn,sage

Every row is a process of its own (its peak memory is its own); the rounds go around the rows, one
epoch each, so that a busy machine slows all of them alike. An epoch is forward, backward and step.
CPU seconds are beside wall seconds: on a shared machine they vary less. Memory is the highest
resident size of the epochs after the first, less the resident size with libraries and graph loaded
(Linux): parameters, tables, activations, adjacency in the form that the system wants.

A cell is a graph and a model. What is done is in ``--results``, a line for each row, and is not
run again, so the table can be made a cell at a time. A row whose epoch takes longer than
``--limit`` seconds (the first, which also loads and compiles, three times that) is left out with
a word.
"""

import argparse
import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PEERS = {"pyg": "torch_geometric", "pyg-csr": "torch_geometric", "dgl": "dgl"}
HEADS = 4
GRAPHS = {
    "physics": ("coauthor_physics.npz", "auto", 32, 100),
    "arxiv": ("ogbn_arxiv.npz", "surrogate", 8, 128),
    "million": ("synthetic:1000000:10000000", "auto", 8, 64),
}
"""File or name, features, layers, width. A synthetic edge counts twice, once each way."""
SETTINGS = {
    "": {},
    "recompute": {"memory": {"mode": "recompute"}},
    "half": {"history": {"dtype": "bfloat16"}},
    "half recompute": {"memory": {"mode": "recompute"}, "history": {"dtype": "bfloat16"}},
    "bf16": {"training": {"precision": "bf16"}},
}
"""What a row of this project changes, by what stands after its number of chunks."""


def main() -> None:
    """Runs the cells that are missing and prints the table of all."""
    options = parse()
    if options.row:
        serve(options)
        return
    options.results.parent.mkdir(parents=True, exist_ok=True)
    peers = [f"gnnpipe C={row}" for row in options.rows.split(",")]
    for peer in filter(None, options.peers.split(",")):
        if peer != "dgl" and is_installed(PEERS[peer]):
            peers.append(peer)
        else:
            say(f"{peer}: skipped, {PEERS[peer]} cannot be used here")
    for graph in options.graphs.split(","):
        for model in options.models.split(","):
            done = {each["row"] for each in read(options, graph, model)}
            rows = [row for row in peers if row not in done and not is_same(row, model)]
            if rows:
                compare(graph, model, rows, options)
            table(graph, model, options)


def is_same(row: str, model: str) -> bool:
    """Whether a row repeats another one: attention has no CSR form."""
    return row == "pyg-csr" and model == "gat"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of .npz")
    parser.add_argument("--graphs", default="physics", help=f"of {', '.join(GRAPHS)}")
    parser.add_argument("--models", default="gcn,sage,gcnii,gat")
    parser.add_argument("--rows", default="1,1 recompute,32,32 half", help="chunks and settings")
    parser.add_argument("--peers", default="pyg,pyg-csr,dgl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of one epoch of a row")
    parser.add_argument("--results", type=Path, default=Path("runs/single_rank.jsonl"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def say(text: str) -> None:
    """One line of output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def is_installed(module: str) -> bool:
    """Whether a module imports, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", f"import {module}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def read(options: argparse.Namespace, graph: str, model: str) -> list[dict[str, Any]]:
    """The rows of a cell that are done."""
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if (row["graph"], row["model"]) == (graph, model)]


def compare(graph: str, model: str, rows: list[str], options: argparse.Namespace) -> None:
    """One process for each row; every round lets each run one epoch."""
    given = [f"--{key}={value}" for key, value in vars(options).items() if key != "row"]
    start = [sys.executable, "-W", "ignore", __file__, *given]
    start += [f"--graphs={graph}", f"--models={model}"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = {row: subprocess.Popen([*start, f"--row={row}"], **pipes) for row in rows}
    found: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    for turn in range(options.rounds + 1):
        for row, child in list(children.items()):
            # The first epoch loads, cuts and compiles as well.
            figures = epoch(child, options.limit * (1 if turn else 3))
            if figures is None or figures["wall_s"] > options.limit:
                say(f"{graph} {model} {row}: left out, an epoch took over {options.limit:g} s")
                children.pop(row).kill()
            elif turn:
                found[row].append(figures)
    for child in children.values():
        child.stdin.close()
        child.wait()
    with options.results.open("a") as file:
        for row, epochs in found.items():
            facts = {"graph": graph, "model": model, "row": row, "epochs": epochs}
            file.write(json.dumps(facts) + "\n")


def epoch(child: Any, limit_s: float) -> dict[str, float] | None:  # Any: a Popen with text pipes
    """Lets a row run one epoch; None if it does not come back."""
    child.stdin.write("epoch\n")
    child.stdin.flush()
    if not select.select([child.stdout], [], [], limit_s)[0]:
        return None
    line = child.stdout.readline()
    figures: dict[str, float] | None = json.loads(line) if line else None
    return figures


def table(graph: str, model: str, options: argparse.Namespace) -> None:
    """Medians and spreads of a cell, beside its exact row's and PyG's with CSR."""
    rows = {row["row"]: row["epochs"] for row in read(options, graph, model) if row["epochs"]}
    name, _, layers, width = GRAPHS[graph]
    say(f"\n{graph} ({name}), {model}, {layers} layers x {width}, {options.threads} threads")
    say("| row | epochs | wall s | spread | CPU s | MiB | time / C=1 | memory / PyG CSR |")
    say("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    one, csr_row = rows.get("gnnpipe C=1"), rows.get("pyg-csr") or rows.get("pyg")
    for row, epochs in rows.items():
        wall = [figures["wall_s"] for figures in epochs]
        cpu = statistics.median(figures["cpu_s"] for figures in epochs)
        memory = epochs[-1]["growth_mib"]
        ratio = f"{statistics.median(wall) / median_s(one):.2f}" if one else ""
        share = f"{memory / csr_row[-1]['growth_mib']:.2f}" if csr_row else ""
        figures = f"{statistics.median(wall):.3f} | {max(wall) - min(wall):.3f} | {cpu:.3f}"
        say(f"| {row} | {len(epochs)} | {figures} | {memory:.0f} | {ratio} | {share} |")


def median_s(epochs: list[dict[str, float]]) -> float:
    return statistics.median(figures["wall_s"] for figures in epochs)


def serve(options: argparse.Namespace) -> None:
    """One row: an epoch for each line of standard input."""
    import torch

    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # As a run does; to the peers' advantage as well.
    graph = load(options)
    base = status_mib("VmRSS")
    step = (ours if options.row.startswith("gnnpipe") else peer)(graph, options)
    for number, _ in enumerate(sys.stdin, 1):
        if number == 2:  # The first loads and compiles.
            Path("/proc/self/clear_refs").write_text("5")
        wall, cpu = time.perf_counter(), time.process_time()
        step(number)
        figures = {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "growth_mib": status_mib("VmHWM") - base,
        }
        say(json.dumps(figures))


def status_mib(name: str) -> float:
    """A size in ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(name)


def load(options: argparse.Namespace) -> Any:
    from gnnpipe.datasets import load_graph

    name, features, _, _ = GRAPHS[options.graphs]
    path = str(options.data / name) if name.endswith(".npz") else name
    return load_graph(path, features=features)


def ours(graph: Any, options: argparse.Namespace) -> Callable[[int], Any]:
    """One process, one stage."""
    import torch

    from gnnpipe.config import from_dict
    from gnnpipe.configured import model_layers
    from gnnpipe.runs import PipelineRun
    from gnnpipe.trainer import cut_graph
    from gnnpipe.world import World

    _, _, layers, width = GRAPHS[options.graphs]
    model: dict[str, Any] = {"name": options.models, "num_layers": layers}
    model |= {"hidden_channels": width}
    model |= {"heads": HEADS} if options.models == "gat" else {}
    chunks, _, setting = options.row.split("=")[1].partition(" ")
    partition = {"num_chunks": int(chunks)}
    config = from_dict({"model": model, "partition": partition, **SETTINGS[setting]})
    chunked = cut_graph(graph, config)
    world = World(0, 1, device=torch.device("cpu"), store=None)
    run = PipelineRun(config, chunked, world=world, layers=model_layers(config, chunked))
    run.warm_start()
    return run.train_epoch


def peer(graph: Any, options: argparse.Namespace) -> Callable[[int], Any]:
    """The same model as torch_geometric's users write it."""
    import numpy as np
    import torch
    from torch.nn import functional

    _, _, layers, width = GRAPHS[options.graphs]
    source = torch.from_numpy(graph.indices.astype(np.int64))
    target = torch.arange(graph.num_nodes).repeat_interleave(
        torch.from_numpy(np.diff(graph.indptr))
    )
    edges: Any = torch.stack((source, target))
    convs = [convolution(options.models, width, i) for i in range(1, layers + 1)]
    if options.row == "pyg-csr" and options.models != "gat":
        edges = csr(edges, options.models, graph.num_nodes)
    x = graph.features
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    else:
        pointers, columns = (array.astype(np.int64) for array in (x.indptr, x.indices))
        arrays: Any = [torch.from_numpy(array) for array in (pointers, columns, x.data)]
        x = torch.sparse_csr_tensor(*arrays, size=x.shape)
    first = torch.nn.Parameter(torch.randn(x.shape[1], width) / width)
    last, labels = torch.nn.Linear(width, graph.num_classes), torch.from_numpy(graph.labels)
    train = torch.from_numpy(np.flatnonzero(graph.train_mask & (graph.labels >= 0)))
    modules = torch.nn.ModuleList([*convs, last])
    optimizer = torch.optim.Adam([first, *modules.parameters()])

    def step(_: int) -> None:
        optimizer.zero_grad()
        h = h0 = (x @ first).relu()
        for conv in convs:
            h = functional.dropout(h, 0.5)
            h = (conv(h, h0, edges) if options.models == "gcnii" else conv(h, edges)).relu()
        scores = last(functional.dropout(h, 0.5))
        functional.cross_entropy(scores[train], labels[train]).backward()
        optimizer.step()

    return step


def convolution(model: str, width: int, index: int) -> Any:
    from torch_geometric import nn

    match model:
        case "gcn":
            return nn.GCNConv(width, width, cached=True)
        case "sage":
            return nn.SAGEConv(width, width)
        case "gat":
            return nn.GATConv(width, width // HEADS, heads=HEADS, dropout=0.5)
    return nn.GCN2Conv(width, alpha=0.1, theta=0.5, layer=index, cached=True)


def csr(edges: Any, model: str, num_nodes: int) -> Any:
    """The transposed adjacency as torch CSR, normalised beforehand where the layer would."""
    import torch

    return torch.sparse_coo_tensor(
        edges.flip(0), torch.ones(edges.shape[1]), (num_nodes, num_nodes)
    ).to_sparse_csr()


if __name__ == "__main__":
    main()
