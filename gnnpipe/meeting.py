"""How the ranks of one attempt find each other: through a store that is theirs alone.

torchrun keeps one store for all attempts of a run and says nothing that tells them apart: the
count of restarts differs between hosts. A rank that comes early would read where its peers were
in the attempt before, and call at a door that nobody opens. So rank 0 counts attempts, and tells
the number to those who ask now::

    rank 1   hello/1 = nonce                   welcome/1 = "2 nonce": joined/2/1
    rank 0   attempt += 1 ... answers every hello that is new, until all have joined
"""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from gnnpipe import environment
from gnnpipe.errors import PeerError

_POLL_S = 0.02


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """Finds the store through the launcher's file, or as torchrun has it.

    Returns:
        The store, this rank, and the number of ranks.
    """
    _stay_on_loopback()
    path = os.environ.get(environment.RENDEZVOUS_VARIABLE)
    if path is None:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        timeout_s = timeout.total_seconds()
        return own_attempt(store, rank, world_size, timeout_s=timeout_s), rank, world_size
    rank, world_size = environment.rank(), environment.world_size()
    store = FileStore(path, world_size)
    store.set_timeout(timeout)
    return store, rank, world_size


def own_attempt(store: Store, rank: int, world_size: int, *, timeout_s: float) -> Store:
    """The part of a store that no earlier attempt has written to; all ranks call it.

    Args:
        store: what all ranks can read and write.
        rank: this process.
        world_size: number of ranks.
        timeout_s: longest wait for another rank.

    Raises:
        PeerError: a rank did not come.
    """
    if rank == 0:
        attempt = str(store.add("gnnpipe/attempt", 1))
        _welcome(store, attempt, world_size, timeout_s)
    else:
        attempt = _ask(store, rank, timeout_s)
    return PrefixStore(f"gnnpipe/attempt-{attempt}", store)


def _welcome(store: Store, attempt: str, world_size: int, timeout_s: float) -> None:
    """Rank 0 -> all who say hello: the number of the attempt, until everybody has it."""
    missing, answered = list(range(1, world_size)), dict.fromkeys(range(world_size), "")

    def have_joined() -> bool:
        for rank in missing.copy():
            if store.check([f"gnnpipe/joined/{attempt}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"gnnpipe/hello/{rank}"]):
                # Perhaps of an attempt that is over: the rank of this one will say another.
                nonce = store.get(f"gnnpipe/hello/{rank}").decode()
                if nonce != answered[rank]:
                    store.set(f"gnnpipe/welcome/{rank}", f"{attempt} {nonce}")
                    answered[rank] = nonce
        return not missing

    _wait(have_joined, timeout_s, lambda: f"rank {missing[0]} never came")


def _ask(store: Store, rank: int, timeout_s: float) -> str:
    """This rank -> rank 0: hello; rank 0 -> this rank: the number of the attempt."""
    nonce = f"{os.getpid()}-{time.time_ns()}"
    key, words = f"gnnpipe/welcome/{rank}", ["", ""]
    store.set(f"gnnpipe/hello/{rank}", nonce)

    def is_answered() -> bool:
        if store.check([key]):
            words[:] = store.get(key).decode().split()
        return words[1] == nonce

    _wait(is_answered, timeout_s, lambda: "rank 0 never came")
    store.set(f"gnnpipe/joined/{words[0]}/{rank}", "")
    return words[0]


def _wait(is_done: Callable[[], bool], timeout_s: float, complaint: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > deadline_s:
            raise PeerError(f"{complaint()}, waited {timeout_s:g} s")
        time.sleep(_POLL_S)


def _stay_on_loopback() -> None:
    """Keeps gloo off the network when all ranks are on this host."""
    is_one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if is_one_host and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
