"""The epoch loop: train, now and then evaluate, log, keep checkpoints and the best weights."""

import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gnnpipe import checkpoint
from gnnpipe.comm import KINDS
from gnnpipe.config import Config, to_dict, to_yaml
from gnnpipe.errors import Stopped, UserError
from gnnpipe.metrics import EpochRecord, time_shares
from gnnpipe.resume import Start
from gnnpipe.run_directory import TIMELINE_FILE, TRACE_FILE, WEIGHTS_DIR, flatten
from gnnpipe.runs import WAIT_KINDS, Run
from gnnpipe.saving import Saver
from gnnpipe.shards import Shards
from gnnpipe.stopping import StopRequest
from gnnpipe.telemetry import Done, RunLog
from gnnpipe.weights import save_weights

LIBRARIES = ("gnnpipe", "torch", "numpy", "numba", "pymetis")

EpochEnd = Callable[[EpochRecord], object]
"""Gets an epoch's figures; True ends the training with this epoch."""


class Outcome(NamedTuple):
    """How the epoch loop ended."""

    summary: dict[str, Any]
    """On rank 0, of a finished run."""
    stopped: Stopped | None = None
    """Why it ended early."""


def finished(outcome: Outcome) -> dict[str, Any]:
    """The summary of a run that was not stopped."""
    if outcome.stopped is not None:
        raise outcome.stopped
    return outcome.summary


class LoopPlan(NamedTuple):
    """What the epoch loop has to know besides the run itself."""

    config: Config
    start: Start
    threads: int
    """CPU threads of each rank."""
    facts: Mapping[str, Any]
    """What a checkpoint must have in common with the run."""
    on_epoch_end: Sequence[EpochEnd] = ()
    """Called on rank 0 with every epoch's figures."""


def fit_epochs(run: Run, plan: LoopPlan, request: StopRequest) -> Outcome:
    """The epoch loop: one optimizer step, then now and then an evaluation, every epoch logged.

    Args:
        run: this rank's part of the run.
        plan: where to start and what to do.
        request: tells when somebody wants the run to stop.
    """
    config, start = plan.config, plan.start
    every, epochs = config.checkpoint.every, config.training.epochs
    best = _restore(run, start)
    saver = Saver(
        run,
        config.run.dir,
        keep=config.checkpoint.keep,
        histories=config.checkpoint.histories == "save",
        asynchronous=config.checkpoint.asynchronous,
    )
    log = _open_log(config, start) if run.rank == 0 else None
    with saver, log or nullcontext():
        epoch = start.epoch
        is_last = epoch == epochs or best.is_exhausted(epoch, config)
        while not is_last:
            epoch += 1
            record, val = _epoch(run, config, epoch, log)
            saver.finish()
            if log and record:
                log.epoch(record)
            # A list: every callback sees the epoch, whoever wants to end.
            asked_to_end = any([c(record) is True for c in plan.on_epoch_end] if record else [])
            if val > best.val:
                best = _Best(val, epoch)
                _save(run, config, "best", epoch)
            stopper, is_ended = _wishes(run, request, asked_to_end=asked_to_end)
            is_last = is_ended or epoch == epochs or best.is_exhausted(epoch, config)
            if every and (epoch % every == 0 or is_last or stopper):
                if log:
                    log.sync()
                state = _state(plan, log, val=val, best=best)
                saver.save(epoch, state, is_last=is_last or stopper is not None)
            if stopper and not is_last:
                return Outcome({}, Stopped(stopper, epoch))
        _save(run, config, "last", epoch)
        if log and config.run.trace:
            run.write_trace(Path(config.run.dir) / TRACE_FILE)
        return Outcome(log.finish(_facts(run, plan.threads)) if log else {})


class _Best(NamedTuple):
    """The best validation figure so far, and its epoch."""

    val: float = -math.inf
    epoch: int = 0

    def is_exhausted(self, epoch: int, config: Config) -> bool:
        """Whether an evaluation ends the training: nothing has become better for too long."""
        patience = config.training.early_stop
        is_evaluated = epoch % config.training.eval_every == 0
        if patience is not None and is_evaluated and epoch and self.val == -math.inf:
            raise UserError(
                f"`training.early_stop` (={patience}) must have labelled validation nodes to"
                " watch; give the graph a val_mask, or set it to null"
            )
        return patience is not None and is_evaluated and epoch - self.epoch >= patience


def _restore(run: Run, start: Start) -> _Best:
    """Loads the checkpoint to start from, if any; returns the best so far."""
    if start.path is None:
        return _Best()
    with Shards(checkpoint.shard_paths(start.path)) as shards:
        run.restore(shards)
    best_val = start.state["best_val"]
    # Without a figure, and in checkpoints that do not say, patience starts anew.
    epoch = start.state.get("best_epoch") or start.epoch
    return _Best(-math.inf if best_val is None else float(best_val), epoch)


def _state(plan: LoopPlan, log: RunLog | None, *, val: float, best: _Best) -> dict[str, Any]:
    """What a checkpoint holds besides tensors; only rank 0's is written."""
    finite = {"val": val, "best_val": best.val}
    return {
        "best_epoch": best.epoch,
        **{name: figure if math.isfinite(figure) else None for name, figure in finite.items()},
        **{key: plan.facts[key] for key in ("graph_fingerprint", "chunk_id_sha256")},
        "wall_s": log.wall_s if log else 0.0,
        "threads": plan.threads,
        "config": flatten(to_dict(plan.config)),
    }


