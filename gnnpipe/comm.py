"""Every message of a run: who sends what to whom, counted by kind, waited for with a limit."""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gnnpipe.cell import Exchange
from gnnpipe.errors import PeerError
from gnnpipe.mesh import Mesh

Kind = Literal["boundary", "carried", "halo", "gradient", "evaluation"]
KINDS: tuple[Kind, ...] = ("boundary", "carried", "halo", "gradient", "evaluation")

RECEIVE_AHEAD = 6
"""Receives posted before their messages are needed."""

_HALO_TAG = 1 << 30
_WEIGHTS_TAG = _HALO_TAG + 1


class Message(NamedTuple):
    """One tensor between two ranks, known to both ends beforehand."""

    peer: int
    """Rank at the other end."""
    tag: int
    """Distinguishes messages between the same two ranks."""
    shape: tuple[int, ...]
    kind: Kind
    channel: Literal["forward", "backward"]
    """Which communicator carries it."""
    name: str
    """What an error calls it, such as ``2B17``."""


class Groups(NamedTuple):
    """Process groups by purpose; None is the default group.

    NCCL runs the operations of one communicator in order, so the two directions of the
    pipeline and the halo need communicators of their own lest they wait for each other. gloo
    tells messages apart by their tags.
    """

    forward: dist.ProcessGroup | None = None
    backward: dist.ProcessGroup | None = None
    halo: dist.ProcessGroup | None = None
    ways: dist.ProcessGroup | None = None


