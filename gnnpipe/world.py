"""The processes of one run: how they find each other, agree, and fail together."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

# Before any process group exists: its functions have the default group of this moment as their
# default argument. torch.optim imports it too, and a group that it holds outlives its end:
# gloo's threads then come back into an interpreter that is shutting down, which is SIGABRT.
import torch.distributed.nn.functional
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh

from gnnpipe import environment
from gnnpipe.comm import Groups
from gnnpipe.errors import PeerError, UserError
from gnnpipe.meeting import meet
from gnnpipe.mesh import Mesh

SETUP_TIMEOUT_S = 3600.0
"""Longest wait for rank 0 to load and partition a graph."""

_FAILURE_KEY = "gnnpipe/failure"
_PING_KEY = "gnnpipe/ping"
_ANSWER_KEY = "gnnpipe/answer"
_POLL_S = 0.1
_BLAME_S = 2.0
_LISTEN_S = 0.5
_ANSWER_S = 3.0


class World:
    """This process among the others.

    Args:
        rank: this process.
        world_size: number of processes.
        device: where this process computes.
        store: what all processes can read and write; None for a single process.
    """

    def __init__(
        self, rank: int, world_size: int, *, device: torch.device, store: Store | None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._store = store
        self._is_over = threading.Event()
        self._listener: threading.Thread | None = None

    def first(self, name: str, action: Callable[[], str]) -> str:
        """Lets rank 0 do something and tells everyone the outcome.

        Args:
            name: of the step, once per run.
            action: runs on rank 0 only.

        Raises:
            UserError: on every rank, when the action raised one.
        """
        if self._store is None:
            return action()
        key = f"gnnpipe/{name}"
        if self.rank == 0:
            try:
                outcome = {"value": action()}
            except UserError as error:
                self._store.set(key, json.dumps({"error": str(error)}))
                raise
            self._store.set(key, json.dumps(outcome))
        outcome = json.loads(self._await(key, name))
        if "error" in outcome:
            raise UserError(outcome["error"])
        return str(outcome["value"])

    def _await(self, key: str, name: str) -> bytes:
        assert self._store is not None
        deadline = time.monotonic() + SETUP_TIMEOUT_S
        while True:
            # In this order: after a user's mistake rank 0 answers first, then reports a failure.
            failure = self._peer_failure()
            if self._store.check([key]):
                break
            if failure is not None:
                raise PeerError(failure)
            if time.monotonic() > deadline:
                raise PeerError(f"rank 0 did not finish {name} within {SETUP_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)
        value: bytes = self._store.get(key)
        return value

    def _peer_failure(self) -> str | None:
        """What another rank has reported, if one has."""
        if self._store is None or not self._store.check([_FAILURE_KEY]):
            return None
        failure = json.loads(self._store.get(_FAILURE_KEY))
        if failure["rank"] == self.rank:
            return None
        return f"rank {failure['rank']} {failure['what']}"

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tells the others when this rank fails; blames the first one to fail, not the rest."""
        try:
            yield
        except PeerError as error:
            self._blame(error)
        except Exception as error:
            self._report(f"failed: {type(error).__name__}: {error}")
            raise

    def _blame(self, error: PeerError) -> None:
        """A wait broke: gives the rank that caused it a moment to say so."""
        deadline = time.monotonic() + _BLAME_S
        while time.monotonic() < deadline:
            try:
                failure = self._peer_failure()
            except RuntimeError:  # The store went with the rank that held it.
                break
            if failure is not None:
                raise PeerError(failure) from None
            time.sleep(_POLL_S)
        # Those who stop because of this rank shall know why it did.
        self._report(f"stopped: {error}")
        raise PeerError(f"{error}{self._roll_call()}") from error

    def answer(self, describe: Callable[[], str]) -> None:
        """Tells whoever asks what this rank is doing; a rank that is stopped gives no answer.

        Args:
            describe: what this rank is doing.
        """
        if self._store is not None:
            self._listener = threading.Thread(target=self._listen, args=(describe,), daemon=True)
            self._listener.start()

    def close(self) -> None:
        """No more answers.

        The listener ends before the interpreter does: a thread that comes back from the store's
        C++ into an interpreter that is shutting down ends the process with SIGABRT.
        """
        self._is_over.set()
        if self._listener is not None:
            self._listener.join(timeout=_ANSWER_S)

    def _listen(self, describe: Callable[[], str]) -> None:
        assert self._store is not None
        try:
            while not self._is_over.wait(_LISTEN_S):
                if self._store.check([_PING_KEY]):
                    self._store.set(f"{_ANSWER_KEY}/{self.rank}", describe() or "nothing")
                    return
        except RuntimeError:  # The store went with the rank that held it.
            return

    def _roll_call(self) -> str:
        """Asks every rank what it is doing; a stalled run ends with who does not answer."""
        if self._store is None:
            return ""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            self._store.set(_PING_KEY, str(self.rank))
            deadline = time.monotonic() + _ANSWER_S
            while time.monotonic() < deadline:
                present = [r for r in others if self._store.check([f"{_ANSWER_KEY}/{r}"])]
                if len(present) == len(others):
                    break
                time.sleep(_POLL_S)
            said = [
                f"rank {r} was in {self._store.get(f'{_ANSWER_KEY}/{r}').decode()}"
                for r in present
            ]
        except RuntimeError:
            return ""
        missing = [f"rank {r} does not answer" for r in others if r not in present]
        return f" [{', '.join([*missing, *said])}]" if others else ""

    def _report(self, what: str) -> None:
        if self._store is not None:
            text = json.dumps({"rank": self.rank, "what": what.splitlines()[0]})
            with suppress(RuntimeError):  # The store went with the rank that held it.
                self._store.compare_set(_FAILURE_KEY, "", text)


