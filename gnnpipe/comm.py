"""Every message of a run: who sends what to whom, counted by kind, waited for with a limit."""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gnnpipe.cell import Exchange
from gnnpipe.counter import stream_key
from gnnpipe.errors import PeerError
from gnnpipe.mesh import Mesh
from gnnpipe.messages import KINDS, Format, Formats, Kind, Message, buffer_for, pack, unpack
from gnnpipe.recorder import MESSAGE_KINDS, SEND, WAIT, Recorder

__all__ = ["KINDS", "Comm", "Groups", "Kind", "Message", "Pending"]

COLLECTIVE = -1
"""Stands for all ways of a stage where a record names a peer."""

HELD_TRADES = 2
"""Trades between ways whose sent rows are held: gloo tells of a send's end only who waits."""

Leaving = tuple[dist.Work, Kind, str, Tensor]
"""A send: what to wait for, its kind, whom to blame, and the rows on their way."""

_NO_KEY = -1
_HALO_TAG = 1 << 30
_WEIGHTS_TAG = _HALO_TAG + 1
_NUMBERS_TAG = _HALO_TAG + 2
_SUM_TAG = _HALO_TAG + 8


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
        formats: how each kind of message travels.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        *,
        groups: Groups,
        like: Tensor,
        timeout_s: float,
        formats: Formats | None = None,
    ) -> None:
        self.mesh = mesh
        self.rank = rank
        self.sent_bytes: Counter[str] = Counter()
        self.wait_s: defaultdict[str, float] = defaultdict(float)
        self.recorder = Recorder()
        self.formats = formats or Formats()
        self._groups = groups
        self._like = like
        self._timeout = timedelta(seconds=timeout_s)
        self._outgoing: deque[Leaving] = deque()
        self._trades: deque[deque[Leaving]] = deque()
        self._counted_as: Kind | None = None
        self._action = ""
        self._keys: tuple[int, ...] = ()
        self._num_rounded = 0

    @contextmanager
    def counted_as(self, kind: Kind) -> Iterator[None]:
        """Books everything sent meanwhile under one kind."""
        self._counted_as = kind
        yield
        self._counted_as = None

    def during(self, action: str, *identity: int) -> None:
        """Names the action that the next messages belong to.

        Args:
            action: for errors.
            *identity: what tells it from all other actions of the run; seeds random rounding.
        """
        self._action = action
        self._keys = identity
        self._num_rounded = 0

    @property
    def action(self) -> str:
        """What :meth:`during` named last."""
        return self._action

    def send(self, tensor: Tensor, message: Message) -> None:
        """This rank -> ``message.peer``; returns at once, :meth:`flush` waits."""
        assert tensor.shape == message.shape, (tensor.shape, message)
        start_s = time.perf_counter()
        payload = self._pack(tensor, message.kind)
        self._count(payload, message.kind)
        group = getattr(self._groups, message.channel)
        kind, peer, tag = message.kind, message.peer, message.tag
        complaint = message.complaint("took")
        work = self._post(complaint, lambda: dist.isend(payload, peer, group=group, tag=tag))
        if kind != "evaluation":
            self.recorder.send(kind, peer, tag, num_bytes=payload.nbytes, start_s=start_s)
        self._outgoing.append((work, kind, complaint, payload))
        while self._outgoing and self._outgoing[0][0].is_completed():  # gloo's never is
            self._outgoing.popleft()

    def flush(self) -> None:
        """Waits until every send has left."""
        for trade in (self._outgoing, *self._trades):
            self._wait_for_sends(trade)
            trade.clear()
        self._trades.clear()

    def receive(self, message: Message) -> "Pending":
        """``message.peer`` -> this rank; returns at once."""
        tensor = self._like.new_empty(message.shape)
        form = self._format(message.kind)
        payload = buffer_for(tensor, form)
        group = getattr(self._groups, message.channel)
        work = self._post(
            message.complaint("sent"),
            lambda: dist.irecv(payload, message.peer, group=group, tag=message.tag),
        )
        return Pending(self, work, message, tensor, payload, form)

    def pull(self, table: Tensor, exchanges: Sequence[Exchange]) -> Callable[[], None]:
        """Own boundary rows -> each way that mirrors them; their rows -> own mirror rows.

        Returns at once with a function that waits for the rows.
        """
        if self.mesh.num_ways == 1:
            return nothing
        sends = [(exchange.peer, table[exchange.send]) for exchange in exchanges]
        receives = [(exchange.peer, table[exchange.receive]) for exchange in exchanges]
        return self._swap(sends, receives)

    def push(self, table: Tensor, exchanges: Sequence[Exchange]) -> None:
        """Mirror rows' gradients -> the ways that own them, who add them way by way."""
        # A copy: the rows may change before they have left.
        sends = [(exchange.peer, table[exchange.receive].clone()) for exchange in exchanges]
        receives = [
            (exchange.peer, table.new_empty((exchange.send.numel(), table.shape[1])))
            for exchange in exchanges
        ]
        self._swap(sends, receives)()
        for exchange, (_, rows) in zip(exchanges, receives, strict=True):
            table.index_add_(0, exchange.send, rows)

    def add_up(self, numbers: Tensor) -> Tensor:
        """Every way of this stage -> every other: the sum of a few numbers, in place."""
        self.start_add_up(numbers)()
        return numbers

    def start_add_up(self, numbers: Tensor) -> Callable[[], None]:
        """The same; returns at once with a function that waits for the sum."""
        return self.start_sum(numbers, "halo") if self.mesh.num_ways > 1 else nothing

    def start_sum(self, bucket: Tensor, kind: Kind = "gradient") -> Callable[[], None]:
        """Every way of this stage -> every other: the sum over ways, in place.

        Returns at once with a function that waits for the sum. Counted as a ring moves it:
        ``2 (W - 1)`` times the payload over all ways.
        """
        ways, way = self.mesh.num_ways, self.mesh.way(self.rank)
        total, start_s = 2 * (ways - 1) * bucket.nbytes, time.perf_counter()
        num_bytes = total * (way + 1) // ways - total * way // ways
        self.sent_bytes[self._counted_as or kind] += num_bytes
        key = self._number(SEND, kind, COLLECTIVE)
        complaint = f"some way of this stage never reached a sum ({kind})"
        work = self._post(
            complaint, lambda: dist.all_reduce(bucket, group=self._groups.ways, async_op=True)
        )
        if self._counted_as is None:
            self.recorder.send(kind, COLLECTIVE, key, num_bytes=num_bytes, start_s=start_s)
        return lambda: self._wait_for(work, kind, complaint, peer=COLLECTIVE, key=key)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Every rank -> every other: the elementwise sum of small CPU tensors."""
        self._reduce(values, dist.ReduceOp.SUM, "the sum over all ranks")
        return values

    def largest_over_ranks(self, value: int) -> int:
        """Every rank -> every other: the largest of a number each."""
        largest = torch.tensor(value)
        self._reduce(largest, dist.ReduceOp.MAX, "the maximum over all ranks")
        return int(largest)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType, what: str) -> None:
        if self.mesh.world_size > 1:
            complaint = f"some rank never reached {what}"
            self._start(complaint, lambda: dist.all_reduce(values, operation, async_op=True))()

    def gather_at_first(self, values: Tensor) -> Callable[[], list[Tensor]]:
        """Every rank -> rank 0: small CPU tensors of one shape.

        Returns at once with a function that waits; on ranks other than 0 it gives an empty list
        as soon as their part has left.
        """
        if self.mesh.world_size == 1:
            return lambda: [values]
        parts = [torch.empty_like(values) for _ in range(self.mesh.world_size)]
        arrive = self._start(
            "some rank never reached the end of the epoch",
            lambda: dist.gather(values, parts if self.rank == 0 else None, async_op=True),
        )
        kept = [values]  # Until it has left.

        def wait() -> list[Tensor]:
            arrive()
            kept.clear()
            return parts if self.rank == 0 else []

        return wait

    def tell(self, peer: int, numbers: Sequence[float]) -> None:
        """This rank -> ``peer``: a few numbers, received by :meth:`hear`."""
        values = torch.tensor(numbers, dtype=torch.float64)
        complaint = f"rank {peer} never took a few numbers"
        self._start(complaint, lambda: dist.isend(values, peer, tag=_NUMBERS_TAG))()

    def hear(self, peer: int, count: int) -> list[float]:
        """``peer`` -> this rank: as many numbers as it tells."""
        values = torch.empty(count, dtype=torch.float64)
        complaint = f"rank {peer} never told a few numbers"
        self._start(complaint, lambda: dist.irecv(values, peer, tag=_NUMBERS_TAG))()
        numbers: list[float] = values.tolist()
        return numbers

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

    def trade(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        kind: Kind,
    ) -> Callable[[], None]:
        """Payloads -> other ways of this stage, theirs -> here; empty ones do not travel.

        Args:
            sends: way and payload (see ``messages.pack``).
            receives: way and where its rows go, ``[num_rows, F]`` each.
            kind: what they are and count as.

        Returns:
            Waits until all rows have come.
        """
        start_s, form = time.perf_counter(), self._format(kind)
        coming = [
            (self._way_rank(way), target, buffer_for(target, form))
            for way, target in receives
            if target.numel()
        ]
        leaving = [(self._way_rank(way), payload) for way, payload in sends if payload.numel()]
        operations = [self._operation(dist.irecv, peer, rows, kind) for peer, _, rows in coming]
        operations += [self._operation(dist.isend, peer, rows, kind) for peer, rows in leaving]
        complaint = f"another way of this stage never traded its {kind}"
        with self._blaming(complaint):
            works = dist.batch_isend_irecv(operations) if operations else []
        for peer, payload in leaving:
            self._record_send(kind, peer, payload, start_s)
        keys = [(peer, self._number(WAIT, kind, peer)) for peer, _, _ in coming]
        if len(works) == len(operations):  # gloo; NCCL has one work for all, quick to wait for.
            gone = zip(works[len(coming) :], leaving, strict=True)
            self._trades.append(deque((work, kind, complaint, rows) for work, (_, rows) in gone))
            works = works[: len(coming)]

        def wait() -> None:
            for work, (peer, key) in zip(works, keys, strict=False):
                self._wait_for(work, kind, complaint, peer=peer, key=key)
            for _, target, payload in coming:
                unpack(payload, form, target=target)
            operations.clear()  # Until now they kept the sent rows alive.
            # All ways trade in one order, and trade on: what went two trades ago has been taken.
            while len(self._trades) > HELD_TRADES:
                self._wait_for_sends(self._trades.popleft())

        return wait

    def _wait_for_sends(self, leaving: Iterable[Leaving]) -> None:
        for work, kind, complaint, _ in leaving:
            self._wait_for(work, kind, complaint)

    def _swap(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        """Trades halo rows."""
        payloads = [(way, self._pack(rows, "halo")) for way, rows in sends]
        return self.trade(payloads, receives, "halo")

    def _operation(
        self, operation: Callable[..., Any], peer: int, payload: Tensor, kind: Kind
    ) -> dist.P2POp:
        tag = _HALO_TAG if kind == "halo" else _SUM_TAG
        return dist.P2POp(operation, payload, peer, group=self._groups.halo, tag=tag)

    def _way_rank(self, way: int) -> int:
        return self.mesh.rank_of(self.mesh.stage_rank(self.rank), way)

    def _format(self, kind: Kind) -> Format:
        return self.formats.of(self._counted_as or kind)

    def _pack(self, rows: Tensor, kind: Kind) -> Tensor:
        form = self._format(kind)
        if form != "int8":
            return pack(rows, form, key=0)
        self._num_rounded += 1
        key = stream_key(self.formats.seed, *self._keys, self.mesh.way(self.rank))
        return pack(rows, form, key=stream_key(key, self._num_rounded))

    def _record_send(self, kind: Kind, peer: int, payload: Tensor, start_s: float) -> None:
        self._count(payload, kind)
        if self._counted_as is None:
            key = self._number(SEND, kind, peer)
            self.recorder.send(kind, peer, key, num_bytes=payload.nbytes, start_s=start_s)

    def _number(self, what: int, kind: Kind, peer: int) -> int:
        return self.recorder.number(what, kind, peer) if self._counted_as is None else _NO_KEY

    def _count(self, tensor: Tensor, kind: Kind) -> None:
        self.sent_bytes[self._counted_as or kind] += tensor.numel() * tensor.element_size()

    def _start(
        self, complaint: str, operation: Callable[[], dist.Work | None]
    ) -> Callable[[], None]:
        """Posts what ranks agree with; returns a function that waits for it."""
        work = self._post(complaint, operation)
        return lambda: self._wait_for(work, "ranks", complaint)

    def _wait_for(
        self,
        work: dist.Work,
        kind: str,
        complaint: str,
        *,
        peer: int = COLLECTIVE,
        key: int = _NO_KEY,
    ) -> None:
        start_s = time.perf_counter()
        with self._blaming(complaint):
            work.wait(self._timeout)
        end_s = time.perf_counter()
        self.wait_s[kind] += end_s - start_s
        if key != _NO_KEY and kind in MESSAGE_KINDS:
            self.recorder.wait(kind, peer, key, start_s=start_s, end_s=end_s)

    def _post(self, complaint: str, operation: Callable[[], dist.Work | None]) -> dist.Work:
        """Starts an operation: that fails as waiting does where the other rank has gone."""
        with self._blaming(complaint):
            work = operation()
        assert work is not None
        return work

    @contextmanager
    def _blaming(self, complaint: str) -> Iterator[None]:
        start_s = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise PeerError(
                f"{complaint}, waited {time.perf_counter() - start_s:.1f} s "
                f"(limit {self._timeout.total_seconds():g} s) in {self._action}: {error}"
            ) from error


class Pending(NamedTuple):
    """A receive on its way."""

    comm: Comm
    work: dist.Work
    message: Message
    tensor: Tensor
    payload: Tensor
    form: Format

    def take(self) -> Tensor:
        """Waits for the tensor."""
        message = self.message
        key = {"peer": message.peer, "key": message.tag}
        self.comm._wait_for(self.work, message.kind, message.complaint("sent"), **key)
        unpack(self.payload, self.form, target=self.tensor)
        return self.tensor


def nothing() -> None:
    """Waits for nothing."""
