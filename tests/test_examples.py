"""Every example script runs, on small made-up data in the layout of the real."""

import gzip
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gnnpipe.environment import PARENT_VARIABLE, child_environment
from gnnpipe.preflight import thread_variables

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NUM_NODES, NUM_EDGES = 60, 240
COMPARED = ["model.num_layers=2", "model.hidden_channels=16", "training.eval_every=1"]
SHAPES = {  # split scheme, node features, classes or tasks, edge features
    "ogbn_arxiv": ("time", 128, 40, 0),
    "ogbn_products": ("sales_ranking", 100, 47, 0),
    "ogbn_proteins": ("species", 0, 112, 8),
    "ogbn_papers100m": ("time", 128, 172, 0),
}


def write(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in rows)


def write_data(root: Path, name: str) -> None:
    """A random graph in OGB's raw layout."""
    scheme, num_features, num_classes, attr_channels = SHAPES[name]
    draw = np.random.default_rng(0)
    edges = np.unique(draw.integers(NUM_NODES, size=(NUM_EDGES, 2)), axis=0)
    features = draw.random((NUM_NODES, num_features), dtype=np.float32)
    labels = draw.integers(num_classes, size=(NUM_NODES, 1))
    if attr_channels:
        labels = draw.integers(2, size=(NUM_NODES, num_classes))
        write(root / "raw/edge-feat.csv.gz", draw.random((len(edges), attr_channels)).round(3))
    for part, low in (("train", 0), ("valid", 30), ("test", 45)):
        ids = range(low, low + (30 if part == "train" else 15))
        write(root / f"split/{scheme}/{part}.csv.gz", ([i] for i in ids))
    if name == "ogbn_papers100m":
        (root / "raw").mkdir()
        counts: dict[str, Any] = {"num_nodes_list": [NUM_NODES], "num_edges_list": [len(edges)]}
        np.savez(root / "raw/data.npz", edge_index=edges.T, node_feat=features, **counts)
        np.savez(root / "raw/node-label.npz", node_label=labels.astype(np.float32))
        return
    write(root / "raw/edge.csv.gz", edges)
    write(root / "raw/num-node-list.csv.gz", [[NUM_NODES]])
    write(root / "raw/num-edge-list.csv.gz", [[len(edges)]])
    write(root / "raw/node-label.csv.gz", labels)
    if num_features:
        write(root / "raw/node-feat.csv.gz", features)


@pytest.mark.parametrize("name", SHAPES)
def test_example_trains_in_one_process(name: str, tmp_path: Path) -> None:
    write_data(tmp_path, name)
    overrides = [f"data.root={tmp_path}", f"run.dir={tmp_path / 'run'}", "run.tensorboard=false"]
    overrides += ["parallel.num_stages=1", "parallel.num_ways=1", "parallel.virtual_stages=2"]
    overrides += ["partition.num_chunks=3", "partition.method=contiguous", "training.epochs=2"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *overrides],
        capture_output=True,
        text=True,
        timeout=120,
        env=child_environment(thread_variables(1)),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "best epoch" in done.stdout
    assert (tmp_path / "run/weights/best.safetensors").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 120
    assert f"examples/{path.name}" in text
    assert path.name in (EXAMPLES / "README.md").read_text()


def test_comparison_prints_every_method_asked_for() -> None:
    # Its children start children: they are not ours to end.
    own = {key: value for key, value in child_environment({}).items() if key != PARENT_VARIABLE}
    less = ["--no-pipeline", "--no-graph-parallel"]  # started the same way
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "compare.py"), *less, "training.epochs=3", *COMPARED],
        capture_output=True,
        text=True,
        timeout=240,
        env=own,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line][2:]
    assert [row[0] for row in rows] == ["full batch", "mini-batch", "hybrid"]
    sent = {row[0]: float(row[4]) for row in rows}
    assert sent["full batch"] == 0.0
    # 2 (S - 1) N H b between the two stages, and halos and gradients between the ways.
    assert sent["hybrid"] > 2 * 1797 * 16 * 4 / 1e6
    assert all(0.0 <= float(row[1]) <= 1.0 and float(row[2]) > 0.0 for row in rows)


def test_every_script_is_run_by_a_test() -> None:
    assert {path.stem for path in SCRIPTS} == {*SHAPES, "compare"}
