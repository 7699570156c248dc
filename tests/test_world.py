"""How the processes of a run agree on what rank 0 did, and fail together."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from gnnpipe import world as world_module
from gnnpipe.errors import PeerError, UserError
from gnnpipe.mesh import Mesh
from gnnpipe.world import World, join, make_groups

CPU = torch.device("cpu")


def two_ranks() -> tuple[World, World]:
    """Both ends of a run of two, in this one process."""
    store = HashStore()
    return World(0, 2, device=CPU, store=store), World(1, 2, device=CPU, store=store)


@pytest.fixture
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_BLAME_S": 0.15, "_POLL_S": 0.01, "_ANSWER_S": 0.05}.items():
        monkeypatch.setattr(world_module, name, value)


def fail(error: Exception) -> Callable[[], str]:
    def action() -> str:
        raise error

    return action


def test_a_process_alone_just_acts() -> None:
    with join(device="cpu", timeout_s=5) as alone:
        assert (alone.rank, alone.world_size, alone.device) == (0, 1, CPU)
        assert alone.first("setup", lambda: "done") == "done"
        with pytest.raises(UserError, match="no such file"), alone.failing_together():
            alone.first("again", fail(UserError("no such file")))
    assert not dist.is_initialized()
    assert make_groups(Mesh(1, 1), CPU) == (None, None, None, None)


def test_every_rank_learns_what_rank_0_did() -> None:
    first, second = two_ranks()
    assert first.first("setup", lambda: "a path") == "a path"
    assert second.first("setup", fail(AssertionError("rank 0 only"))) == "a path"


def test_a_mistake_that_rank_0_finds_is_one_on_every_rank() -> None:
    first, second = two_ranks()
    for rank in (first, second):
        with pytest.raises(UserError, match="no training node"), rank.failing_together():
            rank.first("setup", fail(UserError("no training node")))


class LateStore:
    """A store in which something happens right after somebody has looked for a key."""

    def __init__(self, key: str, happens: Callable[[], None], store: Any) -> None:
        self._key = key
        self._happens: Callable[[], None] | None = happens
        self._store = store

    def check(self, keys: list[str]) -> bool:
        found = bool(self._store.check(keys))
        if keys == [self._key] and self._happens:
            happens, self._happens = self._happens, None
            happens()
        return found

    def __getattr__(self, name: str) -> Any:  # whatever else a store does
        return getattr(self._store, name)


@pytest.mark.parametrize("key", ["gnnpipe/setup", "gnnpipe/failure"])
def test_a_mistake_is_one_whenever_the_others_look(key: str) -> None:
    store = HashStore()
    first = World(0, 2, device=CPU, store=store)

    def find_mistake() -> None:
        with pytest.raises(UserError), first.failing_together():
            first.first("setup", fail(UserError("no training node")))

    late: Any = LateStore(key, find_mistake, store)
    second = World(1, 2, device=CPU, store=late)
    with pytest.raises(UserError, match="no training node"):
        second.first("setup", lambda: "")


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), MemoryError("x")])
def test_another_failure_of_rank_0_is_a_peers(error: Exception) -> None:
    first, second = two_ranks()
    with pytest.raises(type(error)), first.failing_together():
        first.first("setup", fail(error))
    with pytest.raises(PeerError, match=f"rank 0 failed: {type(error).__name__}: '?x'?$"):
        second.first("setup", lambda: "")


def test_rank_0_may_not_take_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "SETUP_TIMEOUT_S", 0.05)
    with pytest.raises(PeerError, match="rank 0 did not finish setup within 0.05 s"):
        two_ranks()[1].first("setup", lambda: "")


@pytest.mark.usefixtures("_short_waits")
def test_broken_wait_names_the_rank_that_failed() -> None:
    first, second = two_ranks()
    with pytest.raises(RuntimeError, match="out of"), first.failing_together():
        raise RuntimeError("out of luck\nand more")
    with (
        pytest.raises(PeerError, match="^rank 0 failed: RuntimeError: out of luck$"),
        second.failing_together(),
    ):
        raise PeerError("rank 0 never sent boundary rows")


@pytest.mark.usefixtures("_short_waits")
def test_broken_wait_that_nobody_explains_stands_and_explains_others() -> None:
    first, second = two_ranks()
    with pytest.raises(PeerError, match="^rank 2 never sent"), second.failing_together():
        raise PeerError("rank 2 never sent boundary rows")
    with (
        pytest.raises(PeerError, match="^rank 1 stopped: rank 2 never sent boundary rows"),
        first.failing_together(),
    ):
        raise PeerError("rank 1 never sent boundary rows")


@pytest.mark.usefixtures("_short_waits")
def test_broken_wait_tells_what_the_others_are_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "_LISTEN_S", 0.01)
    monkeypatch.setattr(world_module, "_ANSWER_S", 2.0)
    store = HashStore()
    busy, stopped = (World(rank, 3, device=CPU, store=store) for rank in (0, 1))
    busy.answer(lambda: "0B3")
    with (
        pytest.raises(PeerError, match=r"\[rank 2 does not answer, rank 0 was in 0B3\]$"),
        stopped.failing_together(),
    ):
        raise PeerError("rank 2 never sent boundary rows")
    busy.close()


@pytest.mark.usefixtures("_short_waits")
def test_first_failure_counts() -> None:
    first, second = two_ranks()
    for rank, error in ((first, KeyError("early")), (second, KeyError("late"))):
        with pytest.raises(KeyError), rank.failing_together():
            raise error
    with pytest.raises(PeerError, match="early"), second.failing_together():
        raise PeerError("connection closed")


LEAVES = """
import sys
import torch.distributed as dist
from gnnpipe import world
world._LISTEN_S = 0.0
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
with world.join(device="cpu", timeout_s=10) as joined:
    joined.answer(lambda: "nothing")
    if sys.argv[2] == "fail":
        raise SystemExit(3)
