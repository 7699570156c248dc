"""The method layer by layer instead of chunk by chunk: the same numbers, whatever C costs.

A row of layer l depends on rows of layer l - 1 in its own chunk and in earlier ones, and on
history. So all chunks of a layer can be computed at once, with the edges split by whether the
source's chunk comes later in the epoch's order (historical) or not (fresh). An epoch then costs
little more than full-graph training's, which makes studies with many chunks and seeds affordable;
``tests/test_layerwise.py`` holds the losses to the pipeline's. Layers that gather (attention)
get each row twice and once more for every chunk that reads it as history, and their edges the row
that is theirs; of what is kept they know the plain history only (``Idea()``).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gnnpipe import chunk
from gnnpipe.cell import Cell, Edges
from gnnpipe.compensation import PRIOR
from gnnpipe.config import Config, from_dict, to_dict
from gnnpipe.configured import model_layers
from gnnpipe.counter import stream_key
from gnnpipe.graph import Graph
from gnnpipe.kernels import EdgeOrder, RowBlock, aggregate
from gnnpipe.kernels.dropout import dropout_rows
from gnnpipe.order import chunk_order
from gnnpipe.runs import PipelineRun
from gnnpipe.strata import stratum_of
from gnnpipe.world import World


class Idea(NamedTuple):
    """How histories are kept: the options of a run, and what a study adds to them."""

    store: str = "dropped"
    """What is kept: dropped, as handed to aggregate; clean, before its dropout; redrawn, clean
    and dropped with the reading epoch's mask."""
    momentum: float = 0.0
    """Share of the old history in the new one."""
    predict: float = 0.0
    """Step from the last two values: h1 + predict (h1 - h0)."""
    gradient: float = 0.0
    """Factor of last epoch's gradient along edges that were read historical."""
    smoothing: float = 0.0
    """Share of the old value in a kept gradient."""


def idea_of(config: Config, more: Mapping[str, Any] | None = None) -> Idea:
    """What a configuration says, and more."""
    history = config.history
    store = "dropped" if history.dropout else "redrawn"
    late = config.late_gradient, history.late_gradient_momentum
    return Idea(store, history.momentum, 0.0, *late)._replace(**(more or {}))


class _Split(NamedTuple):
    """One epoch's edges of one operator."""

    fresh: RowBlock
    stale: RowBlock
    back: RowBlock
    """Transposed: readers of fresh rows."""
    missing: RowBlock
    """Transposed: readers of historical rows."""
    moved: "Moved | None"
    """What historical rows are moved by; None leaves them."""


class _Gathered(NamedTuple):
    """One epoch's historical rows of one operator, once for each chunk that gathers them."""

    row_id: Tensor
    moved: "Moved | None"