def _wishes(run: Run, request: StopRequest, *, asked_to_end: bool) -> tuple[str | None, bool]:
    """What any rank was asked for, found alike by all: to stop, with which signal; to end."""
    asked = torch.zeros(65, dtype=torch.int64)
    asked[0] = int(asked_to_end)  # No signal has this number.
    if request.signal is not None:
        asked[request.signal] = 1
    end, *signals = run.total(asked).tolist()
    first = next((number for number, count in enumerate(signals, start=1) if count), None)
    return None if first is None else signal.Signals(first).name, end > 0


def _epoch(
    run: Run, config: Config, epoch: int, log: RunLog | None
) -> tuple[EpochRecord | None, float]:
    """One epoch on this rank; the record on rank 0, the validation figure everywhere."""
    is_evaluated = epoch % config.training.eval_every == 0 or epoch == config.training.epochs
    run.usage()  # What was waited for between two epochs, or before the first, is not this one's.
    start = time.perf_counter()
    loss = run.train_epoch(epoch, is_measured=is_evaluated)
    epoch_s = time.perf_counter() - start
    if not math.isfinite(loss):
        raise ArithmeticError(
            f"the loss became {loss} in epoch {epoch}; try a smaller training.lr"
        )
    usage = run.usage()
    accuracy, staleness, evaluation_s = None, None, None
    if is_evaluated:
        if log:
            log.evaluating()
        start = time.perf_counter()
        accuracy, staleness = run.evaluate(), run.staleness()
        evaluation_s = time.perf_counter() - start
    kind = KINDS.index("evaluation")
    evaluation_bytes = usage.sent_bytes[kind] + run.usage().sent_bytes[kind]
    own = [loss, epoch_s, peak_memory_bytes(), run.table_bytes, evaluation_bytes]
    rest = [*usage.sent_bytes, *usage.wait_s, *run.gradient_norms()]
    values = torch.tensor([*own, *rest], dtype=torch.float64)
    parts = run.gather(values)
    val = -math.inf if accuracy is None or accuracy["val"] is None else accuracy["val"]
    if not parts:
        return None, val
    if is_evaluated:
        run.write_timeline(Path(config.run.dir) / TIMELINE_FILE, epoch)
    record = _record(epoch, torch.stack(parts), run.transfer_s(), config.parallel.num_ways)
    persistence = run.persistence if is_evaluated else None
    record = replace(record, accuracy=accuracy, staleness=staleness, persistence=persistence)
    return replace(record, evaluation_s=evaluation_s), val


def _record(
    epoch: int, parts: torch.Tensor, transfer_s: Sequence[float], num_ways: int
) -> EpochRecord:
    """Puts the figures of all ranks together, ``parts [ranks, figures]``."""
    loss, own_s, peak, table, evaluation_bytes = (column.tolist() for column in parts.T[:5])
    sent = parts[:, 5 : 5 + len(KINDS)].sum(dim=0).long().tolist()
    waits, norms = parts[:, 5 + len(KINDS) :].split_with_sizes(
        [len(WAIT_KINDS), parts.shape[1] - 5 - len(KINDS) - len(WAIT_KINDS)], dim=1
    )
    compute_s = (parts[:, 1] - waits.sum(dim=1)).tolist()
    shares = time_shares(own_s, compute_s, transfer_s)
    sent_bytes = dict(zip(KINDS, sent, strict=True))
    return EpochRecord(
        epoch=epoch,
        loss=sum(loss),
        epoch_s=max(own_s),
        bubble_fraction=shares["wait"] + shares["transfer"],
        time_shares=shares,
        comm_bytes=sent_bytes | {"evaluation": int(sum(evaluation_bytes))},
        peak_memory_bytes=[int(value) for value in peak],
        table_bytes=[int(value) for value in table],
        compute_s=compute_s,
        wait_s=dict(zip(WAIT_KINDS, waits.T.tolist(), strict=True)),
        # Rank by rank a column of virtual stages; ways have summed their gradients.
        gradient_norm=norms[::num_ways].T.flatten().tolist(),
    )


def peak_memory_bytes() -> int:
    """Most memory that this process has held: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


def _open_log(config: Config, start: Start) -> RunLog:
    done = Done(start.epoch, start.state.get("wall_s", 0.0)) if start.is_begun else None
    return RunLog(
        config.run.dir,
        config_text=to_yaml(config),
        epochs=config.training.epochs,
        log_every=config.run.log_every,
        tensorboard=config.run.tensorboard,
        done=done,
        partition=start.partition,
    )


def _save(run: Run, config: Config, name: str, epoch: int) -> None:
    """Every rank takes part; rank 0 writes the file."""
    tensors = run.weights()
    if tensors is not None:
        path = Path(config.run.dir) / WEIGHTS_DIR / f"{name}.safetensors"
        save_weights(path, tensors, {"epoch": str(epoch), "model": config.model.name})


def _facts(run: Run, threads: int) -> dict[str, Any]:
    return {
        "num_parameters": run.num_parameters,
        "metric": run.task.metric,
        "world_size": run.world_size,
        "threads": threads,
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
