"""Memory of cutting a graph whose features are memory-mapped, beside features in memory.

    python benchmarks/mapped_cut.py --nodes 4000000

The features are drawn into a file, a block at a time, and deleted afterwards. Each way of cutting
runs in a fresh process, sampled every 10 ms; resident anonymous memory is what cannot be dropped,
unlike the pages of a mapped file.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from gnnpipe import chunk
from gnnpipe.graph import Graph

CHANNELS, CHUNKS, WAYS = 128, 32, 2
BLOCK = 2**16
SAMPLE_S = 0.01


def main() -> int:
    """Draws the features, cuts in two children, writes the table."""
    options = _parser().parse_args()
    if options.cut:
        return _cut(options)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        path = Path(folder) / "x.npy"
        _draw(path, options.nodes)
        rows = [_row(kind, path, options) for kind in ("in memory", "mapped")]
    size = 4 * CHANNELS * options.nodes / 2**30
    command = f"python benchmarks/mapped_cut.py --nodes {options.nodes}"
    text = "\n".join(
        [
            "# Cutting memory-mapped features",
            "",
            f"`{command}`; {os.cpu_count()} CPU cores (shared), {platform.machine()}; a ring of "
            f"{options.nodes:,} nodes, {CHANNELS} features each ({size:.2f} GiB), cut at random "
            f"into {CHUNKS} chunks and {WAYS} ways and saved. Anonymous memory at its peak.",
            "",
            "| features | peak, GiB | beyond the start, GiB | seconds |",
            "| --- | ---: | ---: | ---: |",
            *rows,
        ]
    )
    options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return 0


def _row(kind: str, path: Path, options: argparse.Namespace) -> str:
    command = [sys.executable, __file__, "--cut", kind, "--work", str(path)]
    command += ["--nodes", str(options.nodes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    start, peak, seconds = (float(word) for word in done.stdout.split())
    return f"| {kind} | {peak:.2f} | {peak - start:.2f} | {seconds:.0f} |"


def _cut(options: argparse.Namespace) -> int:
    """In the child: reads the features as asked, cuts, saves."""
    features = np.load(options.work, mmap_mode="r", allow_pickle=False)
    node = np.arange(options.nodes)
    graph = Graph.from_edge_index(
        np.stack((node, np.roll(node, 1))),
        labels=node % 7,
        train_mask=node % 2 == 0,
        val_mask=node % 4 == 1,
        test_mask=node % 4 == 3,
        is_directed=True,
    )
    draw = np.random.default_rng(0)
    chunk_id, way_id = draw.integers(CHUNKS, size=node.size), draw.integers(WAYS, size=node.size)
    start, start_s, samples = _anonymous_gib(), time.perf_counter(), [0.0]
    is_done = threading.Event()
    watch = threading.Thread(target=_sample, args=(is_done, samples))
    watch.start()
    values = {**vars(graph), "features": features}
    if options.cut == "in memory":
        values["features"] = np.array(features)
    cut = chunk.cut(Graph(**values), chunk_id, way_id, num_ways=WAYS, method="random", seed=0)
    chunk.save(cut, options.work.parent / f"parts-{options.cut[:2]}")
    is_done.set()
    watch.join()
    sys.stdout.write(f"{start} {max(samples)} {time.perf_counter() - start_s}\n")
    return 0


def _sample(is_done: threading.Event, samples: list[float]) -> None:
    while not is_done.wait(SAMPLE_S):
        samples.append(_anonymous_gib())


def _anonymous_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) / 2**20


def _draw(path: Path, num_nodes: int) -> None:
    draw = np.random.default_rng(0)
    shape = (num_nodes, CHANNELS)
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, num_nodes, BLOCK):
        count = min(BLOCK, num_nodes - start)
        table[start : start + count] = draw.random((count, CHANNELS), dtype=np.float32)
    table.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--nodes", type=int, default=4_000_000)
    add("--work", type=Path, default=None, help="where the file is drawn")
    add("--cut", default=None, help=argparse.SUPPRESS)
    add("--out", type=Path, default=Path("benchmarks/results/mapped_cut.md"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
