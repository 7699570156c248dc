"""Attempts of one run share a store: each must see nothing of those before it."""

import threading
import time

import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from gnnpipe.errors import PeerError
from gnnpipe.meeting import own_attempt

TIMEOUT_S = 20.0


def attempt(store: Store, delays_s: list[float]) -> list[Store]:
    """Lets a rank come after each delay; returns what each has found."""
    found: dict[int, Store] = {}

    def come(rank: int) -> None:
        time.sleep(delays_s[rank])
        found[rank] = own_attempt(store, rank, len(delays_s), timeout_s=TIMEOUT_S)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(delays_s))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(len(delays_s))]


@pytest.mark.parametrize("delays_s", [[0.0, 0.2, 0.1], [0.2, 0.0, 0.1]])
def test_an_attempt_reads_nothing_of_the_one_before(delays_s: list[float]) -> None:
    """Symptom: under torchrun a run that had lost a rank failed at every restart.

    Rank 0 came first and read the address at which rank 1 had listened before it was killed:
    torchrun of torch 2.13 gives all attempts one store. Since the first torchrun.
    """
    store = HashStore()
    for number in range(3):
        parts = attempt(store, delays_s)
        assert not any(part.check(["address of rank 1"]) for part in parts)
        parts[1].set("address of rank 1", str(number))
        assert all(part.get("address of rank 1") == str(number).encode() for part in parts)


def test_a_rank_that_died_before_it_joined_does_not_count() -> None:
    store = HashStore()
    store.set("gnnpipe/hello/1", "of a process that was killed")
    store.add("gnnpipe/attempt", 1)
    parts = attempt(store, [0.0, 0.1])
    parts[0].set("key", "value")
    assert parts[1].get("key") == b"value"


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, "rank 1 never came, waited 0.1 s"), (1, "rank 0 never came, waited 0.1 s")],
)
def test_who_does_not_come_is_named(rank: int, message: str) -> None:
    with pytest.raises(PeerError, match=message):
        own_attempt(HashStore(), rank, 2, timeout_s=0.1)
