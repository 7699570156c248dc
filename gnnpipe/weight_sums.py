"""Sums weight gradients over the ways of a stage, layer by layer, while other work goes on.

A layer's bucket starts to travel when its last backward of the step has run, so the layers
below it, and other stages of the rank, hide it. One bucket per layer: what is added to what
then depends on the layer only, never on how layers are cut into stages.

Compressed gradients travel twice: every way sends each other way its share, every way sums its
own share in full precision and sends the sum to all. What rounding has lost is added to the
next step's gradient (error feedback), so it is late but not gone::

    way 0   [own | to 1]   ->   [sum 0]  -> to way 1
    way 1   [to 0 | own]   ->   [sum 1]  -> to way 0
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gnnpipe.comm import Comm
from gnnpipe.counter import stream_key
from gnnpipe.messages import pack, unpack

ROW_LENGTH = 64
"""Numbers under one scale."""


class WeightSums:
    """The sums of one rank.

    Args:
        comm: its messages.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._open: list[Callable[[], None]] = []
        self._residuals: dict[int, Tensor] = {}

    def start(self, layer_index: int, gradients: Sequence[Tensor], *, step: int) -> None:
        """Starts to sum one layer's gradients over the ways, in place.

        Args:
            layer_index: place of the layer in the model.
            gradients: complete on this way; not to be touched before :meth:`finish`.
            step: optimizer steps so far, and one; seeds random rounding.
        """
        if not gradients:
            return
        bucket = torch.cat([gradient.flatten() for gradient in gradients])
        if self._comm.formats.gradient == "fp32":
            wait = self._comm.start_sum(bucket)
            self._open.append(lambda: _scatter(bucket, gradients, wait))
        else:
            share = self._start_shares(layer_index, bucket, step)
            self._open.append(lambda: share(gradients))

    def finish(self) -> None:
        """Waits until all gradients are the sums."""
        for finish in self._open:
            finish()
        self._open.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """What rounding still owes, named by layer and way; part of a checkpoint."""
        return {self.name(index): owed for index, owed in sorted(self._residuals.items())}

    def load_state_dict(self, state: Mapping[str, Tensor], layers: Iterable[int]) -> None:
        """Takes what :meth:`state_dict` gave, as far as it is of these layers and this way.

        With another number of ways nothing is: the next steps then start without a debt.
        """
        named = {index: self.name(index) for index in layers}
        self._residuals = {i: state[name].clone() for i, name in named.items() if name in state}

    def name(self, layer_index: int) -> str:
        """What a checkpoint calls this way's debt of one layer."""
        return f"rounding.{layer_index}.{self._comm.mesh.place(self._comm.rank)}"

    def _start_shares(
        self, layer_index: int, bucket: Tensor, step: int
    ) -> Callable[[Sequence[Tensor]], None]:
        comm, ways, own = (
            self._comm,
            self._comm.mesh.num_ways,
            self._comm.mesh.way(self._comm.rank),
        )
        peers = [way for way in range(ways) if way != own]
        num_rows = -(-bucket.numel() // (ways * ROW_LENGTH))  # of a share
        flat = bucket.new_zeros(ways * num_rows * ROW_LENGTH)
        flat[: bucket.numel()] = bucket
        shares = flat.view(ways, num_rows, ROW_LENGTH)
        if layer_index in self._residuals:
            shares += self._residuals[layer_index]
        residual = torch.zeros_like(shares)
        payloads = []
        for peer in peers:
            payload, value = self._round(shares[peer], (step, layer_index, own, peer))
            payloads.append((peer, payload))
            residual[peer] = shares[peer] - value
        parts = {way: torch.empty_like(shares[0]) for way in peers} | {own: shares[own]}
        wait = comm.trade(payloads, [(peer, parts[peer]) for peer in peers], "gradient")

        def finish(gradients: Sequence[Tensor]) -> None:
            wait()
            total = torch.zeros_like(shares[0])
            for way in range(ways):
                total += parts[way]
            payload, value = self._round(total, (step, layer_index, own, own))
            residual[own] = total - value
            self._residuals[layer_index] = residual
            result = torch.empty_like(shares)
            result[own] = value
            targets = [(peer, result[peer]) for peer in peers]
            comm.trade([(peer, payload) for peer in peers], targets, "gradient")()
            _scatter(result.flatten()[: bucket.numel()], gradients)

        return finish

    def _round(self, rows: Tensor, place: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The payload of rows, and the rows that its receiver will see."""
        form, value = self._comm.formats.gradient, torch.empty_like(rows)
        payload = pack(rows, form, key=stream_key(self._comm.formats.seed, *place))
        unpack(payload, form, target=value)
        return payload, value


def _scatter(
    bucket: Tensor, gradients: Sequence[Tensor], wait: Callable[[], None] | None = None
) -> None:
    """Copies a bucket back into the tensors that it was made of."""
    if wait is not None:
        wait()
    parts = torch.split(bucket, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
