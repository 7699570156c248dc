"""The main flow: what a run leaves behind, and the ways to start one."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from combinations import COMMON, both_ways, differing, read_run, write_npz
from process_pool import Job, ProcessPool
from torch.distributed import FileStore  # type: ignore[attr-defined]

from gnnpipe.cli import main
from gnnpipe.config import load_config, to_dict
from gnnpipe.configured import model_layers
from gnnpipe.datasets import load_graph
from gnnpipe.errors import UserError
from gnnpipe.metrics import EpochRecord, read_metrics
from gnnpipe.models import build_layers
from gnnpipe.preflight import THREAD_VARIABLES
from gnnpipe.runs import PipelineRun
from gnnpipe.state import named_state
from gnnpipe.trainer import Trainer
from gnnpipe.weights import load_weights

pytestmark = pytest.mark.timeout(120)

NUM_NODES = 24
EPOCHS = 7
SLOW_S = 3.0


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ring of 24 nodes."""
    path = tmp_path_factory.mktemp("data") / "ring.npz"
    write_npz(path, both_ways((i, (i + 1) % NUM_NODES) for i in range(NUM_NODES)), num_nodes=24)
    return path


def overrides_for(graph_file: Path, directory: Path, *more: str) -> list[str]:
    return [
        *COMMON,
        f"data.name={graph_file}",
        "partition.num_chunks=3",
        "partition.method=contiguous",
        "model.num_layers=4",
        "model.hidden_channels=8",
        f"training.epochs={EPOCHS}",
        "training.eval_every=3",
        f"run.dir={directory}",
        *more,
    ]


@pytest.fixture
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, and the environment as it was when ``main`` has settled the threads."""
    for name in THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


FOLDERS = ("tensorboard", "partition", "checkpoints")
FILES = {
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "weights/best.safetensors",
    "weights/last.safetensors",
}


def tree(directory: Path) -> set[str]:
    """Relative paths of all files; what is in :data:`FOLDERS` is other tests' affair."""
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    folders = {f"{folder}/" for folder in FOLDERS if (directory / folder).is_dir()}
    return {name for name in found if not name.startswith(tuple(folders))} | folders


