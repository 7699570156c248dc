"""Bytes that one rank holds, by purpose, as closed formulas that a planner can ask.

With n own rows, m_in and m_out mirrors, e edges of the way, and b bytes per number::

    tables       b sum over the stage's tables of width (n + m_in  +  n + m_out); the first half
                 of it 2 bytes per number where ``history.dtype`` is set; n more for rows that
                 are kept apart, 2 n where they are predicted, n + m_out for late gradients
    activations  b sum over the stage's layers and chunks of what autograd keeps of the rows;
                 of layers that run again their input, if no table holds it, and carried rows
    records      for each layer and chunk: autograd's nodes, small tensors, objects
    adjacency    row blocks of each operator: 4 e, and scales, offsets and halves per row;
                 G b n for the shares of G strata in what rows read
    features     the first stage's input rows
    parameters   4 b: values, gradients, Adam's two moments; what is made of them for a step
    messages     receives posted ahead, RECEIVES_AHEAD chunks of boundary rows, and the rows sent
                 over the stage's cuts, which are held until the epoch's end
    working      temporaries: of the largest chunk in training, of all rows in an evaluation;
                 with split backwards the sums and gradients of one chunk, of layers by hand

``memory.mode: recompute`` runs a layer again, so its graph of one chunk at a time is working
memory; where no chunk reads another's rows, the gradients' half of the tables is one table's.
``offload`` holds activations on the host, where this formula does not look.

An evaluation needs its temporaries when no activations and messages are held: the larger counts.
All but parameters and records shrink with W, and all but features and adjacency with S. The
formulas count what is in use; what an allocator keeps beyond that is not in them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from gnnpipe.config import Config
from gnnpipe.shapes import LayerShape, gathers, num_parameters

RECEIVES_AHEAD = 6
"""``inbox.RECEIVE_AHEAD``, which needs torch to import."""

RECORD_BYTES = 24 * 1024
"""Of one layer and chunk, whatever the rows; fitted to the peaks of benchmarks/memory.py on
coauthor_cs, as are the next one and what an evaluation has at hand."""

HAND_RECORD_BYTES = 16 * 1024
"""The same of a layer that runs without autograd."""

ENTRY_BYTES = 12
"""Of one stored feature beside its place in slice and chunk: pages of the mapped file, value
after dropout."""

EVALUATION_ENTRY_BYTES = 36
"""Of one stored feature while an evaluation has all rows in one piece: 20 as in a chunk, and 16
while its transposed order is made."""

CHUNK_TEMPORARIES = 4
"""Rows of hidden width that one layer's backward of one chunk has at hand at a time."""

EVALUATION_TEMPORARIES = 5
"""Rows of hidden width that an evaluation has at hand beside the table, all of the way's."""

EVALUATION_CARRIED = 3
"""The same for each carried tensor."""


class WayCounts(NamedTuple):
    """Sizes of one way of a partition."""

    num_rows: int
    in_mirrors: int
    out_mirrors: int
    num_edges: int
    """Edges into the way's rows."""
    is_symmetric: bool
    """Whether outgoing edges share the arrays of the incoming ones."""
    largest_chunk: int
    """Most own rows of one chunk."""
    is_closed: bool = False
    """Whether no chunk reads another's rows, as one chunk on one way does not."""
    num_strata: int = 0
    """Orders of magnitude of the graph's degrees."""


class FeatureCounts(NamedTuple):
    """Sizes of the input features of one way's rows."""

    num_channels: int
    num_entries: int | None
    """Stored entries if sparse, None if dense."""


class Storage(NamedTuple):
    """How a rank holds its numbers."""

    element_bytes: int = 4
    """Of one number."""
    period: int = 1
    """Epochs between snapshots; above 1 tables have a second copy of their values."""
    mode: str = "keep"
    """``memory.mode``."""
    has_half_tables: bool = False
    """Whether a number of a table's values takes two bytes."""
    kept_copies: int = 0
    """Copies of its own rows that a table keeps beside its values, instead of a snapshot."""
    strata: int = 0
    """Most strata whose drift tables know; 0 is none."""
    has_late_gradients: bool = False
    """Whether tables of layers that sum their neighbours keep earlier epochs' gradients too."""
    is_split: bool = False
    """Whether backwards leave the weights' gradients for later."""
    is_corrected: bool = False
    """Whether some epochs compute exact gradients besides, of all chunks at once."""


