"""One rank of an emulated comparison: every setting over the same links, epochs in turn."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from slept_stage import Shape, Sleeper, SleptComm, SleptStage

from gnnpipe import chunk
from gnnpipe.assembly import Plan, build_engine, stage_bounds
from gnnpipe.comm import KINDS, Comm
from gnnpipe.config import Config, load_config
from gnnpipe.configured import model_layers
from gnnpipe.costs import load_profile
from gnnpipe.engine import Engine
from gnnpipe.mesh import Mesh
from gnnpipe.metrics import time_shares
from gnnpipe.optimizer import Updates, make_optimizer
from gnnpipe.reports import Reports
from gnnpipe.setting import Setting
from gnnpipe.world import World, join, make_groups

TIMEOUT_S = 600.0

PRIORITY = -15
"""Who has slept, or waited for a message, goes on at once, whatever else the machine does."""


def run_rank(path: Path) -> None:
    """Runs what a case file asks for; rank 0 leaves the figures beside it.

    Args:
        path: JSON with ``overrides``, ``settings``, ``sizes`` and ``partitions`` of each,
            ``profile``, ``dilation`` (None: real work), ``warm_up`` and ``epochs``.
    """
    case = json.loads(path.read_text())
    torch.set_num_threads(1)
    os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    with join(device="cpu", timeout_s=TIMEOUT_S) as world:
        parts = zip(case["settings"], case["sizes"], case["partitions"], strict=True)
        runs = [
            Emulation(case, Setting(*setting), sizes, Path(partition), world)
            for setting, sizes, partition in parts
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
        self,
        case: dict[str, Any],
        setting: Setting,
        sizes: Sequence[int],
        partition: Path,
        world: World,
    ) -> None:
        config = load_config(None, case["overrides"])
        mesh, like, K = (
            Mesh(setting.num_stages, setting.num_ways),
            torch.empty(0),
            case["dilation"],
        )
        kind = Comm if K is None else SleptComm
        groups = make_groups(mesh, world.device)
        self._comm = kind(mesh, world.rank, groups=groups, like=like, timeout_s=TIMEOUT_S)
        self._engine = self._build(config, setting, sizes, partition)
        parameters = [p for stage in self._engine.stages.values() for p in stage.parameters]
        optimizer = make_optimizer(parameters, Updates())
        self._step: Callable[[], object] = optimizer.step
        self._dilation = K or 1.0
        if K is not None:
            profile = load_profile(case["profile"])
            sleeper = Sleeper(K)
            assert isinstance(self._comm, SleptComm)
            self._comm.sleeper, self._comm.profile = sleeper, profile
            shape = Shape(profile, config.model.num_layers + 2)
            for index, stage in self._engine.stages.items():
                slept = SleptStage(stage, self._comm, shape, sleeper)
                self._engine.stages[index] = slept  # type: ignore[assignment]
            step_s = profile.step_s_per_parameter * sum(p.numel() for p in parameters)
            self._step = lambda: sleeper.sleep(step_s)
        self._reports = Reports(self._comm)
        self._epochs: list[dict[str, float]] = []

    def _build(
        self, config: Config, setting: Setting, sizes: Sequence[int], partition: Path
    ) -> Engine:
        self._num_chunks = setting.num_chunks
        chunked, like, v = chunk.load(partition), torch.empty(0), setting.virtual_stages
        layers = model_layers(config, chunked)
        bounds = stage_bounds(layers, chunked, num_stages=setting.num_stages * v, sizes=sizes)
        plan = Plan(
            seed=0,
            bounds=bounds,
            virtual_stages=v,
            period=1,
            cross_chunk_gradient=1.0,
            schedule=setting.schedule,
        )
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
        self._step()
        epoch_s = time.perf_counter() - start_s
        self._reports.take(comm.recorder.stop())
        sent = sum(comm.sent_bytes[kind] for kind in KINDS)
        own = [epoch_s, epoch_s - sum(comm.wait_s.values()), sent]
        parts = self._reports.send(torch.tensor(own, dtype=torch.float64))
        if parts and is_counted:
            lasted, computed, bytes_sent = torch.stack(parts).T.tolist()
            shares = time_shares(lasted, computed, self._reports.trace.transfer_s())
            figures = {
                "epoch_s": max(lasted) / self._dilation,
                "busiest_s": max(computed) / self._dilation,
                "sent_bytes": sum(bytes_sent),
                "most_bytes": max(bytes_sent),
                **shares,
            }
            self._epochs.append(figures)
        comm.flush()
        self._reports.flush()
        comm.sum_over_ranks(torch.zeros(1))

    def figures(self) -> dict[str, Any]:
        """The middle epoch's, and how long each lasted; empty on ranks other than 0.

        In emulated time.
        """
        if not self._epochs:
            return {}
        by_time = sorted(self._epochs, key=lambda each: each["epoch_s"])
        return by_time[len(by_time) // 2] | {"all_s": [e["epoch_s"] for e in self._epochs]}