@pytest.fixture(scope="module")
def finished(graph_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, which did not exist before."""
    directory = tmp_path_factory.mktemp("runs") / "new" / "run"
    Trainer(load_config(None, overrides_for(graph_file, directory))).fit()
    return directory


@pytest.mark.usefixtures("_command")
@pytest.mark.parametrize("name", ["train", "reference"])
def test_commands_leave_the_same_run_directory(
    name: str, graph_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = overrides_for(graph_file, tmp_path / "run", "run.tensorboard=true")
    assert main([name, *overrides]) == 0
    expected = FILES | {"tensorboard/", "checkpoints/"}
    pipeline = {"partition/", "timeline.npz"} if name == "train" else set()
    assert tree(tmp_path / "run") == expected | pipeline
    resolved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert resolved == to_dict(load_config(None, overrides))
    out = capsys.readouterr().out
    best = json.loads((tmp_path / "run/summary.json").read_text())["best_epoch"]
    assert out.startswith(f"best   epoch {best}: val ")
    assert f"python -m gnnpipe evaluate {tmp_path / 'run'}" in out


def test_metrics_have_one_object_per_epoch(finished: Path) -> None:
    records = read_metrics(finished / "metrics.jsonl")
    assert [record["epoch"] for record in records] == list(range(1, EPOCHS + 1))
    evaluated = [record["epoch"] for record in records if "accuracy" in record]
    assert evaluated == [3, 6, 7]  # every third, and the last
    for record in records:
        assert record["loss"] > 0
        assert record["epoch_s"] > 0
        assert 0 <= record["bubble_fraction"] <= 1
        assert record["comm_bytes"] == dict.fromkeys(
            ("boundary", "carried", "halo", "gradient", "evaluation"), 0
        )
        assert len(record["peak_memory_bytes"]) == len(record["table_bytes"]) == 1
        assert ("staleness" in record) == (record["epoch"] in evaluated)
    for record in (records[2], records[5], records[6]):
        assert list(record["accuracy"]) == ["train", "val", "test"]
        assert all(0 <= share <= 1 for share in record["accuracy"].values())


def test_tables_hold_what_their_shapes_say(finished: Path) -> None:
    table_bytes = 3 * NUM_NODES * 8 * 4  # values, gradients, late ones; 8 channels, float32
    # All nodes have two readers: of 2 strata sums of 3 chunks, drift, debts, and one chunk's.
    table_bytes += (3 + 3) * 2 * 8 * 4
    for record in read_metrics(finished / "metrics.jsonl"):
        assert record["table_bytes"] == [4 * table_bytes]


def test_summary_says_what_the_epochs_were(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    records = read_metrics(finished / "metrics.jsonl")
    times = [record["epoch_s"] for record in records[5:]]
    assert summary["median_epoch_s"] == pytest.approx(sum(times) / 2)
    assert summary["comm_bytes_per_epoch"] == dict.fromkeys(
        ("boundary", "carried", "halo", "gradient"), 0
    )
    assert summary["peak_memory_bytes"]["max"] == max(summary["peak_memory_bytes"]["per_rank"])
    assert summary["wall_s"] > sum(record["epoch_s"] for record in records)
    weights = load_weights(finished / "weights" / "last.safetensors")[0]
    assert summary["num_parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert (summary["world_size"], summary["threads"]) == (1, 1)
    assert summary["versions"]["torch"] == torch.__version__


def test_best_is_the_earliest_of_ties(graph_file: Path, tmp_path: Path) -> None:
    """With one validation node there are only right and wrong: ties everywhere."""
    graph = replace(load_graph(str(graph_file)), val_mask=np.arange(NUM_NODES) == 1)
    overrides = overrides_for(graph_file, tmp_path, "training.eval_every=1", "training.epochs=20")
    summary = Trainer(load_config(None, overrides), graph=graph).fit()
    records = read_metrics(tmp_path / "metrics.jsonl")
    val = [record["accuracy"]["val"] for record in records]
    assert len(val) - len(set(val)) > 10
    best = val.index(max(val))
    assert summary["best_epoch"] == best + 1
    assert summary["val_at_best"] == val[best]
    assert summary["test_at_best"] == records[best]["accuracy"]["test"]
    metadata = load_weights(tmp_path / "weights/best.safetensors")[1]
    assert metadata["epoch"] == str(best + 1)


def test_without_validation_nodes_there_is_no_best(graph_file: Path, tmp_path: Path) -> None:
    graph = replace(load_graph(str(graph_file)), val_mask=np.zeros(NUM_NODES, bool))
    summary = Trainer(load_config(None, overrides_for(graph_file, tmp_path)), graph=graph).fit()
    assert (summary["best_epoch"], summary["val_at_best"]) == (None, None)
    left = tree(tmp_path) - {"partition/", "checkpoints/", "timeline.npz"}
    assert left == FILES - {"weights/best.safetensors"}
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["accuracy"]["val"] is None


@pytest.mark.usefixtures("_command")
def test_finished_run_prints_its_summary_again(
    graph_file: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert main(["train", *overrides_for(graph_file, finished)]) == 0
    summary = json.loads((finished / "summary.json").read_text())
    assert f"best   epoch {summary['best_epoch']}: val" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_finished_run_gives_its_summary_to_scripts(graph_file: Path, finished: Path) -> None:
    summary = Trainer(load_config(None, overrides_for(graph_file, finished))).fit()
    assert summary == json.loads((finished / "summary.json").read_text())


def test_another_configuration_does_not_touch_a_finished_run(
    graph_file: Path, finished: Path
) -> None:
    config = load_config(None, overrides_for(graph_file, finished, "model.dropout=0.25"))
    with pytest.raises(UserError, match=r"model.dropout \(0.5 there, 0.25 here\)"):
        Trainer(config).fit()


def test_own_graph_layers_and_callback(graph_file: Path, finished: Path, tmp_path: Path) -> None:
    config = load_config(None, overrides_for(graph_file, tmp_path, "data.name=digits"))
    graph = load_graph(str(graph_file))
    seen: list[EpochRecord] = []
    layers = model_layers(config, graph)
    summary = Trainer(config, graph=graph, layers=layers, on_epoch_end=[seen.append]).fit()
    assert [record.epoch for record in seen] == list(range(1, EPOCHS + 1))
    assert summary["best_epoch"] is not None
    # The same layers on the same graph as the configured ones.
    assert differing(read_run(tmp_path), read_run(finished)) == []


def test_own_layers_keep_their_weights(graph_file: Path, tmp_path: Path) -> None:
    config = load_config(None, overrides_for(graph_file, tmp_path, "training.lr=1e-30"))
    counts = {"in_channels": 5, "hidden_channels": 6, "out_channels": 3, "num_layers": 2}
    layers = build_layers("sage", **counts, dropout=0.0, options={})
    own = named_state(list(enumerate(layers)))
    before = {name: tensor.clone() for name, tensor in own.items()}
    Trainer(config, layers=layers).fit()
    saved = load_weights(tmp_path / "weights/last.safetensors")[0]
    assert before.keys() == saved.keys()
    assert all(torch.equal(before[name], saved[name]) for name in saved)


def test_error_in_a_callback_ends_the_run(graph_file: Path, tmp_path: Path) -> None:
    def fail(record: EpochRecord) -> None:
        raise RuntimeError(f"no more after epoch {record.epoch}")

    config = load_config(None, overrides_for(graph_file, tmp_path))
    with pytest.raises(RuntimeError, match="no more after epoch 1"):
        Trainer(config, on_epoch_end=[fail]).fit()
    assert [record["epoch"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.usefixtures("_command")
def test_loss_that_is_no_number_is_told_once(
    graph_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *overrides_for(graph_file, tmp_path, "training.lr=1e30")]) == 1
    error = capsys.readouterr().err
    assert error.count("try a smaller training.lr") == 1
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert all(math.isfinite(r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl"))


def test_more_processes_than_there_are_is_a_mistake(graph_file: Path, tmp_path: Path) -> None:
    config = load_config(None, overrides_for(graph_file, tmp_path / "run", "parallel.num_ways=2"))
    with pytest.raises(UserError, match=r"`WORLD_SIZE` \(=1\) must equal `parallel.num_stages`"):
        Trainer(config).fit()
    assert list(tmp_path.iterdir()) == []


def test_progress_is_logged_every_so_many_epochs(
    graph_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gnnpipe")
    Trainer(load_config(None, overrides_for(graph_file, tmp_path, "run.log_every=3"))).fit()
    epochs = [line for line in caplog.messages if line.startswith("epoch ")]
    assert [line[:9] for line in epochs] == ["epoch 003", "epoch 006", "epoch 007"]


def train_in_a_script_of_the_users(runs: Sequence[Sequence[str]]) -> None:
    """A job of the pool: the script has set torch.distributed up, trains and goes on."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = FileStore(os.environ["GNNPIPE_RENDEZVOUS"], world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for overrides in runs:
        summary: dict[str, Any] = Trainer(load_config(None, overrides)).fit()
        assert bool(summary) == (rank == 0)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == world_size
    dist.destroy_process_group()


def test_it_works_in_a_script_that_has_set_up_torch_distributed(
    pool: ProcessPool, graph_file: Path, finished: Path, tmp_path: Path
) -> None:
    # The third finds the first finished; each has a part of the store for itself.
    runs = [
        overrides_for(graph_file, tmp_path / name, "parallel.num_stages=2")
        for name in ("one", "two", "one")
    ]
    function = "test_trainer:train_in_a_script_of_the_users"
    pool.run([Job(function, 2, {"runs": runs})])
    for name in ("one", "two"):
        assert differing(read_run(tmp_path / name), read_run(finished)) == []


def train_until_the_third_epoch(overrides: Sequence[str]) -> None:
    """A job of the pool: what a callback on rank 0 wants, all ranks do."""
    seen: list[object] = []

    def at_three(record: EpochRecord) -> bool:
        seen.append(record.epoch)
        return record.epoch == 3

    Trainer(load_config(None, overrides), on_epoch_end=[at_three, seen.append]).fit()
    assert len(seen) == (6 if os.environ["RANK"] == "0" else 0)  # Both saw all three.


def test_a_callback_ends_the_training_on_all_ranks(
    pool: ProcessPool, graph_file: Path, tmp_path: Path
) -> None:
    overrides = overrides_for(graph_file, tmp_path, "parallel.num_stages=2", "checkpoint.every=0")
    pool.run([Job("test_trainer:train_until_the_third_epoch", 2, {"overrides": overrides})])
    assert [r["epoch"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((tmp_path / "summary.json").read_text())["epochs"] == 3
    assert (tmp_path / "weights/last.safetensors").exists()


SCRIPT = """
import sys
import torch.distributed as dist
from gnnpipe.config import load_config
from gnnpipe.trainer import Trainer

dist.init_process_group("gloo")
losses = []
log = lambda record: losses.append(record.loss)
stop = lambda record: record.epoch == 2
summary = Trainer(load_config(None, sys.argv[1:]), on_epoch_end=[log, stop]).fit()
if dist.get_rank() == 0:
    print("epochs", summary["epochs"], "logged", len(losses))
dist.destroy_process_group()
"""


def test_it_works_in_a_users_own_script_under_torchrun(graph_file: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    overrides = overrides_for(graph_file, tmp_path / "run", "parallel.num_stages=2")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "script.py", *overrides],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "epochs 2 logged 2\n"), done.stderr


def train_after_a_slow_start(overrides: Sequence[str]) -> None:
    """A job of the pool: the other ranks wait for rank 0 before the first epoch."""
    warm_start = PipelineRun.warm_start

    def slow_start(run: PipelineRun) -> None:
        time.sleep(SLOW_S if run.rank == 0 else 0)
        warm_start(run)

    with patch.object(PipelineRun, "warm_start", slow_start):
        Trainer(load_config(None, overrides)).fit()


def test_time_of_an_epoch_is_its_own(pool: ProcessPool, graph_file: Path, tmp_path: Path) -> None:
    """What ranks waited for before an epoch, or between two, does not count against it."""
    overrides = overrides_for(graph_file, tmp_path, "parallel.num_stages=4")
    pool.run([Job("test_trainer:train_after_a_slow_start", 4, {"overrides": overrides})])
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        assert len(record["compute_s"]) == 4
        assert all(0 < busy_s <= record["epoch_s"] for busy_s in record["compute_s"])
        assert all(waited_s < SLOW_S for waits in record["wait_s"].values() for waited_s in waits)
        assert 0 <= record["bubble_fraction"] < 1
