"""Runs that stop and go on: not one bit differs from those that were left alone."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from combinations import COMMON, read_run, save_partition
from process_pool import Job, ProcessPool
from resuming import EPOCHS, forked, losses, ring_run, train_on, train_until, write_ring

from gnnpipe.datasets import load_graph
from gnnpipe.errors import UserError
from gnnpipe.weights import load_weights

pytestmark = pytest.mark.timeout(250)

TIMEOUT_S = 200


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ring")
    write_ring(folder)
    return folder


def shape(stages: int, ways: int = 1, virtual: int = 1) -> list[str]:
    return [
        f"parallel.num_stages={stages}",
        f"parallel.num_ways={ways}",
        f"parallel.virtual_stages={virtual}",
    ]


def until(overrides: Sequence[str], num_ranks: int, epoch: int) -> Job:
    return Job("resuming:train_until", num_ranks, {"overrides": overrides, "epoch": epoch})


def onward(overrides: Sequence[str], num_ranks: int) -> Job:
    return Job("resuming:train_on", num_ranks, {"overrides": overrides})


def test_a_run_stopped_after_any_epoch_goes_on_bit_for_bit(
    pool: ProcessPool, ring: Path, tmp_path: Path
) -> None:
    shapes = {1: shape(1), 2: shape(2), 4: shape(4), "ways": shape(1, ways=2)}
    whole, first, second = [], [], []
    for name, options in shapes.items():
        num_ranks = 2 if name == "ways" else int(str(name))
        whole.append(onward(ring_run(ring, tmp_path / f"{name}-whole", *options), num_ranks))
        for epoch in range(1, EPOCHS) if name in (1, 2) else (2, 5):
            run = ring_run(ring, tmp_path / f"{name}-{epoch}", *options)
            first.append(until(run, num_ranks, epoch))
            second.append(onward(run, num_ranks))
    pool.run(whole, timeout_s=TIMEOUT_S)
    pool.run(first, timeout_s=TIMEOUT_S)
    stopped_after = {len(losses(path)) for path in tmp_path.iterdir()}
    assert stopped_after == set(range(1, EPOCHS + 1))
    pool.run(second, timeout_s=TIMEOUT_S)
    for path in tmp_path.iterdir():
        base = tmp_path / ("ways-whole" if path.name.startswith("ways") else "1-whole")
        assert losses(path) == losses(base), path.name
        for file in ("last", "best"):
            weights, wanted = (
                load_weights(p / f"weights/{file}.safetensors") for p in (path, base)
            )
            assert weights[1] == wanted[1]
            assert all(torch.equal(weights[0][name], wanted[0][name]) for name in wanted[0])


def test_a_checkpoint_of_any_ranks_loads_on_any_other(
    pool: ProcessPool, ring: Path, tmp_path: Path
) -> None:
    double = ["model.dtype=float64"]
    saved, whole = tmp_path / "S4", tmp_path / "whole"
    two_ways = tmp_path / "S2W2"
    pool.run(
        [
            until(ring_run(ring, saved, *double, *shape(4)), 4, 4),
            until(ring_run(ring, two_ways, *double, *shape(2, ways=2)), 4, 4),
            onward(ring_run(ring, whole, *double), 1),
        ],
        timeout_s=TIMEOUT_S,
    )
    exact = {
        "to1": (1, shape(1)),
        "to2": (2, shape(2)),
        "to1v4": (1, shape(1, virtual=4)),
        "to2v2": (2, shape(2, virtual=2)),
    }
    close = {"toW2": (2, shape(1, ways=2)), "toS2W2": (4, shape(2, ways=2))}
    jobs = []
    for name, (num_ranks, options) in (exact | close).items():
        run = ring_run(ring, forked(saved, tmp_path / name), *double, *options)
        jobs.append(onward(run, num_ranks))
    for name, (num_ranks, options) in {"W2toW1": (1, shape(1)), "W2toS2": (2, shape(2))}.items():
        run = ring_run(ring, forked(two_ways, tmp_path / name), *double, *options)
        jobs.append(onward(run, num_ranks))
    pool.run(jobs, timeout_s=TIMEOUT_S)
    assert {name: losses(tmp_path / name) for name in exact} == dict.fromkeys(exact, losses(whole))
    for name in (*close, "W2toW1", "W2toS2"):
        assert losses(tmp_path / name) == pytest.approx(losses(whole), abs=1e-12), name


@pytest.mark.parametrize(
    "options",
    [["history.period=3"], ["history.warm_start=zeros"], ["history.dtype=bfloat16"]],
)
def test_snapshots_and_first_histories_are_kept(
    options: list[str], ring: Path, tmp_path: Path
) -> None:
    train_on(ring_run(ring, tmp_path / "whole", *options))
    for epoch in (1, 2, 3, 4):
        run = ring_run(ring, tmp_path / str(epoch), *options)
        train_until(run, epoch)
        train_on(run)
        assert losses(tmp_path / str(epoch)) == losses(tmp_path / "whole")


def test_rewarmed_histories_are_exact_values_of_the_weights(ring: Path, tmp_path: Path) -> None:
    whole, small = tmp_path / "whole", tmp_path / "small"
    for directory, option in ((whole, "save"), (small, "rewarm")):
        train_until(ring_run(ring, directory, f"checkpoint.histories={option}"), 4)
    assert size(small) < size(whole)
    train_on(ring_run(ring, small, "checkpoint.histories=rewarm"))
    train_on(ring_run(ring, whole))
    assert losses(small) == pytest.approx(losses(whole), rel=0.05)
    assert losses(small)[:4] == losses(whole)[:4]


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("checkpoints/*/rank-*"))


def test_reference_goes_on_too(tmp_path: Path) -> None:
    from gnnpipe.config import load_config
    from gnnpipe.trainer import run_reference

    common = [*COMMON, "model.num_layers=2", "model.hidden_channels=4"]
    for directory, stops in (("whole", [6]), ("parts", [2, 6])):
        for epochs in stops:
            run = [f"training.epochs={epochs}", f"run.dir={tmp_path / directory}"]
            run_reference(load_config(None, [*common, *run]))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


# --- the run directory


def test_a_finished_run_shows_its_summary_and_more_epochs_continue_it(
    ring: Path, tmp_path: Path
) -> None:
    run = ring_run(ring, tmp_path / "run")
    train_on(run)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    train_on(run)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    train_on([*run, f"training.epochs={EPOCHS + 3}"])
    train_on([*ring_run(ring, tmp_path / "whole"), f"training.epochs={EPOCHS + 3}"])
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    parts, whole = (read_run(tmp_path / name).summary for name in ("run", "whole"))
    assert parts["epochs"] == whole["epochs"] == EPOCHS + 3
    assert parts["wall_s"] > 0
    with pytest.raises(UserError, match=r"`training.epochs` \(=8\) must be at least the 11 that"):
        train_on(run)


def test_figures_after_the_checkpoint_and_a_torn_line_are_dropped(
    ring: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    train_until(ring_run(ring, directory), 5)
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + lines[-1].replace('"epoch": 5', '"epoch": 6') + '{"epo')
    train_on(ring_run(ring, directory))
    train_on(ring_run(ring, tmp_path / "whole"))
    assert losses(directory) == losses(tmp_path / "whole")
    assert path.read_text().startswith("".join(lines))


def test_lost_figures_are_a_clear_error(ring: Path, tmp_path: Path) -> None:
    train_until(ring_run(ring, tmp_path), 4)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(UserError, match=r"must hold the figures of the 4 epochs before the check"):
        train_on(ring_run(ring, tmp_path))


def test_a_run_killed_before_its_first_checkpoint_starts_again(ring: Path, tmp_path: Path) -> None:
    train_until(ring_run(ring, tmp_path / "run"), 2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train_on(ring_run(ring, tmp_path / "run"))
    train_on(ring_run(ring, tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


OTHERS = [
    (["model.hidden_channels=4"], r"model.hidden_channels \(8 there, 4 here\); choose another"),
    (["model.name=gcn"], r"model.name \(\"gcnii\" there, \"gcn\" here\)"),
    (["data.name=digits"], r"data.name \(\".*ring.npz\" there, \"digits\" here\)"),
    (["partition.num_chunks=2"], r"partition.num_chunks \(4 there, 2 here\)"),
    (["seed=1", "history.period=2"], r"seed \(0 there, 1 here\), history.period \(1 there, 2 "),
    (["checkpoint.resume=none"], r"holds an unfinished run; set checkpoint.resume=auto to go on"),
    (["training.epochs=3"], r"`training.epochs` \(=3\) must be at least the 4 of the checkpoint"),
]


@pytest.fixture(scope="module")
def stopped(ring: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its fourth epoch."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    train_until(ring_run(ring, directory), 4)
    return directory


@pytest.mark.parametrize(("options", "message"), OTHERS, ids=[o[0] for o, _ in OTHERS])
def test_another_run_is_refused_with_the_fields_that_differ(
    options: list[str], message: str, stopped: Path, ring: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    with pytest.raises(UserError, match=message):
        train_on([*ring_run(ring, stopped), *options])
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before


def test_other_chunks_of_the_same_graph_are_refused(
    stopped: Path, ring: Path, tmp_path: Path
) -> None:
    graph = load_graph(str(ring / "ring.npz"))
    other = tmp_path / "other"
    save_partition(graph, other, num_chunks=4, num_ways=1, method="random")
    with pytest.raises(UserError, match=r"of this graph and partition, chunk_id_sha256 differ; u"):
        train_on([*ring_run(ring, stopped), f"partition.path={other}"])


def test_the_same_chunks_cut_for_other_ways_are_accepted(
    stopped: Path, ring: Path, tmp_path: Path
) -> None:
    from gnnpipe import chunk

    graph = load_graph(str(ring / "ring.npz"))
    there = chunk.load(ring / "ring-4")
    node = torch.arange(graph.num_nodes)
    chunk_id = torch.empty_like(node)
    starts = torch.from_numpy(there.cell_ptr.copy())[:: there.num_ways]
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        chunk_id[torch.from_numpy(there.node_id.copy())[start:end]] = number
    ids = (chunk_id.numpy(), torch.zeros_like(node).numpy())
    chunk.save(chunk.cut(graph, *ids, num_ways=1, method="bfs", seed=0), tmp_path / "one")
    run = ring_run(ring, forked(stopped, tmp_path / "run"))
    train_on([*run, f"partition.path={tmp_path / 'one'}"])
    train_on(ring_run(ring, tmp_path / "whole"))
    # Rows lie in another order, so sums may differ in their last bits.
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_a_run_branches_off_from_a_named_checkpoint(
    stopped: Path, ring: Path, tmp_path: Path
) -> None:
    branch = [*ring_run(ring, tmp_path / "branch"), f"checkpoint.resume={stopped}"]
    train_on(branch)
    train_on(ring_run(ring, tmp_path / "whole"))
    assert losses(tmp_path / "branch") == losses(tmp_path / "whole")
    slow = [f"run.dir={tmp_path / 'slow'}", "training.lr=0.0001"]
    train_on([*branch, *slow, f"checkpoint.resume={stopped / 'checkpoints' / 'epoch-000003'}"])
    assert losses(tmp_path / "slow")[:4] == losses(tmp_path / "whole")[:4]
    assert losses(tmp_path / "slow")[4:] != losses(tmp_path / "whole")[4:]
    with pytest.raises(UserError, match=r"holds another model or data set: model.hidden_channels"):
        train_on([*branch, f"run.dir={tmp_path / 'no'}", "model.hidden_channels=4"])
    with pytest.raises(UserError, match=r"holds a run already; choose another run.dir to branch "):
        train_on([*branch, "training.epochs=9"])


def test_a_run_goes_back_to_a_named_checkpoint_of_its_own(
    stopped: Path, ring: Path, tmp_path: Path
) -> None:
    run = forked(stopped, tmp_path / "run")
    wish = f"checkpoint.resume={run / 'checkpoints' / 'epoch-000003'}"
    train_until([*ring_run(ring, run), wish, "checkpoint.every=100"], 5)
    assert len(losses(run)) == 5
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["epoch-000003", "epoch-000005"]


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_path_without_a_checkpoint_is_refused(name: str, ring: Path, tmp_path: Path) -> None:
    run = ring_run(ring, tmp_path / "run")
    with pytest.raises(UserError, match=r"must be a sound checkpoint or a run directory that has"):
        train_on([*run, f"checkpoint.resume={tmp_path / name}"])


def test_a_checkpoint_outside_its_run_is_refused(
    stopped: Path, ring: Path, tmp_path: Path
) -> None:
    alone = forked(stopped / "checkpoints" / "epoch-000004", tmp_path / "a" / "epoch-000004")
    with pytest.raises(UserError, match=r"must lie in a run directory with its metrics.jsonl"):
        train_on([*ring_run(ring, tmp_path / "run"), f"checkpoint.resume={alone}"])


def test_a_finished_run_without_checkpoints_cannot_go_on(ring: Path, tmp_path: Path) -> None:
    run = [*ring_run(ring, tmp_path), "checkpoint.every=0"]
    train_on([*run, "training.epochs=2"])
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(UserError, match=r"holds a finished run without a checkpoint to go on fro"):
        train_on(run)


# --- threads


def test_threads_of_the_checkpoint_are_kept_or_the_change_is_named(
    stopped: Path, ring: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from gnnpipe.config import load_config
    from gnnpipe.resume import checked_threads

    auto, two = load_config(None, []), load_config(None, ["run.threads=2"])
    assert checked_threads({}, auto, 2) == 2
    assert checked_threads({"threads": 1}, auto, 2) == 1
    assert checked_threads({"threads": 1}, two, 2) == 2
    assert "run.threads was 1" in caplog.text
    with pytest.raises(UserError, match=r"`run.threads` \(=auto, 2 here\) must be the 4 that the"):
        checked_threads({"threads": 4}, auto, 2)


def test_the_summary_counts_all_parts(ring: Path, tmp_path: Path) -> None:
    train_until(ring_run(ring, tmp_path), 6)
    manifest = json.loads((tmp_path / "checkpoints/epoch-000006/manifest.json").read_text())
    train_on(ring_run(ring, tmp_path))
    assert read_run(tmp_path).summary["wall_s"] > manifest["state"]["wall_s"] > 0