@contextmanager
def join(*, device: str, timeout_s: float) -> Iterator[World]:
    """Joins the processes that a launcher started, or is alone.

    Meanwhile numbers below 1.2e-38 are 0 on a CPU: gradients that vanish in a deep network can
    make an epoch three times as slow otherwise.

    Args:
        device: auto, cpu or cuda.
        timeout_s: longest wait inside a collective, seconds.
    """
    with _vanishing_numbers(), _joined(_device(device), timeout_s) as world:
        yield world


@contextmanager
def _vanishing_numbers() -> Iterator[None]:
    was_on = float(torch.tensor(1e-39) * 0.5) == 0.0
    torch.set_flush_denormal(True)  # Threads that start later inherit it.
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)


@contextmanager
def _joined(chosen: torch.device, timeout_s: float) -> Iterator[World]:
    if dist.is_initialized():  # inside a user's own script
        rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
        own = _own_part(store, rank)
        world = World(rank, dist.get_world_size(), device=chosen, store=own)
        with closing(world):
            yield world
        return
    if environment.world_size() == 1:
        yield World(0, 1, device=chosen, store=None)
        return
    store, rank, world_size = meet(timedelta(seconds=timeout_s))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    world = World(rank, world_size, device=chosen, store=_own_part(store, rank))
    with closing(world):
        yield world
    # Only after success: tearing down beside a failed rank would wait for it.
    dist.destroy_process_group()


def _own_part(store: Store, rank: int) -> Store:
    """A part of the store for this run alone: a script may train several times."""
    run_index = store.add(f"gnnpipe/runs/{rank}", 1)
    return PrefixStore(f"gnnpipe/run-{run_index}", store)


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"`device` (={name}) must offer a GPU to each local rank, rank {local_rank} finds "
            f"{torch.cuda.device_count()}; start fewer processes per host or set device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def make_groups(mesh: Mesh, device: torch.device) -> Groups:
    """Makes the process groups that ``comm`` needs; every rank calls it."""
    if mesh.world_size == 1:
        return Groups()
    ways = None
    if mesh.num_ways > 1:
        shape = (mesh.num_stages, mesh.num_ways)
        ways = init_device_mesh(device.type, shape, mesh_dim_names=("stage", "way"))
    group = ways.get_group("way") if ways is not None else None
    if device.type != "cuda":
        return Groups(ways=group)
    forward, backward, halo = (dist.new_group(backend="nccl") for _ in range(3))
    return Groups(forward, backward, halo, group)
