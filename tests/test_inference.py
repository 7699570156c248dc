"""Exact inference from saved weights: the run's own figures, the reference's scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from combinations import COMMON, both_ways, train_all, write_npz
from numpy.typing import NDArray
from process_pool import ProcessPool

from gnnpipe.cli import main
from gnnpipe.config import load_config
from gnnpipe.datasets import load_graph
from gnnpipe.inference import evaluate_run, predict_run
from gnnpipe.metrics import read_metrics
from gnnpipe.preflight import THREAD_VARIABLES
from gnnpipe.reference_run import ReferenceRun
from gnnpipe.state import load_state
from gnnpipe.trainer import Trainer
from gnnpipe.weights import load_weights

pytestmark = pytest.mark.timeout(120)

NUM_NODES = 24


def overrides_of(folder: Path) -> list[str]:
    return [
        *COMMON,
        f"data.name={folder / 'graph.npz'}",
        "partition.num_chunks=3",
        "partition.method=random",
        "model.num_layers=4",
        "model.hidden_channels=8",
        "model.dtype=float64",
        "training.epochs=9",
        "training.eval_every=2",
    ]


@pytest.fixture(scope="module")
def runs(pool: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of one model on a ring with chords: one rank, four stages, two ways."""
    folder = tmp_path_factory.mktemp("runs")
    ring = [(i, (i + step) % NUM_NODES) for i in range(NUM_NODES) for step in (1, 5)]
    write_npz(folder / "graph.npz", both_ways(ring), num_nodes=NUM_NODES)
    common = overrides_of(folder)
    table = {
        "one": common,
        "stages": [*common, "parallel.num_stages=4"],
        "ways": [*common, "parallel.num_stages=2", "parallel.num_ways=2"],
        "gat": [*common, "model.name=gat", "parallel.num_stages=2"],
        "link": [*common, "task.kind=link", "parallel.num_stages=2"],
        "link-one": [*common, "task.kind=link"],
    }
    train_all(pool, folder, table)
    return folder


@pytest.fixture
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, and the environment as it was when ``main`` has settled the threads."""
    for name in THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("weights", ["best", "last"])
@pytest.mark.parametrize("name", ["one", "stages", "ways", "gat"])
def test_evaluation_repeats_the_figures_of_the_run(name: str, weights: str, runs: Path) -> None:
    summary = json.loads((runs / name / "summary.json").read_text())
    epoch = summary["best_epoch"] if weights == "best" else 9
    result = evaluate_run(str(runs / name), weights=weights)
    record = read_metrics(runs / name / "metrics.jsonl")[epoch - 1]
    assert result == {"weights": weights, "epoch": epoch, "accuracy": record["accuracy"]}


def test_link_prediction_does_not_depend_on_the_processes(runs: Path) -> None:
    one, two = (read_metrics(runs / name / "metrics.jsonl") for name in ("link-one", "link"))
    assert [r["loss"] for r in one] == [r["loss"] for r in two]
    assert one[-1]["accuracy"] == two[-1]["accuracy"]
    assert evaluate_run(str(runs / "link"), weights="last")["accuracy"] == two[-1]["accuracy"]


@pytest.mark.usefixtures("_command")
def test_command_prints_the_same_as_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(runs / "one"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == evaluate_run(str(runs / "one"))


def reference_scores(overrides: list[str], directory: Path) -> NDArray[np.float64]:
    """What the plain full-graph loop computes from the weights of a run."""
    config = load_config(None, overrides)
    run = ReferenceRun(config, load_graph(config.data.name), device=torch.device("cpu"))
    saved = load_weights(directory / "weights" / "best.safetensors")[0]
    assert run.weights().keys() == saved.keys()
    load_state(list(enumerate(run.layers)), saved)
    scores: NDArray[np.float64] = run.reference.evaluate().numpy()
    return scores


@pytest.mark.parametrize("name", ["one", "gat"])
def test_predictions_are_the_references_in_the_order_of_the_data(
    name: str, runs: Path, tmp_path: Path
) -> None:
    path = predict_run(str(runs / name), out=str(tmp_path / "scores.npy"))
    assert [file.name for file in tmp_path.iterdir()] == ["scores.npy"]
    scores = np.load(path, allow_pickle=False)
    model = "gat" if name == "gat" else "gcnii"
    expected = reference_scores([*overrides_of(runs), f"model.name={model}"], runs / name)
    assert scores.shape == (NUM_NODES, 3)
    assert np.abs(scores - expected).max() < 1e-12
    assert len({tuple(row) for row in scores.tolist()}) == NUM_NODES  # so the order shows


@pytest.mark.usefixtures("_command")
def test_predictions_do_not_depend_on_how_the_run_was_spread(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "stages"):
        assert main(["predict", str(runs / name), "--weights", "last"]) == 0
        assert capsys.readouterr().out == f"{runs / name}/predictions.npy\n"
    one, stages = (
        np.load(runs / name / "predictions.npy", allow_pickle=False) for name in ("one", "stages")
    )
    assert np.array_equal(one, stages)


@pytest.mark.usefixtures("_command")
def test_commands_take_another_graph_and_write_ids(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ring = [(i, (i + 1) % 10) for i in range(10)]
    larger = str(tmp_path / "ten.npz")
    graph = write_npz(Path(larger), both_ways(ring), num_nodes=10)
    out = str(tmp_path / "scores.npy")
    assert main(["predict", str(runs / "one"), "--data", larger, "--node-ids", "--out", out]) == 0
    back = np.load(out, allow_pickle=False)
    assert back["node_id"].tolist() == list(range(10))
    right = back["values"].argmax(1) == graph.labels
    capsys.readouterr()
    assert main(["evaluate", str(runs / "one"), "--data", larger, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["accuracy"]
    assert found["test"] == right[graph.test_mask].mean()
    assert main(["predict", str(runs / "one"), "--out", str(tmp_path / "s.parquet")]) == 0
    assert (tmp_path / "s.parquet").exists()


@pytest.mark.usefixtures("_command")
def test_a_run_of_the_reference_can_be_evaluated(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reference", *overrides_of(runs), f"run.dir={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    record = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert evaluate_run(str(tmp_path / "run"), weights="last")["accuracy"] == record["accuracy"]
    assert main(["predict", str(tmp_path / "run"), "--out", str(tmp_path / "p.npy")]) == 0
    expected = reference_scores(overrides_of(runs), tmp_path / "run")
    assert np.abs(np.load(tmp_path / "p.npy") - expected).max() < 1e-12


def test_run_that_was_moved_with_its_partition_needs_no_data(runs: Path, tmp_path: Path) -> None:
    own = tmp_path / "graph.npz"
    own.write_bytes((runs / "graph.npz").read_bytes())
    overrides = [*overrides_of(runs), f"data.name={own}", f"run.dir={tmp_path / 'run'}"]
    Trainer(load_config(None, overrides)).fit()
    own.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    result = evaluate_run(str(tmp_path / "moved"), weights="last")
    record = read_metrics(tmp_path / "moved" / "metrics.jsonl")[-1]
    assert result["accuracy"] == record["accuracy"]
