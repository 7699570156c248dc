"""The Ray launcher: what it settles before Ray starts, and one job from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import own_session
import pytest
from resuming import losses, ring_run, train_on, write_ring

from gnnpipe.config import Config, load_config, to_dict
from gnnpipe.errors import UserError
from launch.__main__ import main

TIMEOUT_S = 280
ROOT = Path(__file__).resolve().parents[1]
MOMENTS = ROOT / "benchmarks" / "moments"


def test_a_job_whose_worker_is_killed_goes_on_and_has_the_losses_of_one_process(
    tmp_path: Path,
) -> None:
    write_ring(tmp_path)
    train_on(ring_run(tmp_path, tmp_path / "whole"))
    relative = [
        word.replace(f"{tmp_path}/", "") for word in ring_run(tmp_path, tmp_path / "ray", LOG)
    ]
    command = [sys.executable, "-P", "-m", "launch", "ray", *relative, "parallel.num_stages=2"]
    (tmp_path / "notes").mkdir()
    strike = {"rank": 1, "places": ["Engine._backward"], "epoch": 6, "events": 9, "signal": 9}
    plan = {
        "notes": str(tmp_path / "notes"),
        "metrics": str(tmp_path / "ray" / "metrics.jsonl"),
        "strikes": [strike],
    }
    path = os.pathsep.join([str(ROOT), str(MOMENTS)])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GNNPIPE_CHAOS_PLAN": json.dumps(plan)}
    done = own_session.run(
        [*command, "--max-restarts", "1"], variables=own, timeout_s=TIMEOUT_S, directory=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "notes" / "strike-0.json").read_text())["epochs"] >= 3
    assert "going on after epoch 3 with " in done.stderr
    assert losses(tmp_path / "ray") == losses(tmp_path / "whole")
    shown = [line for line in done.stderr.splitlines() if line.startswith("epoch ")]
    assert shown[-1].startswith("epoch 008 | loss ")
    assert done.stdout.startswith("best   epoch")


LOG = "run.log_every=2"


def test_a_signal_to_the_driver_leaves_a_checkpoint(tmp_path: Path) -> None:
    write_ring(tmp_path)
    directory = tmp_path / "ray"
    run = ring_run(tmp_path, directory, "checkpoint.every=100000")
    command = [sys.executable, "-P", "-m", "launch", "ray", *run, "training.epochs=100000"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not (directory / "metrics.jsonl").exists():
            assert time.monotonic() < deadline_s
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        out, error = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    done = len(losses(directory))
    assert process.returncode == 0, error
    assert f"stopped by SIGTERM after epoch {done}; the same command goes on" in error
    assert (out, "Traceback" in error) == ("", False)
    assert [path.name for path in (directory / "checkpoints").iterdir()] == [f"epoch-{done:06d}"]
    epochs = f"training.epochs={done + 2}"
    train_on([*run, epochs])
    train_on(ring_run(tmp_path, tmp_path / "whole", "checkpoint.every=100000", epochs))
    assert losses(directory) == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("hosts", "stages", "ways", "strategy"),
    [
        (1, 4, 2, "SPREAD"),
        (2, 4, 1, "SPREAD"),
        (2, 2, 2, "SPREAD"),
        (2, 3, 2, "PACK"),
        (4, 2, 2, "PACK"),
        (4, 2, 1, "SPREAD"),
    ],
)
def test_stages_are_spread_where_that_splits_none(
    hosts: int, stages: int, ways: int, strategy: str
) -> None:
    from launch.cluster import placement

    assert placement(hosts, stages, ways) == strategy


def test_hosts_that_are_taken_away_are_counted_apart() -> None:
    """Ray's own policy, with our settings: no failure is left, and yet the job goes on."""
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.execution.failure_handling import create_failure_policy
    from ray.train.v2.api.exceptions import WorkerGroupError

    from launch.cluster import failure_config

    policy = create_failure_policy(failure_config(0))
    taken = RayActorError()
    taken._preempted = True
    for _ in range(5):
        assert policy.make_decision(WorkerGroupError("", {0: taken})).name == "RETRY"
    failed = WorkerGroupError("", {0: RuntimeError("boom")})
    assert policy.make_decision(failed).name == "RAISE"


def test_a_job_on_fewer_ranks_is_planned_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import board

    seen = []

    class Fitted:
        def __init__(self, config: Config, **_: object) -> None:
            seen.append(config)

        def fit(self) -> None:
            """Trains nothing."""

    monkeypatch.setattr("gnnpipe.trainer.Trainer", Fitted)
    planned = load_config(None, ["parallel.num_stages=2", "parallel.num_ways=2"])
    for ranks in ("4", "3", "2"):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", ranks)
        board.train_rank({"config": to_dict(planned), "board": None})
    shapes = [(config.parallel.num_stages, config.parallel.num_ways) for config in seen]
    assert shapes == [(2, 2), (3, 1), (1, 2)]


def test_workers_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.cluster import with_absolute_paths

    monkeypatch.chdir(tmp_path)
    given = [
        "data.name=a.npz",
        "data.root=raw",
        "partition.path=cut",
        "partition.method=file",
        "partition.file=ids.npy",
        "checkpoint.resume=runs/old",
        "run.dir=runs/new",
    ]
    config = with_absolute_paths(load_config(None, given))
    paths = [config.data.name, config.data.root, config.partition.path, config.partition.file]
    assert paths == [str(tmp_path / name) for name in ("a.npz", "raw", "cut", "ids.npy")]
    assert config.checkpoint.resume == str(tmp_path / "runs/old")
    assert config.run.dir == str(tmp_path / "runs/new")
    plain = with_absolute_paths(load_config(None, []))
    assert (plain.data.name, plain.checkpoint.resume) == ("digits", "auto")


def test_a_cluster_that_is_too_small_is_refused() -> None:
    from launch.cluster import check_capacity

    check_capacity({"CPU": 4.0}, {"CPU": 2.0}, 2)
    with pytest.raises(UserError, match=r"must have 6 CPU \(=4\) for 3 ranks; add hosts, use few"):
        check_capacity({"CPU": 4.0}, {"CPU": 2.0}, 3)
    with pytest.raises(UserError, match=r"must have 2 GPU \(=0\) for 2 ranks"):
        check_capacity({"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}, 2)


def test_only_ranks_that_failed_by_themselves_are_shown() -> None:
    from launch.cluster import failure_lines

    cause, effect = RuntimeError("boom\nthere"), RuntimeError("PeerError: rank 1 failed")
    assert failure_lines({0: effect, 1: cause}) == ["[rank 1] boom", "[rank 1] there"]
    assert failure_lines({0: effect}) == ["[rank 0] PeerError: rank 1 failed"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ray", "arguments are required: CONFIG.yaml"),
        ("ray --max-restarts -2 seed=1", "`--max-restarts` (=-2) must be at least -1"),
        ("ray --cpus-per-rank 0 seed=1", "`--cpus-per-rank` (=0.0) above 0"),
        ("ray --min-ranks 2 seed=1", "`--min-ranks` (=2) must be at least 1 and at most"),
        ("ray model.depth=3", "`model.depth` is not a known key"),
        ("ray data.name=x.npz", "`data.name` (=x.npz) must be a file"),
    ],
)
def test_mistakes_are_told_before_ray_loads(
    line: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "launch.cluster", None)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