"""


@pytest.mark.parametrize(("end", "status"), [("succeed", 0), ("fail", 3)])
def test_a_busy_listener_does_not_abort_the_end_of_the_process(
    end: str, status: int, tmp_path: Path
) -> None:
    for attempt in range(3):
        done = subprocess.run(
            [sys.executable, "-c", LEAVES, str(tmp_path / f"store-{attempt}"), end],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (status, "")


OUTLIVES = """
import os, sys
import torch.distributed as dist
from gnnpipe import world
world.meet = lambda timeout: (dist.FileStore(sys.argv[1], 1), 0, 1)
world.environment.world_size = lambda: 2
with world.join(device="cpu", timeout_s=10):
    import torch._dynamo  # as torch.optim does
threads = os.listdir("/proc/self/task")
print(sorted(open(f"/proc/self/task/{thread}/comm").read().strip() for thread in threads))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads Linux's list of threads")
def test_no_gloo_thread_outlives_the_process_group(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUTLIVES, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "pt_gloo_runloop" not in done.stdout


class BrokenStore:
    """A store whose host has gone."""

    def __getattr__(self, name: str) -> Any:
        def broken(*_arguments: object) -> None:
            raise RuntimeError(f"{name}: the host of the store has gone")

        return broken


@pytest.mark.usefixtures("_short_waits")
def test_store_that_is_gone_does_not_hide_the_error() -> None:
    store: Any = BrokenStore()
    world = World(1, 2, device=CPU, store=store)
    with pytest.raises(KeyError, match="mine"), world.failing_together():
        raise KeyError("mine")
    with pytest.raises(PeerError, match="never sent"), world.failing_together():
        raise PeerError("rank 0 never sent boundary rows")


def test_a_gpu_that_is_not_there_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    match = r"`device` \(=cuda\) must offer a GPU to each local rank, rank 1 finds 1; start fewer"
    with pytest.raises(UserError, match=match), join(device="cuda", timeout_s=5):
        pass
