"""Messages between real processes: who gets what, what is counted, and whom an error names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_pool import Job, ProcessPool
from torch import Tensor

from gnnpipe.cell import Exchange
from gnnpipe.comm import HELD_TRADES, Comm, Groups, Message
from gnnpipe.errors import PeerError
from gnnpipe.mesh import Mesh
from gnnpipe.world import join, make_groups

pytestmark = pytest.mark.timeout(120)

LIKE = torch.empty(0, dtype=torch.float64)


def message(peer: int, tag: int, *, direction: str = "forward") -> Message:
    channel: Any = direction
    return Message(peer, tag, (2, 3), "boundary", channel, f"for 1F{tag}")


def rows(value: float) -> Tensor:
    return torch.full((2, 3), value, dtype=torch.float64)


def in_a_world(num_ways: int, act: Callable[[Comm], None]) -> None:
    """Gives this worker of the pool its messages, among all ranks of the job."""
    with join(device="cpu", timeout_s=30) as world:
        mesh = Mesh(world.world_size // num_ways, num_ways)
        groups = make_groups(mesh, world.device)
        act(Comm(mesh, world.rank, groups=groups, like=LIKE, timeout_s=30))


def send_and_receive() -> None:
    """Rank 0 sends three messages and gets one back; they may be taken in any order."""

    def act(comm: Comm) -> None:
        if comm.rank == 0:
            for tag in range(3):
                comm.send(rows(tag), message(1, tag))
            back = comm.receive(message(1, 7, direction="backward"))
            assert torch.equal(back.take(), rows(5))
            comm.flush()
            assert comm.sent_bytes == {"boundary": 3 * 2 * 3 * 8}
        else:
            pending = [comm.receive(message(0, tag)) for tag in range(3)]
            for tag in (2, 0, 1):
                assert torch.equal(pending[tag].take(), rows(tag))
            with comm.counted_as("evaluation"):
                comm.send(rows(5), message(0, 7, direction="backward"))
            comm.flush()
            assert comm.sent_bytes == {"evaluation": 2 * 3 * 8}
            assert comm.wait_s["boundary"] > 0

    in_a_world(1, act)


def trade_halo() -> None:
    """Two stages of two ways; each way holds rows 0-2 and mirrors the other's rows as 3-4.

    Way 0 sends its rows 0 and 2, way 1 its rows 1 and 2.
    """

    def act(comm: Comm) -> None:
        stage, way = comm.mesh.stage_rank(comm.rank), comm.mesh.way(comm.rank)
        sends = (torch.tensor([0, 2]), torch.tensor([1, 2]))
        exchanges = [Exchange(1 - way, sends[way], slice(3, 5))]
        nothing = [Exchange(1 - way, torch.tensor([], dtype=torch.int64), slice(5, 5))]
        table = torch.arange(5, dtype=torch.float64)[:, None] + 10 * way + 100 * stage
        own = table[:3].clone()
        comm.pull(table, exchanges)()
        comm.pull(table, nothing)()
        came = sends[1 - way].double()[:, None] + 10 * (1 - way) + 100 * stage
        assert torch.equal(table, torch.cat((own, came)))
        assert comm.sent_bytes == {"halo": 2 * 8}

        table[3:] = torch.tensor([[0.25], [0.5]])  # gradients of the mirrors
        comm.push(table, exchanges)
        comm.flush()
        added = torch.zeros(3, 1, dtype=torch.float64)
        added[sends[way]] = torch.tensor([[0.25], [0.5]], dtype=torch.float64)
        assert torch.equal(table[:3], own + added)
        assert comm.sent_bytes == {"halo": 2 * 2 * 8}

    in_a_world(2, act)


def agree() -> None:
    """Sums, gathered figures, numbers told and weights of all ranks."""

    def act(comm: Comm) -> None:
        total = comm.sum_over_ranks(torch.tensor([1, comm.rank]))
        assert total.tolist() == [4, 6]
        assert comm.largest_over_ranks(7 - comm.rank) == 7
        parts = comm.gather_at_first(torch.tensor([comm.rank, 9]))()
        expected = [[rank, 9] for rank in range(4)] if comm.rank == 0 else []
        assert [part.tolist() for part in parts] == expected
        if comm.rank == 1:
            comm.tell(3, [0.5, 2.0])
        elif comm.rank == 3:
            assert comm.hear(1, 2) == [0.5, 2.0]
        flat = torch.full((comm.rank + 1,), comm.rank, dtype=torch.float64)
        collected = comm.collect_flat(flat, [(0, 1), (3, 4), (2, 3)])
        lists = [[0.0], [3.0] * 4, [2.0] * 3] if comm.rank == 0 else []
        assert [part.tolist() for part in collected] == lists
        comm.flush()
        assert set(comm.sent_bytes) <= {"evaluation"}

    in_a_world(1, act)


def sum_weights() -> None:
    """Two stages of two ways: each stage sums over its own ways, counted as a ring moves it."""

    def act(comm: Comm) -> None:
        stage, way = comm.mesh.stage_rank(comm.rank), comm.mesh.way(comm.rank)
        bucket = torch.tensor([1.0 + way, 10.0 * stage, 3.0], dtype=torch.float64)
        comm.start_sum(bucket)()
        assert bucket.tolist() == [3.0, 20.0 * stage, 6.0]
        assert comm.sent_bytes == {"gradient": 3 * 8}  # 2 (W - 1) payloads over W = 2 ways

    in_a_world(2, act)


def test_messages_arrive_and_are_counted(pool: ProcessPool) -> None:
    jobs = [
        Job("test_comm:send_and_receive", 2, {}),
        Job("test_comm:trade_halo", 4, {}),
        Job("test_comm:agree", 4, {}),
        Job("test_comm:sum_weights", 4, {}),
    ]
    pool.run(jobs, timeout_s=60)


def alone(mesh: Mesh) -> Comm:
    return Comm(mesh, 0, groups=Groups(), like=LIKE, timeout_s=5)


def trade_often() -> None:
    """Way 0 sends a row to way 1 in each of ten trades, and one comes back in every third."""

    def act(comm: Comm) -> None:
        way, held = comm.rank, []
        for turn in range(10):
            table = rows(10.0 * way + turn)
            sends = way == 0 or turn % 3 == 0
            receives = way == 1 or turn % 3 == 0
            send = torch.tensor([0] if sends else [], dtype=torch.int64)
            exchange = Exchange(1 - way, send, slice(1, 2 if receives else 1))
            comm.pull(table, [exchange])()
            assert table[1, 0] == 10.0 * (1 - way if receives else way) + turn
            held.append(sum(len(trade) for trade in comm._trades))
        assert max(held) <= HELD_TRADES
        comm.flush()
        assert not comm._trades

    in_a_world(2, act)


def test_rows_that_were_taken_are_not_held(pool: ProcessPool) -> None:
    pool.run([Job("test_comm:trade_often", 2, {})], timeout_s=60)


def test_one_process_agrees_with_itself() -> None:
    comm = alone(Mesh(1, 1))
    values = torch.tensor([3, 4])
    assert comm.sum_over_ranks(values) is values
    assert comm.largest_over_ranks(3) == 3
    assert comm.gather_at_first(values)() == [values]
    assert comm.collect_flat(values, [(0, 2)]) == [values]
    assert comm.sent_bytes == {}


class BrokenWork:
    """What an operation turns out to be when the other end has gone."""

    def wait(self, _timeout: object) -> None:
        raise RuntimeError("Connection closed by peer")

    def is_completed(self) -> bool:
        return False


def broken_work(*_arguments: object, **_options: object) -> BrokenWork:
    return BrokenWork()


def broken_post(*_arguments: object, **_options: object) -> None:
    raise RuntimeError("Connection closed by peer")


def send_and_flush(comm: Comm) -> None:
    comm.send(rows(1), message(1, 2))
    comm.flush()


CASES: dict[str, Callable[[Comm], object]] = {
    "rank 1 never sent boundary rows for 1F2": lambda c: c.receive(message(1, 2)).take(),
    "rank 1 never took boundary rows for 1F2": send_and_flush,
    "rank 1 never told a few numbers": lambda c: c.hear(1, 2),
    "rank 1 never took a few numbers": lambda c: c.tell(1, [1.0]),
    "some rank never reached the sum over all ranks": lambda c: c.sum_over_ranks(rows(1)),
    "some rank never reached the maximum over all ranks": lambda c: c.largest_over_ranks(1),
    "some rank never reached the end of the epoch": lambda c: c.gather_at_first(rows(1))(),
    r"some way of this stage never reached a sum \(gradient\)": lambda c: c.start_sum(rows(1))(),
    "another way of this stage never traded its halo": lambda c: c.pull(
        rows(1), [Exchange(1, torch.tensor([0]), slice(1, 2))]
    )(),
}


@pytest.mark.parametrize("broken", [broken_work, broken_post], ids=["waiting", "posting"])
@pytest.mark.parametrize("complaint", CASES)
def test_error_names_the_peer_and_the_action(
    complaint: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("isend", "irecv", "all_reduce", "gather"):
        monkeypatch.setattr(dist, name, broken)
    monkeypatch.setattr(dist, "P2POp", lambda *_arguments, **_options: None)
    monkeypatch.setattr(
        dist, "batch_isend_irecv", lambda operations: [broken() for _ in operations]
    )
    comm = alone(Mesh(1, 2))
    comm.during("0F4")
    rest = r", waited \d\.\d s \(limit 5 s\) in 0F4: Connection closed by peer$"
    with pytest.raises(PeerError, match=f"^{complaint}{rest}"):
        CASES[complaint](comm)


def test_pool_says_which_job_failed(tmp_path: Path) -> None:
    with ProcessPool(2, tmp_path) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no attribute 'no_such_job'"):
                pool.run([Job("process_pool:no_such_job", 2, {})], timeout_s=60)
