"""What is measured in an epoch, the file it goes to, and the figures drawn from all epochs.

``metrics.jsonl`` holds one JSON object per epoch. JSON has no NaN, so NaN and infinities become
``null``; all other numbers keep their full precision.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from gnnpipe.errors import UserError

NUM_WARM_UP_EPOCHS = 5  # compilation and first allocations fall into these


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did, over all ranks."""

    epoch: int
    """Counted from 1."""
    loss: float
    """Training loss."""
    epoch_s: float
    """Wall time, without evaluation."""
    bubble_fraction: float
    """Idle share of all ranks' time: 1 minus the share that they compute."""
    comm_bytes: Mapping[str, int]
    """Payload sent, summed over ranks: boundary, carried, halo, gradient; evaluation apart."""
    peak_memory_bytes: Sequence[int]
    """``[ranks]``."""
    table_bytes: Sequence[int]
    """Size of the tables of fresh and historical rows, ``[ranks]``."""
    compute_s: Sequence[float]
    """``[ranks]``."""
    wait_s: Mapping[str, Sequence[float]]
    """For each kind of message, ``[ranks]``."""
    accuracy: Mapping[str, float | None] | None = None
    """train, val and test; ``None`` when the epoch did not end with an evaluation."""
    staleness: Sequence[float | None] | None = None
    """At evaluations, for each layer that reads neighbours ``|fresh - historical| / |fresh|``."""
    persistence: float | None = None
    """At evaluations, with ``history.correct_every``: the share of what the pipeline's gradient
    lacked that was still there at the next exact one, in [0, 1]."""
    gradient_norm: Sequence[float] | None = None
    """Of each stage's parameters, ``[stages]``, virtual stages included."""
    evaluation_s: float | None = None
    """Wall time of the evaluation."""
    time_shares: Mapping[str, float] | None = None
    """Of all ranks' time: compute; wait, for work that another rank has not done; transfer, for
    messages on their way that nothing hides. The sum is 1."""


def time_shares(
    epoch_s: Sequence[float], compute_s: Sequence[float], transfer_s: Sequence[float]
) -> dict[str, float]:
    """Books all ranks' time: shares of compute, wait and transfer.

    Args:
        epoch_s: how long each rank's epoch took, ``[ranks]``.
        compute_s: how long it did not wait.
        transfer_s: how long it waited for messages on their way.
    """
    total_s = len(epoch_s) * max(epoch_s)
    if total_s == 0:
        return {"compute": 0.0, "wait": 0.0, "transfer": 0.0}
    compute, transfer = sum(compute_s) / total_s, sum(transfer_s) / total_s
    return {"compute": compute, "wait": max(0.0, 1.0 - compute - transfer), "transfer": transfer}


class Best(NamedTuple):
    """The evaluation with the highest validation figure, the earliest of ties."""

    epoch: int
    val: float
    test: float | None


class Tally:
    """Folds epoch records into the figures of ``summary.json``."""

    def __init__(self) -> None:
        self.best: Best | None = None
        self._last: EpochRecord | None = None
        self._epoch_s: list[float] = []
        self._bubbles: list[float] = []
        self._peak_bytes: list[int] = []

    def add(self, record: EpochRecord) -> None:
        """Takes the next epoch in."""
        assert record.epoch == len(self._epoch_s) + 1, f"epoch {record.epoch} is out of turn"
        self._last = record
        self._epoch_s.append(record.epoch_s)
        self._bubbles.append(record.bubble_fraction)
        earlier = self._peak_bytes or [0] * len(record.peak_memory_bytes)
        self._peak_bytes = list(map(max, earlier, record.peak_memory_bytes))
        val = (record.accuracy or {}).get("val")
        val = math.nan if val is None else val  # Nobody to validate on: never better.
        if val > (-math.inf if self.best is None else self.best.val):
            self.best = Best(record.epoch, val, (record.accuracy or {}).get("test"))

    def figures(self) -> dict[str, Any]:
        """The derived figures; those that nothing is known about are ``None``."""
        steady_s = self._epoch_s[NUM_WARM_UP_EPOCHS:] or self._epoch_s
        bubbles = self._bubbles[NUM_WARM_UP_EPOCHS:] or self._bubbles
        comm_bytes = self._last.comm_bytes if self._last else {}
        return {
            "epochs": len(self._epoch_s),
            "best_epoch": self.best.epoch if self.best else None,
            "val_at_best": self.best.val if self.best else None,
            "test_at_best": self.best.test if self.best else None,
            "median_epoch_s": statistics.median(steady_s) if steady_s else None,
            "median_bubble_fraction": statistics.median(bubbles) if bubbles else None,
            # Of the last epoch. Evaluations do not happen every epoch.
            "comm_bytes_per_epoch": {k: n for k, n in comm_bytes.items() if k != "evaluation"},
            "peak_memory_bytes": {
                "max": max(self._peak_bytes, default=0),
                "per_rank": self._peak_bytes,
            },
        }


def metrics_line(record: EpochRecord) -> str:
    """A record as one line of ``metrics.jsonl``; what was not measured is left out."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return json_text({name: value for name, value in values.items() if value is not None}) + "\n"


def record_from(line: Mapping[str, Any]) -> EpochRecord:
    """The record that a line of ``metrics.jsonl`` came from; null figures become NaN."""
    known = {field.name for field in fields(EpochRecord)}
    values: dict[str, Any] = {
        name: math.nan if line[name] is None else line[name] for name in known & line.keys()
    }
    return EpochRecord(**values)


def json_text(value: object, *, indent: int | None = None) -> str:
    """JSON as the standard has it: NaN and infinities become ``null``."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl``: one dict per epoch.

    A last line without its line end is what a killed run was writing: it is left out.

    Raises:
        UserError: The file cannot be read, or another line is damaged.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"`path` (={path}) must be a readable file of metrics ({error.strerror}); name the"
            " metrics.jsonl of a run"
        ) from None
    records = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(
                f"`path` (={path}) must hold one JSON object per line, line {number} is damaged;"
                " delete that line"
            )
        records.append(record)
    return records


def _finite(value: Any) -> Any:  # JSON values have no narrower type
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
