"""One process per rank on a Ray cluster: a Ray Train job whose workers train, and report here.

Ray starts the processes and, when one fails, starts all of them again; where to go on is in the
run's own checkpoints. So the run directory must lie where every host sees it.
"""

import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gnnpipe import preflight
from gnnpipe.config import Config, from_dict, to_dict
from gnnpipe.environment import child_environment
from gnnpipe.errors import Stopped, UserError
from gnnpipe.stopping import StopRequest, stop_requests
from launch.board import Board, train_rank

NOTES_DIR = "ray"
"""Where Ray Train keeps its own notes, inside the run directory."""
POLL_S = 0.3

PLACEMENT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
ELASTIC_PLACEMENT_S = "15"
"""How long an elastic job waits for the hosts that Ray has promised: one may just have gone."""

SETTINGS = {
    # Ray gives up on a placement after a minute, and starts to wait again.
    PLACEMENT_VARIABLE: "300",
    # Ray starts workers with niceness 15: beside anything else on the host they would starve.
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Job(NamedTuple):
    """What the command line asks of Ray."""

    address: str | None
    """Of a cluster; None takes the one that this host belongs to, or starts a local one."""
    max_restarts: int
    """Restarts of all ranks after failures; a host that is taken away does not count."""
    cpus_per_rank: float | None
    """None: the threads of a rank."""
    min_ranks: int | None = None
    """Fewest ranks to go on with while hosts are missing; None waits for all."""
    is_quiet: bool = False
    """Whether only warnings and errors are shown."""


def run_on_cluster(config: Config, job: Job) -> int:
    """Runs one training job to its end and shows the run's own progress.

    Args:
        config: the run.
        job: where and how.

    Returns:
        The exit status: 0 or 1.

    Raises:
        UserError: what the user can mend.
        Stopped: SIGTERM or Ctrl-C asked for it; a checkpoint has been written.
    """
    config = with_absolute_paths(config)
    threads = preflight.resolve_threads(config, config.world_size)
    resources = {"CPU": job.cpus_per_rank or float(threads)}
    if config.device == "cuda":
        resources["GPU"] = 1.0
    variables = preflight.thread_variables(threads)
    if job.min_ranks is not None:
        os.environ.setdefault(PLACEMENT_VARIABLE, ELASTIC_PLACEMENT_S)
    out, num_cpus = sys.stdout, resources["CPU"] * config.world_size
    with _without_noise(), _connected(job.address, num_cpus, variables) as is_ours:
        present = ray.cluster_resources()  # type: ignore[no-untyped-call]
        check_capacity(present, resources, job.min_ranks or config.world_size)
        board = _actor(Board)
        options: dict[str, Any] = {  # Ray's annotations know the older version's.
            "name": NOTES_DIR,
            "storage_path": config.run.dir,
            "failure_config": failure_config(job.max_restarts),
            # Ray gives a rank one OMP thread, whatever the run wants.
            "worker_runtime_env": {} if is_ours else {"env_vars": variables},
        }
        run_config = RunConfig(**options)
        is_kept = config.checkpoint.every > 0
        # Not before Ray has started: it sets a handler of its own.
        with stop_requests(is_on=is_kept) as request, _shown(board, out, request):
            scaling = _scaling(config, resources, job.min_ranks)
            work = {"config": to_dict(config), "board": board, "is_quiet": job.is_quiet}
            status = _fit(work, scaling, run_config, timeout_s=config.run.timeout_s)
        if mistake := ray.get(board.mistake.remote()):
            raise UserError(mistake)
        if stopped := ray.get(board.stopped.remote()):
            raise Stopped(*stopped)
    return status


def with_absolute_paths(config: Config) -> Config:
    """The same run for workers, which have another working directory."""
    values = to_dict(config)
    for section, key in (("run", "dir"), ("data", "root"), ("partition", "path")):
        values[section][key] = _absolute(values[section][key])
    values["partition"]["file"] = _absolute(values["partition"]["file"])
    if config.data.name.endswith(preflight.PATH_SUFFIXES):
        values["data"]["name"] = _absolute(config.data.name)
    if config.checkpoint.resume not in ("auto", "none"):
        values["checkpoint"]["resume"] = _absolute(config.checkpoint.resume)
    return from_dict(values)


def check_capacity(
    present: Mapping[str, float], per_rank: Mapping[str, float], num_ranks: int
) -> None:
    """Checks that a cluster can hold all ranks, rather than wait for ever.

    Args:
        present: resources of the whole cluster.
        per_rank: what each rank asks for.
        num_ranks: number of ranks.
    """
    for name, amount in per_rank.items():
        total = present.get(name, 0.0)
        if total < amount * num_ranks:
            raise UserError(
                f"the cluster must have {amount * num_ranks:g} {name} (={total:g}) for {num_ranks}"
                " ranks; add hosts, use fewer ranks or give --cpus-per-rank"
            )


def placement(num_hosts: int, num_stages: int, num_ways: int) -> str:
    """Ray's strategy that spreads the stages and keeps the ways of each on one host.

    Ray numbers ranks host by host. Spread evenly, each host gets the next ranks; where these are
    whole stages, that is what is wanted. Where they are not, packing splits the fewest stages::

        2 hosts, S = 2, W = 2    SPREAD   host 0: stage 0, both ways   host 1: stage 1
        2 hosts, S = 3, W = 2    PACK     host 0: stages 0, 1 ...      host 1: what is left

    Args:
        num_hosts: that the cluster has.
        num_stages: pipeline ranks.
        num_ways: ranks of each stage.
    """
    is_even = num_stages % num_hosts == 0 or (num_ways == 1 and num_hosts > num_stages)
    return "SPREAD" if is_even else "PACK"


def _scaling(config: Config, resources: dict[str, float], min_ranks: int | None) -> ScalingConfig:
    parallel, nodes = config.parallel, ray.nodes()  # type: ignore[no-untyped-call]
    num_hosts = sum(node["Alive"] for node in nodes)
    options: dict[str, Any] = {
        "num_workers": (min_ranks, config.world_size) if min_ranks else config.world_size,
        "placement_strategy": placement(num_hosts, parallel.num_stages, parallel.num_ways),
    }
    return ScalingConfig(use_gpu="GPU" in resources, resources_per_worker=resources, **options)


def failure_config(max_restarts: int) -> FailureConfig:
    """Failures are counted; hosts that are taken away are not, however many."""
    options: dict[str, Any] = {"max_failures": max_restarts, "max_preemption_failures": -1}
    return FailureConfig(**options)


def _actor(cls: Any) -> Any:  # Any: Ray makes up the types of actors
    """An actor on the driver's host: whichever other host is lost, it stays."""
    own_host = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(cls).options(num_cpus=0, scheduling_strategy=own_host).remote()


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to us: Ray's own handler ends the ranks where they are."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Does nothing."""


def _fit(
    work: dict[str, Any], scaling: ScalingConfig, run_config: RunConfig, *, timeout_s: float
) -> int:
    trainer = _Trainer(
        train_rank,
        train_loop_config=work,
        scaling_config=scaling,
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if scaling.use_gpu else "gloo",
            timeout_s=int(max(1, timeout_s)),
        ),
        run_config=run_config,
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        for line in failure_lines(error.worker_failures):
            sys.stderr.write(line + "\n")
        return 1
    except TrainingFailedError as error:
        sys.stderr.write(f"launch: {error}\n")
        return 1
    return 0


def failure_lines(failures: Mapping[int, Exception]) -> list[str]:
    """The tracebacks of the ranks that failed by themselves; others only stopped with them."""
    own = {rank: error for rank, error in failures.items() if "PeerError" not in str(error)}
    return [
        f"[rank {rank}] {line}"
        for rank, error in sorted((own or failures).items())
        for line in str(error).splitlines()
    ]


@contextmanager
def _connected(
    address: str | None, num_cpus: float, variables: Mapping[str, str]
) -> Iterator[bool]:
    """Joins a cluster, or starts one of this host alone; says whether it did that."""
    os.environ.update({key: os.environ.get(key, value) for key, value in SETTINGS.items()})
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    is_ours = False
    try:
        ray.init(address=address or "auto", **options)
    except ConnectionError as error:
        if address is not None:
            raise UserError(
                f"`--address` (={address}) must be a Ray cluster ({error}); start one with"
                " `ray start --head`, or leave --address out"
            ) from None
        # Inherited by everything that Ray starts here; as a runtime environment they would make
        # it start every process afresh.
        is_ours = True
        os.environ.update(variables)
        os.environ["PYTHONPATH"] = child_environment({})["PYTHONPATH"]
        total = max(os.cpu_count() or 1, math.ceil(num_cpus))
        try:
            ray.init(address="local", num_cpus=total, include_dashboard=False, **options)
        except Exception as error:  # Ray's has no class of its own.
            raise UserError(
                f"Ray does not start on this host: {' '.join(str(error).split())} Try again when"
                " the host is less busy, or run `ray start --head` and then the same command"
            ) from error
    try:
        yield is_ours
    finally:
        ray.shutdown()


@contextmanager
def _without_noise() -> Iterator[None]:
    """Drops what Ray prints on stdout, such as that a worker died: the job tells what matters."""
    with open(os.devnull, "w") as noise, redirect_stdout(noise):
        yield


@contextmanager
def _shown(board: Any, out: TextIO, request: StopRequest) -> Iterator[None]:
    """Writes what rank 0 logs to stderr, its last words to ``out``; passes on a wish to stop."""
    is_over = threading.Event()

    def show() -> None:
        for stream, text in ray.get(board.take.remote()):
            (out if stream == "out" else sys.stderr).write(text + "\n")

    def follow() -> None:
        with suppress(ray.exceptions.RayError):  # The driver tells what became of the job.
            is_told = False
            while not is_over.wait(POLL_S):
                show()
                if request.signal is not None and not is_told:
                    is_told = ray.get(board.ask.remote(int(request.signal))) is None

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        with suppress(ray.exceptions.RayError):
            show()


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
