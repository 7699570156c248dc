"""One rank of an emulated comparison: every setting over the same links, epochs in turn."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from slept_stage import Shape, SleptStage

from gnnpipe import chunk
from gnnpipe.assembly import Plan, build_engine, stage_bounds
from gnnpipe.comm import KINDS, Comm
from gnnpipe.config import Config, load_config
from gnnpipe.configured import model_layers
from gnnpipe.costs import load_profile
from gnnpipe.engine import Engine
from gnnpipe.mesh import Mesh
from gnnpipe.metrics import time_shares
from gnnpipe.planner import Setting
from gnnpipe.reports import Reports
from gnnpipe.world import World, join, make_groups

TIMEOUT_S = 200.0


def run_rank(path: Path) -> None:
    """Runs what a case file asks for; rank 0 leaves the figures beside it.

    Args:
        path: JSON with ``overrides``, ``settings``, ``partitions``, ``profile``, ``is_slept``,
            ``warm_up`` and ``epochs``.
    """
    case = json.loads(path.read_text())
    torch.set_num_threads(1)
    with join(device="cpu", timeout_s=TIMEOUT_S) as world:
        runs = [
            Emulation(case, Setting(*setting), Path(partition), world)
            for setting, partition in zip(case["settings"], case["partitions"], strict=True)
        ]
        for epoch in range(1, case["warm_up"] + case["epochs"] + 1):
            for run in runs:  # In turn: what else the machine does meets all of them.
                run.train(epoch, is_counted=epoch > case["warm_up"])
        found = [run.figures() for run in runs]
    if world.rank == 0:
        path.with_name("figures.json").write_text(json.dumps(found))


class Emulation:
    """This rank's part of one setting."""

    def __init__(
        self, case: dict[str, Any], setting: Setting, partition: Path, world: World
    ) -> None:
        config = load_config(None, case["overrides"])
        S, W, self._num_chunks, _ = setting
        mesh, like = Mesh(S, W), torch.empty(0)
        groups = make_groups(mesh, world.device)
        self._comm = Comm(mesh, world.rank, groups=groups, like=like, timeout_s=TIMEOUT_S)
        self._engine = self._build(config, setting, partition)
        if case["is_slept"]:
            num_layers = config.model.num_layers + 2
            shape = Shape(load_profile(case["profile"]), num_layers)
            for index, stage in self._engine.stages.items():
                slept = SleptStage(stage, self._comm, shape)
                self._engine.stages[index] = slept  # type: ignore[assignment]
        self._reports = Reports(self._comm)
        self._epochs: list[dict[str, float]] = []

    def _build(self, config: Config, setting: Setting, partition: Path) -> Engine:
        chunked, like, v = chunk.load(partition), torch.empty(0), setting.virtual_stages
        layers = model_layers(config, chunked)
        bounds = stage_bounds(layers, chunked, num_stages=setting.num_stages * v, sizes=None)
        plan = Plan(seed=0, bounds=bounds, virtual_stages=v, period=1, cross_chunk_gradient=1.0)
        return build_engine(chunked, layers, plan=plan, comm=self._comm, like=like)

    def train(self, epoch: int, *, is_counted: bool) -> None:
        """One epoch, between two moments that all ranks share."""
        comm = self._comm
        comm.sum_over_ranks(torch.zeros(1))
        comm.wait_s.clear()
        comm.sent_bytes.clear()
        comm.recorder.start()
        start_s = time.perf_counter()
        self._engine.train_step(epoch, list(range(self._num_chunks)))
        epoch_s = time.perf_counter() - start_s
        self._reports.take(comm.recorder.stop())
        sent = sum(comm.sent_bytes[kind] for kind in KINDS)
        own = [epoch_s, epoch_s - sum(comm.wait_s.values()), sent]
        parts = self._reports.send(torch.tensor(own, dtype=torch.float64))
        if parts and is_counted:
            lasted, computed, bytes_sent = torch.stack(parts).T.tolist()
            shares = time_shares(lasted, computed, self._reports.trace.transfer_s())
            figures = {"epoch_s": max(lasted), "sent_bytes": sum(bytes_sent), **shares}
            self._epochs.append(figures)
        comm.flush()
        self._reports.flush()
        comm.sum_over_ranks(torch.zeros(1))

    def figures(self) -> dict[str, Any]:
        """The middle epoch's, and how long each lasted; empty on ranks other than 0."""
        if not self._epochs:
            return {}
        by_time = sorted(self._epochs, key=lambda each: each["epoch_s"])
        return by_time[len(by_time) // 2] | {"all_s": [e["epoch_s"] for e in self._epochs]}