def storage_of(config: Config) -> Storage:
    """What a configuration asks for."""
    element_bytes = 8 if config.model.dtype == "float64" else 4
    is_half = config.history.dtype is not None
    history = config.history
    kept = history.is_recalled + (history.predict is not None)
    own = Storage(element_bytes, history.period, config.memory.mode, is_half)
    return own._replace(
        kept_copies=kept,
        strata=config.num_strata,
        has_late_gradients=config.late_gradient > 0,
        is_split=config.parallel.schedule == "split_backward",
        is_corrected=history.correct_every is not None,
    )


PLAIN = Storage()


class MemoryBytes(NamedTuple):
    """Bytes of one rank."""

    tables: int
    activations: int
    records: int
    adjacency: int
    features: int
    parameters: int
    messages: int
    working: int

    @property
    def total(self) -> int:
        """All of them: the peak of training and of exact evaluations."""
        return sum(self)


def predict_memory_bytes(
    layers: Sequence[LayerShape],
    *,
    is_first: bool,
    num_cuts: int,
    way: WayCounts,
    features: FeatureCounts,
    num_chunks: int,
    storage: Storage,
) -> MemoryBytes:
    """Memory of one rank at its peak in training.

    Args:
        layers: those of the rank, not of the whole model.
        is_first: whether the rank holds the first stage, and so the features.
        num_cuts: neighbours in the pipeline: 0, 1 or 2.
        way: sizes of the rank's way.
        features: sizes of the way's features.
        num_chunks: chunks.
        storage: how numbers are held.
    """
    element_bytes = storage.element_bytes
    widest = max(max(layer.out_channels, layer.table_channels) for layer in layers)
    row_bytes = widest * element_bytes
    chunk_bytes = way.largest_chunk * row_bytes
    sizes = -(-way.num_rows // num_chunks), -(-way.num_edges // num_chunks)
    again = layers if storage.mode == "recompute" else []
    kept = 0
    if storage.mode != "offload":
        kept = sum(layer.kept_numbers(*sizes) for layer in layers if layer not in again)
    features_of = layers[0] if is_first else None  # which every chunk's input is anyway
    kept += sum(_recipe_numbers(each, sizes[0]) for each in again if each is not features_of)
    kept += sizes[0] * sum({n: layer.in_channels for layer in again for n in layer.reads}.values())
    activations = element_bytes * num_chunks * kept
    num_tensors = 1 + len({name for layer in layers for name in layer.reads})
    ahead = min(RECEIVES_AHEAD, num_chunks) * chunk_bytes
    messages = num_tensors * (ahead + num_cuts * way.num_rows * row_bytes) if num_cuts else 0
    share = way.largest_chunk / max(way.num_rows, 1)
    largest = way.largest_chunk, math.ceil(way.num_edges * share)
    rerun = max((element_bytes * layer.kept_numbers(*largest) for layer in again), default=0)
    training = activations + messages + rerun + CHUNK_TEMPORARIES * chunk_bytes
    if storage.is_split:
        training += element_bytes * left_numbers(layers, way.largest_chunk)
    at_hand = EVALUATION_TEMPORARIES + EVALUATION_CARRIED * (num_tensors - 1)
    evaluation = at_hand * way.num_rows * row_bytes
    if is_first:
        evaluation += EVALUATION_ENTRY_BYTES * (features.num_entries or 0)
    held = sum(layer.step_numbers for layer in layers)
    by_hand = sum(layer.input_lies_in_table for layer in layers)
    records = HAND_RECORD_BYTES * by_hand + RECORD_BYTES * (len(layers) - by_hand)
    reads_history = num_chunks > 1
    has_late = storage.has_late_gradients and reads_history
    copies = 4  # of the weights: they, their gradients, the optimizer's two
    peak = max(training, evaluation)
    if storage.is_corrected and reads_history:
        copies += 2  # what gradients lack, and the pipeline's own
        once = predict_memory_bytes(
            layers,
            is_first=is_first,
            num_cuts=num_cuts,
            way=way._replace(largest_chunk=way.num_rows),
            features=features,
            num_chunks=1,
            storage=storage,
        )
        peak = max(peak, once.activations + once.messages + once.working)
    num_strata = min(way.num_strata, storage.strata) if reads_history else 0
    tables = _table_bytes(layers, way, storage._replace(has_late_gradients=has_late))
    widths = sum(layer.table_channels for layer in layers if layer.operator != "none")
    return MemoryBytes(
        tables=tables + element_bytes * (num_chunks + 3) * num_strata * widths,
        activations=activations,
        records=records * num_chunks,
        adjacency=_adjacency_bytes(layers, way, element_bytes, num_strata=num_strata),
        features=_feature_bytes(way, features, num_chunks, element_bytes) if is_first else 0,
        parameters=element_bytes * (copies * num_parameters(layers) + held),
        messages=messages,
        working=peak - activations - messages,
    )


def left_numbers(layers: Sequence[LayerShape], num_rows: int) -> int:
    """What a split backward of one chunk leaves for the weights: sums, and their gradients."""
    by_hand = [layer for layer in layers if layer.input_lies_in_table]
    return num_rows * sum(layer.table_channels + layer.out_channels for layer in by_hand)


def _recipe_numbers(layer: LayerShape, num_rows: int) -> int:
    """What is kept of one chunk for running a layer again: its input, the halo of a gather.

    Layers whose input lies in the table run by hand, and keep a bit of each number instead.
    """
    halo = layer.table_channels if gathers(layer.operator) else 0
    if layer.input_lies_in_table:
        return num_rows * (halo + layer.out_channels // 32)
    return num_rows * (halo + layer.in_channels)


def _table_bytes(layers: Sequence[LayerShape], way: WayCounts, storage: Storage) -> int:
    """The tables: values, snapshot or kept rows, gradients, earlier epochs' gradients."""
    values, gradients, kept, late, shared = 0, 0, 0, 0, {}
    for layer in layers:
        if layer.operator == "none":
            continue
        is_gather = gathers(layer.operator)
        mirrors = way.in_mirrors if is_gather else way.out_mirrors
        values += (way.num_rows + way.in_mirrors) * layer.table_channels
        numbers = (way.num_rows + mirrors) * layer.table_channels
        kept += storage.kept_copies * way.num_rows * layer.table_channels
        late += storage.has_late_gradients * (not is_gather) * numbers
        if storage.mode == "recompute" and way.is_closed:
            shared[is_gather, layer.table_channels] = numbers
        else:
            gradients += numbers
    copies = 2 if storage.period > 1 and not storage.kept_copies else 1
    value_bytes = copies * (2 if storage.has_half_tables else storage.element_bytes)
    gradients += sum(shared.values())
    return value_bytes * values + storage.element_bytes * (gradients + kept + late)


def _adjacency_bytes(
    layers: Sequence[LayerShape], way: WayCounts, element_bytes: int, *, num_strata: int
) -> int:
    """The way's edges, and row blocks or edge lists of each operator in use."""
    sides = 1 if way.is_symmetric else 2
    rows = way.num_rows
    plain = sides * (8 * rows + 4 * way.num_edges)
    ids = 8 * (2 * rows + way.in_mirrors)  # new and original ids of rows and mirrors
    total = plain + ids
    for operator in {layer.operator for layer in layers} - {"none"}:
        if num_strata:  # strata of all rows, twice; shares of the strata in what a chunk reads
            total += 8 * (rows + way.in_mirrors) + num_strata * element_bytes * rows
        loops = rows if operator in ("gcn", "edges_self", "edges_gcn") else 0
        edges = way.num_edges + loops
        if gathers(operator):
            # edge_index and both original ids, for the chunks and again for the whole way
            total += 2 * 32 * edges + 4 * edges
        else:
            copies = sides if loops else 0  # other operators share the plain arrays
            scales = 2 * (2 * rows + way.in_mirrors + way.out_mirrors) * element_bytes
            halves = 2 * 2 * 8 * rows  # interior or boundary, both directions, chunks and whole
            total += copies * (8 * rows + 4 * edges) + scales + halves
    return total


def _feature_bytes(
    way: WayCounts, features: FeatureCounts, num_chunks: int, element_bytes: int
) -> int:
    """The way's slice, and the chunks' tensors made of it, which are its own rows in float32."""
    if features.num_entries is None:
        per_value = 4 if element_bytes == 4 else 4 + element_bytes
        return way.num_rows * features.num_channels * per_value
    entries, columns = features.num_entries, features.num_channels
    slice_bytes = 8 * entries + 4 * way.num_rows
    # value and index, and the transposed order: row and position; dropped-out values beside
    chunk_bytes = (2 * element_bytes + 4 + 4 + 8) * entries
    chunk_bytes += ENTRY_BYTES * entries
    return slice_bytes + chunk_bytes + 8 * num_chunks * columns + 8 * way.num_rows
