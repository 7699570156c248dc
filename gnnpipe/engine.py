"""Interprets one rank's list of actions: the pipeline at work.

The engine moves chunks through the rank's stages in the order the schedule says. What a chunk's
rows mean is the stage's business, how they travel is ``comm``'s.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gnnpipe.cell import WHOLE
from gnnpipe.comm import Comm, Message
from gnnpipe.inbox import Inbox
from gnnpipe.kernels import SparseRows
from gnnpipe.losses import Targets
from gnnpipe.models.layer import Layer
from gnnpipe.optimizer import squared_norm
from gnnpipe.order import step_bounds
from gnnpipe.recorder import message_tag
from gnnpipe.schedule import Action
from gnnpipe.stage import Flow, Stage
from gnnpipe.tasks import Task
from gnnpipe.weight_sums import WeightSums


class Cut(NamedTuple):
    """What crosses the boundary in front of a stage."""

    channels: int
    carried: tuple[tuple[str, int], ...]
    """Name and width of each carried tensor, sorted by name."""
    held: tuple[str, ...] = ()
    """Carried tensors that an earlier stage of the rank behind the cut has seen: their values do
    not travel again, their gradients do."""

    def items(self, kind: str) -> list[tuple[str | None, int]]:
        """What a forward or a backward gets: name (None: the activation) and width, as sent."""
        held = self.held if kind == "F" else ()
        return [(None, self.channels), *(pair for pair in self.carried if pair[0] not in held)]


def cuts_of(layers: Sequence[Layer], bounds: Sequence[int], *, num_ranks: int) -> list[Cut | None]:
    """What crosses in front of each stage; None before the first.

    Args:
        layers: the whole model.
        bounds: first layer of each stage, virtual ones included, and the number of layers.
        num_ranks: pipeline ranks; stages that many apart share one, and what it has seen of
            carried tensors. With 1 everything travels in front of every stage.
    """
    cuts: list[Cut | None] = [None]
    for stage, position in enumerate(bounds[1:-1], start=1):
        cut = cut_before(layers, position)
        # Nobody behind the first layer of the rank's stage before has written it anew.
        before = bounds[stage - num_ranks + 1] if stage >= num_ranks > 1 else 0
        fresh = {name for layer in layers[before:position] for name in layer.writes}
        held = tuple(name for name, _ in cut.carried if before and name not in fresh)
        cuts.append(cut._replace(held=held))
    return cuts


def cut_before(layers: Sequence[Layer], position: int) -> Cut:
    """The cut in front of ``layers[position]``: carried tensors that are still to be read."""
    written = {
        name: layer.carried_channels(name) for layer in layers[:position] for name in layer.writes
    }
    read = {name for layer in layers[position:] for name in layer.reads}
    carried = tuple(sorted((name, written[name]) for name in read & written.keys()))
    return Cut(layers[position - 1].out_channels, carried)


class Inputs(NamedTuple):
    """What the first and the last stage read, for this rank's rows."""

    features: list[Tensor | SparseRows]
    """Input rows of each chunk; empty where the rank does not hold the first stage."""
    all_features: Callable[[], Tensor | SparseRows]
    """Input rows of all chunks, for evaluation."""
    targets: list[Targets]
    """Labels and masks of each chunk."""
    all_targets: Targets
    chunk_train: list[float]
    """What each chunk adds to the number that losses are divided by: its training nodes, on all
    ways, or the task's own count."""
    task: Task


