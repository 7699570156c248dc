"""Trains one model five ways and prints what each reaches, how fast, and what it costs.

    python examples/compare.py
    python examples/compare.py --no-hybrid data.name=cora data.root=data model.name=gcnii

Full batch and mini-batch are plain torch_geometric in one process, the mini-batches random unions
of METIS clusters as in Cluster-GCN. The others are this project's on four processes of this host:
graph parallelism (4 ways), pipeline (4 stages), hybrid (2 x 2). Every process has one thread.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

CONFIG = str(Path(__file__).with_name("configs") / "compare.yaml")
SHAPES = {"graph-parallel": (1, 4), "pipeline": (4, 1), "hybrid": (2, 2)}  # stages, ways
NEAR = 0.98


def main() -> None:
    overrides, rows = [word for word in sys.argv[1:] if "=" in word], {}
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    for mode in ("full batch", "mini-batch"):
        command = [sys.executable, __file__, "--pyg", mode, *overrides]
        rows[mode] = json.loads(subprocess.check_output(command))
    with tempfile.TemporaryDirectory() as folder:
        for mode, (stages, ways) in SHAPES.items():
            if f"--no-{mode}" in sys.argv:
                continue
            run = Path(folder, mode)
            shape = [f"parallel.num_stages={stages}", f"parallel.num_ways={ways}"]
            shape += [f"run.dir={run}", "run.tensorboard=false"]
            command = [sys.executable, "-m", "launch", "local", "--nproc", str(stages * ways)]
            command += [CONFIG, *overrides, *shape]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            rows[mode] = read_run(run)
    show(rows)


def read_run(run: Path) -> dict:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    curve, elapsed_s = [], 0.0
    for record in records:
        elapsed_s += record["epoch_s"]
        if "accuracy" in record:
            curve.append((elapsed_s, record["accuracy"]["val"], record["accuracy"]["test"]))
    sent, memory = sum(summary["comm_bytes_per_epoch"].values()), summary["peak_memory_bytes"]
    steady = {"epoch_s": summary["median_epoch_s"], "memory": memory["max"]}
    return {"curve": curve, "bytes": sent, **steady}


def train_pyg(mode: str, overrides: list[str]) -> dict:
    import numpy as np
    import torch

    from gnnpipe.config import load_config
    from gnnpipe.interchange import to_pyg
    from gnnpipe.models.plain import PlainModel
    from gnnpipe.subgraph import induced
    from gnnpipe.trainer import load_data
    from partition import assign

    config = load_config(CONFIG, overrides)
    torch.manual_seed(config.seed)
    graph, training, clusters = load_data(config), config.training, config.partition.num_chunks
    whole, model = to_pyg(graph), PlainModel(config.model, graph.num_features, graph.num_classes)
    adam = {"lr": training.lr, "weight_decay": training.weight_decay}
    optimizer = torch.optim.Adam(model.parameters(), **adam)
    cluster = assign(graph.indptr, graph.indices, num_chunks=clusters).chunk_id
    curve, epochs_s = [], []
    for epoch in range(1, training.epochs + 1):
        start_s = time.perf_counter()
        batches = [whole]
        if mode == "mini-batch":
            order = np.random.default_rng(epoch).permutation(clusters)
            groups = [np.isin(cluster, g) for g in np.array_split(order, max(1, clusters // 4))]
            batches = [to_pyg(induced(graph, np.flatnonzero(group))) for group in groups]
        model.train()
        for batch in batches:
            train = batch.train_mask & (batch.y >= 0)
            optimizer.zero_grad()
            scores = model(batch.x, batch.edge_index, batch.get("edge_weight"))[train]
            loss = torch.nn.functional.cross_entropy(scores, batch.y[train], reduction="sum")
            (loss / max(1, int(train.sum()))).backward()
            optimizer.step()
        epochs_s.append(time.perf_counter() - start_s)
        if epoch % training.eval_every == 0 or epoch == training.epochs:
            scores = model.eval()(whole.x, whole.edge_index, whole.get("edge_weight"))
            right = (scores.argmax(1) == whole.y).double()
            known = [mask & (whole.y >= 0) for mask in (whole.val_mask, whole.test_mask)]
            curve.append((sum(epochs_s), *(float(right[mask].mean()) for mask in known)))
    memory, epoch_s = 1024 * getrusage(RUSAGE_SELF).ru_maxrss, statistics.median(epochs_s)
    return {"curve": curve, "epoch_s": epoch_s, "bytes": 0, "memory": memory}


def show(rows: dict) -> None:
    goal = NEAR * max(val for _, val, _ in rows["full batch"]["curve"])
    print("| method | test | ms per epoch | s to accuracy | MB sent per epoch | MB of memory |")
    print("| --- " + "| ---: " * 5 + "|")
    for name, row in rows.items():
        test = max(row["curve"], key=lambda point: point[1])[2]
        reached = next((f"{s:.2f}" for s, val, _ in row["curve"] if val >= goal), "-")
        figures = f"{row['bytes'] / 1e6:.2f} | {row['memory'] / 2**20:.0f}"
        print(f"| {name} | {test:.4f} | {1e3 * row['epoch_s']:.1f} | {reached} | {figures} |")
    print(f"to accuracy: validation {goal:.4f}, {NEAR:.0%} of full batch's best")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pyg"]:
        print(json.dumps(train_pyg(sys.argv[2], sys.argv[3:])))
    else:
        main()
