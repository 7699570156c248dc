"""Byte counters against the interface counters of a real link.

Two ranks sit in two network namespaces that a pair of virtual interfaces joins::

    namespace 0: rank 0, 10.231.0.1 <--- veth ---> namespace 1: rank 1, 10.231.0.2

What the counters call payload is compared with what the interface carried, over some epochs in
the middle of a run: headers and acknowledgements come on top, setting up does not.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from combinations import both_ways, write_npz
from two_hosts import Link, needs_namespaces

from gnnpipe.environment import child_environment
from gnnpipe.preflight import thread_variables

pytestmark = [pytest.mark.timeout(150), needs_namespaces]

RANK = Path(__file__).with_name("interface_rank.py")
NUM_NODES = 3000
EPOCHS = 8
FROM, TO = 2, 7
"""Ends of the epochs between which both counters are compared; the last epoch evaluates."""


def test_counted_bytes_equal_what_the_interface_carries(link: Link, tmp_path: Path) -> None:
    ring = [(i, (i + step) % NUM_NODES) for i in range(NUM_NODES) for step in (1, 7, 100)]
    write_npz(tmp_path / "ring.npz", both_ways(ring), num_nodes=NUM_NODES)
    settings = {
        "stages": ["model.name=gcnii", "parallel.num_stages=2"],
        "ways": ["model.name=gcnii", "parallel.num_ways=2"],
        "ways-gather": ["model.name=gat", "parallel.num_ways=2"],
    }
    common = [
        f"data.name={tmp_path / 'ring.npz'}",
        "partition.method=random",
        "partition.num_chunks=3",
        "model.num_layers=4",
        "model.hidden_channels=64",
        f"training.epochs={EPOCHS}",
        f"training.eval_every={EPOCHS}",
        "run.tensorboard=false",
        "run.timeout_s=60",
    ]
    runs = [[*common, *own, f"run.dir={tmp_path / key}"] for key, own in settings.items()]
    notes = train_over(link, runs, tmp_path)
    kinds = ({"boundary", "carried"}, {"halo", "gradient"}, {"halo", "gradient"})
    for run, sent_kinds in zip(notes, kinds, strict=True):
        between = run[FROM:TO]
        counted = sum(sum(note["counted"].values()) for note in between)
        carried = run[TO - 1]["on_link"] - run[FROM - 1]["on_link"]
        assert {kind for kind, count in between[0]["counted"].items() if count} == sent_kinds
        assert counted > 5e6
        assert carried == pytest.approx(counted, rel=0.05)


def train_over(
    link: Link, runs: Sequence[Sequence[str]], folder: Path
) -> list[list[dict[str, Any]]]:
    """Trains with one rank in each namespace; the notes of rank 0, by run and epoch."""
    settings, result = folder / "settings.json", folder / "notes.json"
    settings.write_text(json.dumps(runs))
    with ExitStack() as stack:
        ranks = []
        for rank, (space, interface) in enumerate(
            zip(link.namespaces, link.interfaces, strict=True)
        ):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": link.addresses[0],
                "MASTER_PORT": "29700",
                "GLOO_SOCKET_IFNAME": interface,
                **thread_variables(1),
            }
            command = ["ip", "netns", "exec", space, sys.executable, str(RANK)]
            output = stack.enter_context((folder / f"output-{rank}").open("w"))
            process = subprocess.Popen(
                [*command, interface, str(result), str(settings)],
                env=child_environment(variables),
                stdout=output,
                stderr=output,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            ranks.append(process)
        statuses = [process.wait(timeout=120) for process in ranks]
    texts = [(folder / f"output-{rank}").read_text() for rank in range(2)]
    assert statuses == [0, 0], "\n".join(texts)
    notes: list[list[dict[str, Any]]] = json.loads(result.read_text())
    return notes
