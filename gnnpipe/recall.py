"""What a table remembers from epoch to epoch, where that is not simply its last values.

Of values, kept are the own rows as they were before their dropout; whoever reads them drops them
again with the mask of the reading epoch, so a historical row differs from a fresh one by what
training has changed, not by two draws of noise. The kept value may be smoothed, or extrapolated
from the last two::

    last   = momentum * last + (1 - momentum) * fresh       (a moving average, as PipeGCN smooths;
                                                             Wan et al., arXiv 2203.10428)
    read   = last + slope * (last - before)                 (linear prediction; learned in
                                                             SAT, arXiv 2308.13466)

The slope is fitted by least squares to what the epoch before would have needed,
``slope = <fresh - last, last - before> / |last - before|^2``, over all rows of the layer, and
clamped to [0, 1]: 0 is the plain history, 1 repeats the last change.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gnnpipe.kernels import prepare_show


class Keeping(NamedTuple):
    """How histories are kept; plain values from the configuration."""

    dropout: bool = True
    """Keep rows as they are handed over, after their dropout."""
    momentum: float = 0.0
    predict: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a table's own values are all that is needed."""
        return self.dropout and not self.momentum and not self.predict


class Recall:
    """The kept rows of one layer.

    Args:
        num_rows: own rows of the table.
        channels: its width.
        like: a tensor that gives dtype and device.
        keeping: how.
        period: epochs between two refreshes.
    """

    def __init__(
        self, num_rows: int, channels: int, *, like: Tensor, keeping: Keeping, period: int
    ) -> None:
        self.last = like.new_zeros((num_rows, channels))
        self.before = torch.zeros_like(self.last) if keeping.predict else None
        self.slope = 0.0
        self.is_clean = not keeping.dropout
        """Whether the rows before their dropout are kept."""
        self.is_taking = False
        """Whether the running epoch's rows are to be kept."""
        self.sums = torch.zeros(2, dtype=torch.float64)
        """``<fresh - last, last - before>`` and ``|last - before|^2`` of the epoch."""
        self._momentum = keeping.momentum
        self._period = period

    def start_epoch(self, epoch: int) -> None:
        """Epochs count from 1; the rows of every ``period``-th are kept."""
        self.is_taking = epoch % self._period == 0
        self.sums.zero_()

    def end_epoch(self) -> None:
        """Nothing is kept until the next epoch."""
        self.is_taking = False

    def take(self, rows: slice, x: Tensor) -> None:
        """Keeps fresh rows."""
        last = self.last[rows]
        if self.before is not None:
            step = last - self.before[rows]
            parts = ((x - last) * step).sum(dtype=torch.float64), step.square().sum().double()
            self.sums += torch.stack(parts).cpu()
            self.before[rows] = last
        if self._momentum:
            last.lerp_(x, 1.0 - self._momentum)
        else:
            last.copy_(x)

    def fit(self, sums: Tensor) -> None:
        """Takes the slope from :attr:`sums`, added up over all ways."""
        wanted, size = sums.tolist()
        self.slope = min(1.0, max(0.0, wanted / size)) if size else 0.0

    def rows(self) -> Tensor:
        """What the next epoch reads, before its dropout."""
        if self.before is None or not self.slope:
            return self.last
        return torch.lerp(self.before, self.last, 1.0 + self.slope)

    def warm(self, rows: Tensor) -> None:
        """Forgets everything but these rows."""
        self.last.copy_(rows)
        if self.before is not None:
            self.before.copy_(rows)
        self.slope = 0.0

    @property
    def arrays(self) -> list[Tensor]:
        """Everything that takes memory."""
        return [self.last] if self.before is None else [self.last, self.before]


class LateGradients:
    """Earlier epochs' gradients, for the readers that saw a row as history.

    A chunk's backward knows the gradients of the chunks after it. Those before it have read its
    historical rows, and their gradients come later; those of earlier epochs stand in for them,
    damped by a factor, so that paths which leave a chunk against the order, or come back to it,
    are not lost (LMC, arXiv 2302.00924, compensates subgraph sampling like this). While weights
    stand still the gradients of L layers are exact after L epochs.

    One epoch's gradient of a row says little about the next one's, since masks of dropout and the
    order of the chunks are others. With a momentum an average over epochs is kept (as PipeGCN
    smooths its features' gradients; Wan et al., arXiv 2203.10428). Its weights add up to one from
    the first epoch on (as Adam corrects its bias; Kingma and Ba, arXiv 1412.6980)::

        share = (1 - momentum) / (1 - momentum^epoch)
        late  = (1 - share) * late + share * factor * gradients

    Every row of :attr:`rows` is what its readers need at that moment, so they need no gate, and
    read each edge once: the late gradient up to the backward of its chunk, and the step's own
    from then on, while the new late one waits where the own one was::

        step         forward ... | backward of the row's chunk | ...    | end of the step
        rows         late                                      | own    | new late
        gradients    sums                                 own  | new late

    Args:
        num_rows: rows of the table's gradients.
        channels: their width.
        like: a tensor that gives dtype and device.
        factor: on these gradients, in [0, 1].
        momentum: share of the old rows in the kept ones, in [0, 1).
    """

    def __init__(
        self, num_rows: int, channels: int, *, like: Tensor, factor: float, momentum: float = 0.0
    ) -> None:
        self.rows = like.new_zeros((num_rows, channels))
        self._factor = factor
        self._momentum = momentum
        self._share = like.new_ones(1)  # A tensor, so that captured kernels read it.

    def start_epoch(self, epoch: int) -> None:
        """Epochs count from 1."""
        self._share.fill_((1.0 - self._momentum) / (1.0 - self._momentum**epoch))

    def prepare_show(self, gradients: Tensor, rows: slice) -> Callable[[], object]:
        """What makes readers see the step's own gradients of some rows.

        Args:
            gradients: those, ``[num_rows, channels]``; new late ones afterwards.
            rows: which.
        """
        own, seen = gradients[rows], self.rows[rows]
        return prepare_show(own, seen, factor=self._factor, share=self._share)

    def settle(self, gradients: Tensor, rows: slice) -> None:
        """Takes the new late gradients of rows that were shown, when the step has ended."""
        self.rows[rows] = gradients[rows]
