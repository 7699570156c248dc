"""One epoch on one rank, this project beside its peers, interleaved in one run.

    python benchmarks/single_rank.py --data coauthor_physics.npz --models gcn,gat

Every row is a process of its own (its peak memory is its own); the rounds go around the rows, one
epoch each, so that a busy machine slows all of them alike. An epoch is forward, backward and step.
CPU seconds are beside wall seconds: on a shared machine they vary less. Memory is the highest
resident size of the epochs after the first, less the resident size with libraries and graph loaded
(Linux): parameters, tables, activations, adjacency in the form that the system wants.
"""

import argparse
import json
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


def main() -> None:
    """Runs the rows side by side and prints the table."""
    options = parse()
    if options.row:
        serve(options)
        return
    rows = [f"gnnpipe C={chunks}" for chunks in options.chunks.split(",")]
    for peer in filter(None, options.peers.split(",")):
        if is_installed(PEERS[peer]) and peer != "dgl":
            rows.append(peer)
        else:
            say(f"{peer}: skipped, {PEERS[peer]} cannot be used here")
    say(f"{options.data}, {options.layers} layers x {options.channels}, {options.rounds} rounds")
    say(f"{'model':8}{'row':16}{'wall s':>9}{'spread':>9}{'CPU s':>9}{'MiB':>8}")
    for model in options.models.split(","):
        compare(model, rows, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="digits", help="a name or path that data.name takes")
    parser.add_argument("--features", default="auto")
    parser.add_argument("--undirected", default="auto")
    parser.add_argument("--models", default="gcn,sage,gcnii,gat")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--channels", type=int, default=100)
    parser.add_argument("--chunks", default="1,32")
    parser.add_argument("--peers", default="pyg,pyg-csr,dgl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
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


def compare(model: str, rows: list[str], options: argparse.Namespace) -> None:
    """One process for each row; every round lets each run one epoch."""
    given = [f"--{key}={value}" for key, value in vars(options).items() if key != "row"]
    start = [sys.executable, "-W", "ignore", __file__, *given, f"--models={model}"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = {row: subprocess.Popen([*start, f"--row={row}"], **pipes) for row in rows}
    found: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    for turn in range(options.rounds + 1):
        for row, child in children.items():
            child.stdin.write("epoch\n")
            child.stdin.flush()
            figures = json.loads(child.stdout.readline())
            if turn:  # The first compiles.
                found[row].append(figures)
    for row, child in children.items():
        child.stdin.close()
        child.wait()
        wall = [figures["wall_s"] for figures in found[row]]
        cpu = statistics.median(figures["cpu_s"] for figures in found[row])
        last = found[row][-1]
        say(
            f"{model:8}{row:16}{statistics.median(wall):9.3f}{max(wall) - min(wall):9.3f}"
            f"{cpu:9.3f}{last['growth_mib']:8.0f}",
        )


def serve(options: argparse.Namespace) -> None:
    """One row: an epoch for each line of standard input."""
    import torch

    torch.set_num_threads(options.threads)
    graph = load(options)
    base = status_mib("VmRSS")
    step = (ours if options.row.startswith("gnnpipe") else peer)(graph, options)
    for epoch, _ in enumerate(sys.stdin, 1):
        if epoch == 2:  # The first loads and compiles.
            Path("/proc/self/clear_refs").write_text("5")
        wall, cpu = time.perf_counter(), time.process_time()
        step(epoch)
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

    return load_graph(options.data, features=options.features, undirected=options.undirected)


def ours(graph: Any, options: argparse.Namespace) -> Callable[[int], Any]:
    """One process, one stage."""
    import torch

    from gnnpipe.config import from_dict
    from gnnpipe.configured import model_layers
    from gnnpipe.runs import PipelineRun
    from gnnpipe.trainer import cut_graph
    from gnnpipe.world import World

    model: dict[str, Any] = {"name": options.models, "num_layers": options.layers}
    model |= {"hidden_channels": options.channels}
    model |= {"heads": HEADS} if options.models == "gat" else {}
    chunks = int(options.row.split("=")[1])
    config = from_dict({"model": model, "partition": {"num_chunks": chunks}})
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

    width = options.channels
    source = torch.from_numpy(graph.indices.astype(np.int64))
    target = torch.arange(graph.num_nodes).repeat_interleave(
        torch.from_numpy(np.diff(graph.indptr))
    )
    edges: Any = torch.stack((source, target))
    convs = [convolution(options.models, width, i) for i in range(1, options.layers + 1)]
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