class Engine:
    """One rank of the pipeline.

    Args:
        stages: this rank's stages by stage index.
        cuts: what crosses in front of each stage of the whole pipeline; None before the first.
        actions: this rank's part of the schedule, one epoch.
        steps: optimizer steps of the epoch.
        inputs: features and labels of this rank's rows.
        comm: its messages.
    """

    def __init__(
        self,
        stages: dict[int, Stage],
        cuts: Sequence[Cut | None],
        *,
        actions: Sequence[Action],
        inputs: Inputs,
        comm: Comm,
        steps: int = 1,
    ) -> None:
        self.stages = stages
        self._cuts = cuts
        self._actions = actions
        self._inputs = inputs
        self._comm = comm
        self._last = len(cuts) - 1
        self._chunk_sizes = [targets.labels.shape[0] for targets in inputs.targets]
        self._bounds = step_bounds(len(self._chunk_sizes), steps)
        self._num_train = sum(inputs.chunk_train)
        self._handed: dict[Action, Flow] = {}
        self._held: dict[int, dict[str, Tensor]] = {}
        self._loss_gradients: dict[int, Tensor] = {}
        self.weight_sums = WeightSums(comm)

    @property
    def inputs(self) -> Inputs:
        """Features and labels of this rank's rows."""
        return self._inputs

    def step_train(self, order: Sequence[int], step: int) -> float:
        """What the loss of one step is divided by; without training nodes, 0."""
        low, high = self._bounds[step : step + 2]
        return sum(self._inputs.chunk_train[chunk] for chunk in sorted(order[low:high]))

    def train_step(
        self, epoch: int, order: Sequence[int], *, step: int = 0, is_measured: bool = False
    ) -> float:
        """Runs the actions of one step; parameter gradients are complete afterwards.

        A step without training nodes makes its rows fresh and has no gradients.

        Args:
            epoch: counted from 1.
            order: chunk at each position.
            step: of the epoch, counted from 0.
            is_measured: measure the staleness on the way, for :meth:`staleness`.

        Returns:
            This rank's part of the epoch's loss: the sum over the step's chunks where it holds
            the last stage, 0 elsewhere.
        """
        self._comm.flush()  # What the step before sent has left long ago.
        self._inputs.task.start_step(epoch)
        num_steps = len(self._bounds) - 1
        for stage in self.stages.values():
            if step == 0:
                stage.start_epoch(epoch, is_measured=is_measured)
            stage.start_step()
        total = self.step_train(order, step)
        loss = self._run(epoch, order, step, total=total)
        self._comm.during("the weight sums")
        self.weight_sums.finish()
        for stage in self.stages.values():
            stage.end_step(has_backward=total > 0)
            if step == num_steps - 1:
                stage.end_epoch()
        return loss * (total / self._num_train) if total else 0.0

    def _run(self, epoch: int, order: Sequence[int], step: int, *, total: float) -> float:
        """All actions of a step; forwards only if there is nothing to learn."""
        low, high = self._bounds[step : step + 2]
        kinds = "FBIG" if total else "F"
        actions = [a for a in self._actions if low <= a.chunk_index < high and a.kind in kinds]
        inbox = Inbox(self._comm, list(self._expected(actions, order)))
        number = (epoch - 1) * (len(self._bounds) - 1) + step + 1
        loss = 0.0
        for action in actions:
            start_s = time.perf_counter()
            stage_index, kind, position = action
            self._comm.during(repr(action), epoch, stage_index, ord(kind), position)
            chunk = order[position]
            is_complete = position == low and kind in "BG"  # backwards run in reverse
            done = self._layer_done(stage_index, number) if is_complete else None
            if kind == "F":
                loss += self._forward(action, chunk, inbox, total=total)
            elif kind == "G":
                self.stages[stage_index].finish_backward(chunk, layer_done=done)
            else:
                self._backward(action, chunk, inbox, layer_done=done)
            end_s = time.perf_counter()
            self._comm.recorder.action(kind, stage_index, position, start_s=start_s, end_s=end_s)
        return loss

    def add_exact_gradients(self, epoch: int) -> None:
        """Adds full-graph training's gradients at the weights as they are to the parameters'.

        All chunks pass a stage at once, so that nothing is read that is not fresh, and the stages
        work one after the other: forward, then back. Dropout's masks are those of the epoch. The
        tables are left with exact rows.

        Args:
            epoch: whose last step has run.
        """
        self._comm.flush()
        self._inputs.task.start_step(epoch)
        for stage in self.stages.values():
            stage.start_step()
        rows, stages = sum(self._chunk_sizes), sorted(self.stages.items())
        gradient = torch.empty(0)
        recorder = self._comm.recorder
        with self._comm.counted_as("evaluation"):
            for index, stage in stages:
                start_s = time.perf_counter()
                self._comm.during(f"the exact forward of stage {index}")
                action = self._whole_action(index, "F")
                out = stage.forward(WHOLE, self._whole_input(action, rows))
                self._hold(action, out)
                if index == self._last:
                    gradient = self._loss(out.x, self._inputs.all_targets, self._num_train)[1]
                else:
                    self._hand_over(action._replace(stage_index=index + 1), out, rows)
                recorder.exact("F", index, start_s=start_s, end_s=time.perf_counter())
            for index, stage in reversed(stages):
                start_s = time.perf_counter()
                self._comm.during(f"the exact backward of stage {index}")
                action = self._whole_action(index, "B")
                is_last = index == self._last
                flow = Flow(gradient, {}) if is_last else self._whole_input(action, rows)
                done = self._layer_done(index, epoch)
                back = stage.backward(WHOLE, flow, layer_done=done)
                if index > 0:
                    self._hand_over(action._replace(stage_index=index - 1), back, rows)
                recorder.exact("B", index, start_s=start_s, end_s=time.perf_counter())
            self.weight_sums.finish()
            for _, stage in stages:
                for table in stage.tables:
                    table.recount()
            self._comm.flush()
        for stage in self.stages.values():
            stage.end_step()

    def gradient_norm(self, num_layers: int) -> float:
        """Norm of the gradient of all weights of the model, on every rank the same bits.

        Args:
            num_layers: layers of the whole model.
        """
        squares = torch.zeros(num_layers, dtype=torch.float64)
        is_first_way = self._comm.mesh.way(self._comm.rank) == 0  # ways hold equal sums
        for stage in self.stages.values() if is_first_way else ():
            for local in stage.layers:
                squares[local.layer_index] = squared_norm(local.layer.parameters())
        # Each layer comes from one rank, so adding up over ranks rounds nothing; then by layer.
        return math.sqrt(sum(self._comm.sum_over_ranks(squares).tolist()))

    def infer(self, *, into_tables: bool = False) -> Tensor | None:
        """Exact full-graph inference, stage after stage.

        Args:
            into_tables: leave the exact values in the tables, as first history.

        Returns:
            Logits of this rank's rows ``[num_rows, num_classes]`` where it holds the last stage.
        """
        rows = sum(self._chunk_sizes)
        logits = None
        with self._comm.counted_as("evaluation"):
            for index, stage in sorted(self.stages.items()):
                action = self._whole_action(index, "F")
                self._comm.during(f"inference of stage {index}")
                flow = self._whole_input(action, rows)
                out = stage.infer(flow, into_tables=into_tables)
                self._hold(action, out)
                if index == self._last:
                    assert isinstance(out.x, Tensor)
                    logits = out.x
                else:
                    self._hand_over(action._replace(stage_index=index + 1), out, rows)
            self._comm.flush()
        return logits

    def evaluate(self, *, into_tables: bool = False) -> Tensor:
        """The task's tally over all ranks, on every rank; see ``Task.figures``, :meth:`infer`."""
        logits = self.infer(into_tables=into_tables)
        targets, task = self._inputs.all_targets, self._inputs.task
        if task.needs_all_scores:
            logits, targets = self._collected(logits)
        tally = torch.zeros(task.tally_shape, dtype=torch.float64)
        if logits is not None:
            tally += task.tally(logits, targets)
        return self._comm.sum_over_ranks(tally)

    def _collected(self, logits: Tensor | None) -> tuple[Tensor | None, Targets]:
        """Scores and targets of all ways of the last stage, on rank 0; no scores elsewhere."""
        mesh, targets = self._comm.mesh, self._inputs.all_targets
        counts = torch.zeros(mesh.world_size, dtype=torch.int64)
        width = targets.labels.shape[1]
        flat = None
        if logits is not None:
            counts[self._comm.rank] = targets.labels.shape[0]
            # One tensor per row: scores, labels, masks; a message has the dtype of activations.
            rows = torch.cat((logits, targets.labels, targets.masks.T.to(logits)), dim=1)
            flat = rows.flatten()
        counts = self._comm.sum_over_ranks(counts)
        sizes = [(rank, n * (2 * width + 3)) for rank, n in enumerate(counts.tolist()) if n]
        parts = self._comm.collect_flat(flat, sizes)
        if not parts:
            return None, targets
        rows = torch.cat(parts).view(-1, 2 * width + 3)
        scores, labels, masks = torch.split(rows, [width, width, 3], dim=1)
        return scores, Targets(labels, masks.T > 0)

    def fit_histories(self, num_layers: int) -> None:
        """Fits how kept rows are extrapolated, from sums over all ways.

        Args:
            num_layers: layers of the whole model.
        """
        recalls = {
            local.layer_index: local.table.recall
            for stage in self.stages.values()
            for local in stage.layers
            if local.table is not None and local.table.recall is not None
        }
        sums = torch.zeros((num_layers, 2), dtype=torch.float64)
        for index, recall in recalls.items():
            sums[index] = recall.sums
        sums = self._comm.sum_over_ranks(sums)
        for index, recall in recalls.items():
            recall.fit(sums[index])

    def staleness(self, num_layers: int) -> list[float | None]:
        """How far the last measured epoch moved the values that it found in the tables.

        ``|fresh - historical| / |fresh|`` (Frobenius norms) of each layer that has a table, in
        the order of layers: the relative drift of what chunks read of later ones. None where
        all fresh values are zero.

        Args:
            num_layers: layers of the whole model.
        """
        # Squared change, squared size, and on how many ranks the layer has a table.
        squares = torch.zeros((num_layers, 3), dtype=torch.float64)
        for stage in self.stages.values():
            for local in stage.layers:
                if local.table is not None and local.table.measured is not None:
                    squares[local.layer_index, :2] = local.table.measured
                    squares[local.layer_index, 2] = 1.0
        layers = self._comm.sum_over_ranks(squares).tolist()
        return [
            math.sqrt(change / size) if size else None for change, size, tables in layers if tables
        ]

    def _forward(self, action: Action, chunk: int, inbox: Inbox, *, total: float) -> float:
        if action.stage_index == 0:
            flow = Flow(self._inputs.features[chunk], {})
        else:
            flow = self._obtain(action, inbox)
        stage = self.stages[action.stage_index]
        stage.enter(chunk)
        out = stage.forward(chunk, flow)
        self._hold(action, out)
        if action.stage_index < self._last:
            following = action._replace(stage_index=action.stage_index + 1)
            self._hand_over(following, out, self._chunk_sizes[chunk])
            return 0.0
        if not total:
            return 0.0
        loss, self._loss_gradients[chunk] = self._loss(out.x, self._inputs.targets[chunk], total)
        return float(loss)

    def _loss(self, scores: object, targets: Targets, total: float) -> tuple[Tensor, Tensor]:
        """The loss of some rows, and its gradient."""
        assert isinstance(scores, Tensor)
        return self._inputs.task.loss(scores, targets.labels, targets.masks[0], total=total)

    def _backward(
        self,
        action: Action,
        chunk: int,
        inbox: Inbox,
        *,
        layer_done: Callable[[int], None] | None,
    ) -> None:
        if action.stage_index == self._last:
            flow = Flow(self._loss_gradients.pop(chunk), {})
        else:
            flow = self._obtain(action, inbox)
        gradient = self.stages[action.stage_index].backward(
            chunk, flow, layer_done=layer_done, is_split=action.kind == "I"
        )
        if action.stage_index > 0:
            previous = action._replace(stage_index=action.stage_index - 1)
            self._hand_over(previous, gradient, self._chunk_sizes[chunk])

    def _layer_done(self, stage_index: int, step: int) -> Callable[[int], None] | None:
        """Called for a layer whose gradients are complete: their sum travels meanwhile."""
        if self._comm.mesh.num_ways == 1:
            return None
        layers = {local.layer_index: local.layer for local in self.stages[stage_index].layers}

        def done(layer_index: int) -> None:
            parameters = layers[layer_index].parameters()
            gradients = [p.grad for p in parameters if p.grad is not None]
            self.weight_sums.start(layer_index, gradients, step=step)

        return done

    def _source(self, action: Action) -> int:
        """Rank that sends an action its input."""
        step = -1 if action.kind == "F" else 1
        return self._rank_of(action.stage_index + step)

    def _rank_of(self, stage_index: int) -> int:
        mesh = self._comm.mesh
        return mesh.rank_of(mesh.home(stage_index), mesh.way(self._comm.rank))

    def _cut(self, action: Action) -> Cut:
        """What the input of an action consists of."""
        cut = self._cuts[action.stage_index + (action.kind != "F")]
        assert cut is not None
        return cut

    def _messages(self, action: Action, peer: int, num_rows: int) -> Iterable[Message]:
        """The messages that make up the input of an action."""
        for item, (name, channels) in enumerate(self._cut(action).items(action.kind)):
            yield Message(
                peer=peer,
                tag=_tag(action, item, len(self._chunk_sizes)),
                shape=(num_rows, channels),
                kind="boundary" if name is None else "carried",
                channel="forward" if action.kind == "F" else "backward",
                name=f"for {action!r}",
            )

    def _expected(self, actions: Sequence[Action], order: Sequence[int]) -> Iterable[Message]:
        """Everything that other ranks send for some actions, in the order of need."""
        for action in actions:
            if action.kind == "G":
                continue
            is_end = action.stage_index == (0 if action.kind == "F" else self._last)
            if not is_end and self._source(action) != self._comm.rank:
                num_rows = self._chunk_sizes[order[action.chunk_index]]
                yield from self._messages(action, self._source(action), num_rows)

    def _obtain(self, action: Action, inbox: Inbox) -> Flow:
        """The input of an action, from the inbox or from another stage of this rank."""
        if self._source(action) == self._comm.rank:
            return self._handed.pop(action)
        names = [name for name, _ in self._cut(action).items(action.kind)]
        tensors = {name: inbox.take() for name in names}
        x = tensors.pop(None)
        held = self._held.pop(action.chunk_index, {}) if action.kind == "F" else {}
        return Flow(x, held | {str(name): value for name, value in tensors.items()})

    def _hold(self, action: Action, flow: Flow) -> None:
        """Keeps the carried tensors that the next stage of this rank reads and nobody sends it."""
        following = action.stage_index + self._comm.mesh.num_stages
        cut = self._cuts[following] if following <= self._last else None
        if cut is not None and cut.held:
            self._held[action.chunk_index] = {name: flow.carried[name] for name in cut.held}

    def _hand_over(self, action: Action, flow: Flow, num_rows: int) -> None:
        """Gives an action its input, here or on the rank that will run it."""
        peer = self._rank_of(action.stage_index)
        cut = self._cut(action)
        if peer == self._comm.rank:
            values = {name: flow.carried[name] for name, _ in cut.carried}
            self._handed[action] = Flow(flow.x, values)
            return
        assert isinstance(flow.x, Tensor)
        names = [name for name, _ in cut.items(action.kind)]
        tensors = [flow.x if name is None else flow.carried[name] for name in names]
        for message, tensor in zip(self._messages(action, peer, num_rows), tensors, strict=True):
            self._comm.send(tensor, message)

    def _whole_action(self, stage_index: int, kind: Literal["F", "B"]) -> Action:
        """All chunks at once: at a position behind theirs, so that messages differ from theirs."""
        return Action(stage_index, kind, len(self._chunk_sizes))

    def _whole_input(self, action: Action, num_rows: int) -> Flow:
        if action.stage_index == 0 and action.kind == "F":
            return Flow(self._inputs.all_features(), {})
        if self._source(action) == self._comm.rank:
            return self._handed.pop(action)
        messages = list(self._messages(action, self._source(action), num_rows))
        return self._obtain(action, Inbox(self._comm, messages))


def _tag(action: Action, item: int, num_chunks: int) -> int:
    """A number that no other message of the epoch between the same two ranks has."""
    position = action.stage_index * (num_chunks + 1) + action.chunk_index
    return message_tag(position, item, is_backward=action.kind != "F")