class Layerwise:
    """A run without chunks that computes what a pipeline over ``chunk_id`` computes.

    Args:
        config: the run.
        graph: undirected.
        chunk_id: of each node, ``[N]``.
        idea: how histories are kept; None as the configuration says.
    """

    def __init__(
        self, config: Config, graph: Graph, chunk_id: Sequence[int], *, idea: Idea | None = None
    ) -> None:
        self.config, self.idea = config, idea or idea_of(config)
        self._chunk_id = torch.as_tensor(np.asarray(chunk_id), dtype=torch.int64)
        self._num_chunks = int(self._chunk_id.max()) + 1
        readers = np.bincount(graph.indices, minlength=graph.num_nodes)
        self._stratum = torch.from_numpy(stratum_of(readers, max(config.num_strata, 1)))
        self.run = whole_run(config, graph)
        self.tables: dict[int, Memory] = {}
        self._splits: dict[str, _Split] = {}
        self._gathered: dict[str, _Gathered] = {}
        self._epoch = 0
        for stage in self.run.engine.stages.values():
            for local in stage.layers:
                if local.table is not None:
                    memory = Memory(local.table.values, config, self.idea)
                    memory.layer_index = local.layer_index
                    self.tables[id(local.table)] = memory
            stage._reader = self._reader  # type: ignore[method-assign]
            stage.run_by_autograd()  # Every layer has to ask that reader.
        self._operator = {
            id(local.table): (local.layer.operator, local.cells.chunks[0])
            for stage in self.run.engine.stages.values()
            for local in stage.layers
            if local.table is not None
        }
        every = config.history.correct_every
        self.run.correction = None if every is None else self.run.new_correction(every)
        self.run.add_exact_gradients = self._add_exact_gradients  # type: ignore[method-assign]
        if config.history.warm_start == "exact":
            self._renew()

    def train_epoch(self, epoch: int, *, is_measured: bool = False) -> float:
        """One epoch of the pipeline."""
        config = self.config
        order = chunk_order(config.seed, epoch, self._num_chunks, kind=config.history.order)
        position = torch.empty(self._num_chunks, dtype=torch.int64)
        position[order] = torch.arange(self._num_chunks)
        self._split(position[self._chunk_id])
        self._epoch = epoch
        for memory in self.tables.values():
            memory.start_epoch(epoch)
        self.is_training = True
        loss = self.run.train_epoch(epoch)
        self.is_training = False
        for memory in self.tables.values():
            memory.end_epoch(epoch)
        every, bound = config.refresh_every, config.history.max_drift
        is_due = every is not None and self._num_chunks > 1 and epoch % every == 0
        if is_due or (bound is not None and max(self.staleness()) > bound):
            self._renew()
        return loss

    def _split(self, place: Tensor) -> None:
        """Once an epoch for all layers of an operator: their edges are the same."""
        parts = dict(self._operator.values())
        blocks = {operator: cell for operator, cell in parts.items() if cell.edges is None}
        factor = self.config.history.cross_chunk_gradient
        self._splits = {operator: split(cell, place, factor) for operator, cell in blocks.items()}
        cells, self._gathered = {}, {}
        for operator, cell in parts.items():
            if cell.edges is not None:
                row_id, target_place, edges = apart(cell, place)
                cells[operator] = cell._replace(edges=edges)
                self._gathered[operator] = _Gathered(row_id, None)
            if not self.config.num_strata or int(place.max()) == 0:
                continue
            own, stratum = place[cell.node_id], self._stratum[cell.node_id]
            like = next(iter(self.tables.values())).history
            members = functional.one_hot(stratum, int(self._stratum.max()) + 1).to(like)
            if cell.edges is not None:
                moved = Moved(members, own, members[row_id], target_place, factor)
                self._gathered[operator] = _Gathered(row_id, moved)
            else:
                shares = aggregate(self._splits[operator].stale, members)
                moved = Moved(members, own, shares, own, factor)
                self._splits[operator] = self._splits[operator]._replace(moved=moved)
        for stage in self.run.engine.stages.values():
            for local in stage.layers:
                if local.table is not None and local.layer.operator in cells:
                    local.cells.chunks[0] = cells[local.layer.operator]

    def _add_exact_gradients(self, epoch: int) -> None:
        """Once more, with every edge fresh."""
        self._split(torch.zeros_like(self._chunk_id))
        self.run.engine.train_step(epoch, [0])

    def _renew(self) -> None:
        """Histories that are exact for the weights as they are."""
        for memory in self.tables.values():
            memory.is_warm = False
        self._is_warming = True
        self.run.engine.infer()
        self._is_warming = False

    is_training = False

    def staleness(self) -> list[float]:
        """Relative drift of each layer in the last epoch."""
        return [memory.drift for memory in self.tables.values()]

    def evaluate(self) -> dict[str, float | None]:
        """Exact."""
        return self.run.evaluate()

    def _reader(self, table: Any, cell: Any, _chunk: int, _kept: Any = None) -> Any:
        if table is None:
            return None
        known = id(table)
        if known not in self.tables:  # of an evaluation; in the order of layers
            return _Plain(cell, self._next_memory() if self._is_warming else None)
        operator, cell = self._operator[known]
        if cell.edges is not None:
            factor = self.config.history.cross_chunk_gradient
            return _Beside(self.tables[known], self._gathered[operator], factor)
        return _Masked(self.tables[known], cell, self._splits[operator], self._epoch)

    _is_warming = False

    def _next_memory(self) -> "Memory":
        return next(memory for memory in self.tables.values() if not memory.is_warm)


def whole_run(config: Config, graph: Graph) -> PipelineRun:
    """Full-graph training of a configured model, in node order."""
    zeros = np.zeros(graph.num_nodes, np.int64)
    whole = chunk.cut(graph, zeros, zeros, num_ways=1, method="file", seed=0)
    values = to_dict(config)
    values["partition"] |= {"num_chunks": 1, "path": None, "method": "contiguous"}
    values["history"] = {"warm_start": "zeros", "strata": 0}
    world = World(0, 1, device=torch.device("cpu"), store=None)
    return PipelineRun(from_dict(values), whole, world=world, layers=model_layers(config, whole))


