"""The scripts for clusters, as far as one machine goes: two network namespaces, stand-in tools."""

import json
import os
import subprocess
import sys
from pathlib import Path

import own_session
import pytest
import yaml
from resuming import losses, ring_run, train_on, write_ring
from two_hosts import Link, needs_namespaces

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "launch" / "examples"
MOMENTS = ROOT / "benchmarks" / "moments"
TIMEOUT_S = 200

pytestmark = pytest.mark.timeout(280)


def stand_in(folder: Path, name: str, body: str) -> None:
    """A program that takes the place of a cluster's own on the path."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def run(command: list[str], variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    own = {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **variables}
    return own_session.run(command, variables=own, timeout_s=TIMEOUT_S)


@needs_namespaces
def test_slurm_starts_torchrun_on_every_host_and_again_when_a_rank_is_killed(
    link: Link, tmp_path: Path
) -> None:
    write_ring(tmp_path)
    train_on(ring_run(tmp_path, tmp_path / "whole"))
    tools, notes, directory = tmp_path / "bin", tmp_path / "notes", tmp_path / "run"
    notes.mkdir()
    stand_in(tools, "scontrol", f"printf '%s\\n' {' '.join(link.addresses)}")
    on_each = [
        f'LOCAL_ADDRESS={address} NETWORK_INTERFACE={interface} ip netns exec {space} "$@" &'
        for space, interface, address in zip(*link, strict=True)
    ]
    stand_in(tools, "srun", "\n".join([*on_each, "wait -n && wait -n"]))
    strike = {"rank": 1, "places": ["Engine._backward"], "epoch": 6, "events": 9, "signal": 9}
    metrics = str(directory / "metrics.jsonl")
    plan = {"notes": str(notes), "metrics": metrics, "strikes": [strike]}
    done = run(
        [
            *("bash", str(EXAMPLES / "slurm.sbatch")),
            *ring_run(tmp_path, directory, "parallel.num_stages=2"),
        ],
        {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(MOMENTS)]),
            "OMP_NUM_THREADS": "1",
            "RANKS_PER_NODE": "1",
            "PORT": "29720",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "host-[0-1]",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "GNNPIPE_CHAOS_PLAN": json.dumps(plan),
        },
    )
    assert done.returncode == 0, done.stderr
    assert (notes / "strike-0.json").exists()
    assert "going on after epoch 3 with " in done.stderr
    assert losses(directory) == losses(tmp_path / "whole")


def test_a_ray_job_runs_our_launcher_on_the_cluster(tmp_path: Path) -> None:
    stand_in(tmp_path / "bin", "ray", "printf '%s\\n' \"$@\"")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {"PATH": path, "RAY_ADDRESS": "http://head:8265"}
    done = run(["bash", str(EXAMPLES / "ray_job.sh"), "c.yaml", "seed=1"], variables)
    assert done.returncode == 0, done.stderr
    words = "job submit --address http://head:8265 -- python -m launch ray --address auto c.yaml"
    assert done.stdout.split() == [*words.split(), "seed=1"]


def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((EXAMPLES / "cluster.yaml").read_text())
    validate_config(prepare_config(cluster))
    with pytest.raises(Exception, match="hed_start_ray_commands"):
        validate_config(prepare_config({**cluster, "hed_start_ray_commands": []}))


@pytest.mark.parametrize("script", ["ray_job.sh", "multi_host.sh"])
def test_a_script_without_arguments_says_how_it_is_used(script: str) -> None:
    done = run(["bash", str(EXAMPLES / script)], {})
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