class Comm:
    """The messages of one rank.

    Args:
        mesh: all ranks.
        rank: this one.
        groups: process groups by purpose.
        like: a tensor that gives dtype and device of activations and gradients.
        timeout_s: longest wait for one message, seconds.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        *,
        groups: Groups,
        like: Tensor,
        timeout_s: float,
    ) -> None:
        self.mesh = mesh
        self.rank = rank
        self.sent_bytes: Counter[str] = Counter()
        self.wait_s: defaultdict[str, float] = defaultdict(float)
        self._groups = groups
        self._like = like
        self._timeout = timedelta(seconds=timeout_s)
        self._outgoing: deque[tuple[dist.Work, Message, Tensor]] = deque()
        self._counted_as: Kind | None = None
        self._action = ""

    @contextmanager
    def counted_as(self, kind: Kind) -> Iterator[None]:
        """Books everything sent meanwhile under one kind."""
        self._counted_as = kind
        yield
        self._counted_as = None

    def during(self, action: str) -> None:
        """Names the action that the next waits belong to."""
        self._action = action

    def send(self, tensor: Tensor, message: Message) -> None:
        """This rank -> ``message.peer``; returns at once, :meth:`flush` waits."""
        assert tensor.shape == message.shape, (tensor.shape, message)
        tensor = tensor.contiguous()
        self._count(tensor, message.kind)
        group = getattr(self._groups, message.channel)
        work = dist.isend(tensor, message.peer, group=group, tag=message.tag)
        assert work is not None
        self._outgoing.append((work, message, tensor))
        while self._outgoing and self._outgoing[0][0].is_completed():
            self._outgoing.popleft()

    def flush(self) -> None:
        """Waits until every send has left."""
        while self._outgoing:
            work, message, _ = self._outgoing.popleft()
            self._wait(work, message, "took")

    def receive(self, message: Message) -> "Pending":
        """``message.peer`` -> this rank; returns at once."""
        tensor = self._like.new_empty(message.shape)
        group = getattr(self._groups, message.channel)
        work = dist.irecv(tensor, message.peer, group=group, tag=message.tag)
        assert work is not None
        return Pending(self, work, message, tensor)

    def inbox(self, messages: Sequence[Message]) -> "Inbox":
        """Receives a known sequence of messages, some always posted ahead of need."""
        return Inbox(self, messages)

    def pull(self, table: Tensor, exchanges: Sequence[Exchange]) -> Callable[[], None]:
        """Own boundary rows -> each way that mirrors them; their rows -> own mirror rows.

        Returns at once with a function that waits for the rows.
        """
        sends = [(exchange.peer, table[exchange.send]) for exchange in exchanges]
        receives = [(exchange.peer, table[exchange.receive]) for exchange in exchanges]
        return self._swap(sends, receives)

    def push(self, table: Tensor, exchanges: Sequence[Exchange]) -> None:
        """Mirror rows' gradients -> the ways that own them, who add them way by way."""
        sends = [(exchange.peer, table[exchange.receive]) for exchange in exchanges]
        receives = [
            (exchange.peer, table.new_empty((exchange.send.numel(), table.shape[1])))
            for exchange in exchanges
        ]
        self._swap(sends, receives)()
        for exchange, (_, rows) in zip(exchanges, receives, strict=True):
            table.index_add_(0, exchange.send, rows)

    def reduce_over_ways(self, tensors: Sequence[Tensor]) -> None:
        """Every way of this stage -> every other: sums in place, in one bucket.

        Counted as a ring moves it: ``2 (W - 1)`` times the payload over all ways.
        """
        ways = self.mesh.num_ways
        if ways == 1 or not tensors:
            return
        bucket = torch.cat([tensor.flatten() for tensor in tensors])
        total, way = 2 * (ways - 1) * bucket.nbytes, self.mesh.way(self.rank)
        self.sent_bytes["gradient"] += total * (way + 1) // ways - total * way // ways
        work = dist.all_reduce(bucket, group=self._groups.ways, async_op=True)
        assert work is not None
        self._wait_for(work, "gradient", "some way of this stage never reached the weight sum")
        parts = torch.split(bucket, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Every rank -> every other: the elementwise sum of small CPU tensors."""
        if self.mesh.world_size > 1:
            work = dist.all_reduce(values, async_op=True)
            assert work is not None
            self._wait_collective(work, "the sum over all ranks")
        return values

    def gather_at_first(self, values: Tensor) -> list[Tensor]:
        """Every rank -> rank 0: small CPU tensors of one shape; empty elsewhere."""
        if self.mesh.world_size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.mesh.world_size)]
        work = dist.gather(values, parts if self.rank == 0 else None, async_op=True)
        assert work is not None
        self._wait_collective(work, "the end of the epoch")
        return parts if self.rank == 0 else []

    def collect_flat(self, flat: Tensor | None, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """One flat tensor of each listed rank -> rank 0.

        Args:
            flat: this rank's tensor, if it is listed.
            sizes: (rank, length) of each tensor, in order.
        """
        result = []
        for peer, size in sizes:
            other = 0 if self.rank else peer
            message = Message(other, _WEIGHTS_TAG, (size,), "evaluation", "backward", "of weights")
            if self.rank == peer and flat is not None and peer != 0:
                self.send(flat, message)
                self.flush()
            elif self.rank == 0:
                part = flat if peer == 0 else self.receive(message).take()
                assert part is not None
                result.append(part)
        return result

    def _swap(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        """Trades rows with other ways of this stage; empty ones do not travel."""
        operations = [self._halo(dist.irecv, *part) for part in receives if part[1].numel()]
        for way, rows in sends:
            if rows.numel():
                self._count(rows, "halo")
                operations.append(self._halo(dist.isend, way, rows))
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work in works:
                self._wait_for(work, "halo", "another way of this stage never traded its halo")
            operations.clear()  # Until now they kept the sent rows alive.

        return wait

    def _halo(self, operation: Callable[..., Any], way: int, rows: Tensor) -> dist.P2POp:
        peer = self.mesh.rank_of(self.mesh.stage_rank(self.rank), way)
        return dist.P2POp(operation, rows, peer, group=self._groups.halo, tag=_HALO_TAG)

    def _count(self, tensor: Tensor, kind: Kind) -> None:
        self.sent_bytes[self._counted_as or kind] += tensor.numel() * tensor.element_size()

    def _wait(self, work: dist.Work, message: Message, verb: str) -> None:
        what = f"{message.kind} rows {message.name}"
        self._wait_for(work, message.kind, f"rank {message.peer} never {verb} {what}")

    def _wait_collective(self, work: dist.Work, what: str) -> None:
        self._wait_for(work, "ranks", f"some rank never reached {what}")

    def _wait_for(self, work: dist.Work, kind: str, complaint: str) -> None:
        start = time.perf_counter()
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise PeerError(
                f"{complaint}, waited {time.perf_counter() - start:.1f} s "
                f"(limit {self._timeout.total_seconds():g} s) in {self._action}: {error}"
            ) from error
        self.wait_s[kind] += time.perf_counter() - start


class Pending(NamedTuple):
    """A receive on its way."""

    comm: Comm
    work: dist.Work
    message: Message
    tensor: Tensor

    def take(self) -> Tensor:
        """Waits for the tensor."""
        self.comm._wait(self.work, self.message, "sent")
        return self.tensor


class Inbox:
    """A known sequence of receives; :meth:`take` hands them out in that order."""

    def __init__(self, comm: Comm, messages: Sequence[Message]) -> None:
        self._comm = comm
        self._coming = iter(messages)
        self._posted: deque[Pending] = deque()
        for _ in range(RECEIVE_AHEAD):
            self._post()

    def take(self) -> Tensor:
        """The next tensor of the sequence."""
        pending = self._posted.popleft()
        tensor = pending.take()
        self._post()
        return tensor

    def _post(self) -> None:
        message = next(self._coming, None)
        if message is not None:
            self._posted.append(self._comm.receive(message))