class Memory:
    """One layer's histories."""

    def __init__(self, like: Tensor, config: Config, idea: Idea) -> None:
        self.idea = idea
        self.period = config.history.period
        self.seed, self.dropout, self.layer_index = config.seed, config.model.dropout, 0
        self.history = torch.zeros_like(like)
        self.before: Tensor | None = None
        self.read = self.history
        self.fresh: Tensor | None = None
        self.clean: Tensor | None = None
        self.gradient: Tensor | None = None
        self.is_warm = False
        self.drift = 0.0

    def warm(self, x: Tensor) -> None:
        """The first history."""
        self.history = x.clone()
        self.is_warm = True

    def start_epoch(self, epoch: int) -> None:
        """What the epoch will read."""
        self.read = self.history
        if self.idea.predict and self.before is not None:
            self.read = self.history + self.idea.predict * (self.history - self.before)

    def end_epoch(self, epoch: int) -> None:
        """What the next will."""
        assert self.fresh is not None
        gap = (self.fresh - self.shown).norm() / self.fresh.norm().clamp(min=1e-30)
        self.drift = float(gap)
        if epoch % self.period:
            return
        new = self.fresh if self.idea.store == "dropped" or self.clean is None else self.clean
        keep = self.idea.momentum
        self.before = self.history
        self.history = new if not keep else keep * self.history + (1.0 - keep) * new

    shown = torch.empty(0)


class _Plain:
    """Exact rows; leaves them as first history."""

    def __init__(self, cell: Any, memory: Memory | None) -> None:
        self.cell, self.memory = cell, memory

    def own_rows(self, x: Tensor) -> None:
        return None

    def rounded(self, x: Tensor) -> Tensor:
        return x

    def aggregate(self, x: Tensor) -> Tensor:
        return aggregate(self.cell.forward, self.gather(x).contiguous())

    def gather(self, x: Tensor) -> Tensor:
        if self.memory is not None:
            self.memory.warm(x.detach())
        return x


class _Beside:
    """Gathers a row as it is fresh to its own chunk, fresh to later ones, and historical."""

    def __init__(self, memory: Memory, gathered: _Gathered, factor: float) -> None:
        self.memory, self.gathered, self.factor = memory, gathered, factor

    def keep(self, x: Tensor) -> None:
        """Histories are rows as they were handed over."""

    def own_rows(self, x: Tensor) -> None:
        return None

    def rounded(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        self.memory.shown, self.memory.fresh = self.memory.read, x.detach()
        crossing = x.detach() + self.factor * (x - x.detach())
        row_id, moved = self.gathered
        historical = self.memory.read[row_id]
        if moved is not None:
            added: Tensor = _Drift.apply(x, self.memory.read, moved)
            historical = historical + added
        return torch.cat((x, crossing, historical))


class _Drift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shown: Tensor, moved: "Moved") -> Tensor:
        ctx.moved = moved
        return moved.forward(x.detach() - shown)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.moved.backward(grads[0]), None, None


class _Masked:
    """Reads the mix."""

    def __init__(self, memory: Memory, cell: Any, parts: _Split, epoch: int) -> None:
        self.memory, self.cell, self.parts = memory, cell, parts
        self.memory.clean = None
        self.epoch = epoch

    def keep(self, x: Tensor) -> None:
        self.memory.clean = x.detach().clone()

    def own_rows(self, x: Tensor) -> None:
        return None

    def rounded(self, x: Tensor) -> Tensor:
        return x

    def aggregate(self, x: Tensor) -> Tensor:
        memory = self.memory
        shown = memory.read
        if memory.idea.store == "redrawn" and memory.dropout:
            key = stream_key(memory.seed, self.epoch, memory.layer_index, 0)
            shown = dropout_rows(shown, self.cell.node_id, p=memory.dropout, key=key)
        memory.shown, memory.fresh = shown, x.detach()
        out: Tensor = _Mix.apply(x, shown, self)
        if self.parts.moved is None:
            return out
        return out + self.parts.moved.forward(x.detach() - shown)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shown: Tensor, reader: _Masked) -> Tensor:
        ctx.reader = reader
        parts = reader.parts
        out = aggregate(parts.fresh, x.detach().contiguous())
        return out + aggregate(parts.stale, shown)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        reader: _Masked = ctx.reader
        memory, parts = reader.memory, reader.parts
        gradient = rest = grads[0].contiguous()
        dx = aggregate(parts.back, gradient)
        if memory.idea.gradient:
            if memory.gradient is None:
                memory.gradient = torch.zeros_like(gradient)
            late = memory.idea.gradient * memory.gradient
            dx += aggregate(parts.missing, late)
            rest = gradient - late
            old = memory.idea.smoothing
            memory.gradient.lerp_(gradient, (1.0 - old) / (1.0 - old**reader.epoch))
        if parts.moved is not None:
            dx += parts.moved.backward(rest)
        return dx, None, None


