"""Starts the ranks of an emulated comparison in namespaces, and gathers their figures."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from shaped_links import inside, shaped_links

from gnnpipe import chunk
from gnnpipe.graph import Graph
from gnnpipe.setting import Prediction, Setting
from partition import assign

WARM_UP, EPOCHS = 1, 3
CARRIED_MBIT = 700.0
"""What the links of all ranks may carry together by the clock, without much work for two cores."""

TOGETHER = 6
"""Settings whose tables one process holds at once."""

CELL_S = 1800.0
"""Longest wait for all settings of a world size."""


class Case(NamedTuple):
    """What all settings of a cell share."""

    overrides: Sequence[str]
    profile: Path
    graph: Graph
    mbit: float
    """Of a link, in emulated time."""
    work: Path
    dilation: float | None
    """Seconds of the clock for one emulated second; None: real work."""


def dilation_of(num_ranks: int, mbit: float) -> float:
    """How much slower than the clock emulated time runs: links slow enough to leave cores idle."""
    return float(max(1, math.ceil(num_ranks * mbit / CARRIED_MBIT)))


def measured(case: Case, wanted: Mapping[str, Prediction]) -> dict[str, dict[str, Any]]:
    """Figures by label; settings of one number of ranks share processes, a few at a time."""
    figures: dict[Setting, dict[str, Any]] = {}
    sizes = {prediction.setting: prediction.sizes for prediction in wanted.values()}
    for own in _groups(sorted(sizes, key=lambda setting: (setting.num_ranks, setting))):
        facts = {
            "overrides": case.overrides,
            "profile": str(case.profile),
            "dilation": case.dilation,
            "warm_up": WARM_UP,
            "epochs": EPOCHS,
            "settings": own,
            "sizes": [sizes[setting] for setting in own],
            "partitions": [str(cut_of(case.graph, setting, case.work)) for setting in own],
        }
        figures |= dict(zip(own, _run(case, facts, own[0].num_ranks), strict=True))
    return {label: figures[prediction.setting] for label, prediction in wanted.items()}


def _groups(wanted: Sequence[Setting]) -> Iterator[list[Setting]]:
    for _, own in groupby(wanted, key=lambda setting: setting.num_ranks):
        settings = list(own)
        for first in range(0, len(settings), TOGETHER):
            yield settings[first : first + TOGETHER]


def _run(case: Case, facts: Mapping[str, Any], num_ranks: int) -> list[dict[str, Any]]:
    """One process in each namespace; none is left."""
    with tempfile.TemporaryDirectory(dir=case.work) as name:
        path = Path(name) / "case.json"
        path.write_text(json.dumps(facts))
        program = Path(__file__).with_name("parallel.py").resolve()
        command = [sys.executable, str(program), "--case", str(path)]
        with shaped_links(num_ranks, case.mbit / (case.dilation or 1.0)) as names:
            children = [
                subprocess.Popen(
                    inside(name, command), env=_environment(rank, num_ranks, path.parent)
                )
                for rank, name in enumerate(names)
            ]
            try:
                statuses = [child.wait(timeout=CELL_S) for child in children]
            finally:
                for child in children:
                    child.kill()
                    child.wait()
        assert not any(statuses), statuses
        found: list[dict[str, Any]] = json.loads((Path(name) / "figures.json").read_text())
        return found


def cut_of(graph: Graph, setting: Setting, work: Path) -> Path:
    """Directory of the graph cut for a setting, made once."""
    C, W = setting.num_chunks, setting.num_ways
    path = work / f"{Path(graph.name).stem}-{C}-{W}"
    if not path.exists():
        ids = assign(graph.indptr, graph.indices, num_chunks=C, num_ways=W)
        chunk.save(chunk.cut(graph, *ids, num_ways=W, method="metis", seed=0), path)
    return path


def _environment(rank: int, size: int, directory: Path) -> dict[str, str]:
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "GNNPIPE_RENDEZVOUS": directory / "rendezvous",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": 1,
        "MKL_NUM_THREADS": 1,
        "NUMBA_NUM_THREADS": 1,
    }
    return os.environ | {name: str(value) for name, value in own.items()}