class Moved:
    """Historical rows moved by the mean drift of their stratum, for all chunks at once.

    Args:
        members: which stratum each row is of, ``[N, G]``, ones and zeros.
        place: position of each row's chunk, ``[N]``.
        shares: what each reader reads of each stratum's historical rows, ``[R, G]``.
        reader_place: position of each reader's chunk, ``[R]``.
        factor: on gradients that cross chunks.
    """

    def __init__(
        self, members: Tensor, place: Tensor, shares: Tensor, reader_place: Tensor, factor: float
    ) -> None:
        self.num_places, self.num_strata = int(place.max()) + 1, members.shape[1]
        self.factor = factor
        self.cell = place * self.num_strata + members.argmax(1)
        done = self._by_place(torch.ones_like(members[:, :1])).cumsum(0)  # [C, G, 1]
        of_all = PRIOR / done.sum(1, keepdim=True)
        self.means = (of_all + torch.eye(self.num_strata).to(members)) / (done + PRIOR)
        self.by_place = reader_place.argsort(stable=True)
        self.sizes = torch.bincount(reader_place, minlength=self.num_places).tolist()
        self.shares = shares[self.by_place].split(self.sizes)

    def _by_place(self, rows: Tensor) -> Tensor:
        """Sums of rows by position and stratum, ``[C, G, F]``."""
        sums = rows.new_zeros((self.num_places * self.num_strata, rows.shape[1]))
        return sums.index_add_(0, self.cell, rows).view(self.num_places, self.num_strata, -1)

    def forward(self, drift: Tensor) -> Tensor:
        """What is added to each reader's rows, or sums."""
        shift = self.means @ self._by_place(drift).cumsum(0)
        rows = torch.cat([part @ own for part, own in zip(self.shares, shift, strict=True)])
        return torch.empty_like(rows).index_copy_(0, self.by_place, rows)

    def backward(self, gradient: Tensor) -> Tensor:
        """What that gives to the rows it was made of."""
        rows = gradient[self.by_place].split(self.sizes)
        part = [own.t() @ grad for own, grad in zip(self.shares, rows, strict=True)]
        due = self.means.transpose(1, 2) @ torch.stack(part)
        later = due.flip(0).cumsum(0).flip(0) - due
        total = (due + self.factor * later).flatten(0, 1)
        return total[self.cell]


def split(cell: Any, place: Tensor, factor: float) -> _Split:
    """The cell's edges by whether their source is fresh to their target."""
    forward, backward = cell.forward, cell.backward
    place = place[cell.node_id]
    target = torch.arange(forward.num_rows).repeat_interleave(forward.indptr.diff())
    source = forward.indices.long()
    is_fresh = place[source] <= place[target]
    node = torch.arange(backward.num_rows).repeat_interleave(backward.indptr.diff())
    reader = backward.indices.long()
    was_fresh = place[node] <= place[reader]
    crossing = torch.where(place[node] == place[reader], 1.0, factor)
    return _Split(
        _some(forward, is_fresh),
        _some(forward, ~is_fresh),
        _some(backward, was_fresh, crossing),
        _some(backward, ~was_fresh),
        None,
    )


def apart(cell: Cell, place: Tensor) -> tuple[Tensor, Tensor, Edges]:
    """What :class:`_Beside` gathers as history.

    Returns:
        The row and the position of the reading chunk of each, and the cell's edges, each with the
        source that is gathered for it.
    """
    edges, place = cell.edges, place[cell.node_id]
    assert edges is not None
    source, target = edges.edge_index
    num_rows, num_places = cell.node_id.numel(), int(place.max()) + 1
    is_late = place[source] > place[target]
    read = source[is_late] * num_places + place[target][is_late]
    pairs, which = read.unique(return_inverse=True)
    index = edges.edge_index.clone()
    index[0] += (place[source] < place[target]) * num_rows
    index[0, is_late] = which + 2 * num_rows
    num_sources = 2 * num_rows + pairs.numel()
    order = EdgeOrder(index, num_sources=num_sources, num_targets=num_rows)
    edges = edges._replace(edge_index=index, order=order)
    return pairs // num_places, pairs % num_places, edges


def _some(block: RowBlock, mask: Tensor, factor: Tensor | None = None) -> RowBlock:
    count = torch.cat((torch.zeros(1, dtype=torch.int64), mask.cumsum(0)))
    weight = block.weight
    if factor is not None:
        factor = factor.to(block.row_scale if block.row_scale is not None else block.col_scale)
        weight = factor if weight is None else weight * factor
    return RowBlock(
        count[block.indptr].contiguous(),
        block.indices[mask].contiguous(),
        weight=None if weight is None else weight[mask].contiguous(),
        row_scale=block.row_scale,
        col_scale=block.col_scale,
    )
