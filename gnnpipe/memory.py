"""Bytes that one rank holds, by purpose, as closed formulas that a planner can ask.

With n own rows, m_in and m_out mirrors, e edges of the way, and b bytes per number::

    tables       b sum over the stage's tables of width (n + m_in  +  n + m_out)
    activations  b sum over the stage's layers and chunks of what autograd keeps of the rows
    records      RECORD_BYTES for each layer and chunk: autograd's nodes, small tensors, objects
    adjacency    row blocks of each operator: 4 e, and scales, offsets and halves per row
    features     the first stage's input rows
    parameters   4 b: values, gradients, Adam's two moments
    messages     receives posted ahead, RECEIVES_AHEAD chunks of boundary rows, and the rows sent
                 over the stage's cuts, which are held until the epoch's end
    working      temporaries: of the largest chunk in training, of all rows in an evaluation

An evaluation needs its temporaries when no activations and messages are held: the larger counts.
All but parameters and records shrink with W, and all but features and adjacency with S. The
formulas count what is in use; what an allocator keeps beyond that is not in them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from gnnpipe.shapes import LayerShape, num_parameters

RECEIVES_AHEAD = 6
"""``inbox.RECEIVE_AHEAD``, which needs torch to import."""

RECORD_BYTES = 48 * 1024
"""Of one layer and chunk, whatever the rows; fitted to the peaks of benchmarks/memory.py."""

ENTRY_BYTES = 48
"""Of one stored feature beside its place in slice and chunk: pages of the mapped file, values
after dropout, an evaluation's copy; fitted to the same peaks."""

CHUNK_TEMPORARIES = 4
"""Rows of hidden width that one layer's backward of one chunk has at hand at a time."""

EVALUATION_TEMPORARIES = 6
"""Rows of hidden width that an evaluation has at hand beside the table, all of the way's."""


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


class FeatureCounts(NamedTuple):
    """Sizes of the input features of one way's rows."""

    num_channels: int
    num_entries: int | None
    """Stored entries if sparse, None if dense."""


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
    period: int,
    element_bytes: int,
) -> MemoryBytes:
    """Memory of one rank at its peak in training.

    Args:
        layers: those of the rank, not of the whole model.
        is_first: whether the rank holds the first stage, and so the features.
        num_cuts: neighbours in the pipeline: 0, 1 or 2.
        way: sizes of the rank's way.
        features: sizes of the way's features.
        num_chunks: chunks.
        period: epochs between snapshots; above 1 tables have a second copy of their values.
        element_bytes: bytes of one number.
    """
    widest = max(max(layer.out_channels, layer.table_channels) for layer in layers)
    row_bytes = widest * element_bytes
    chunk_bytes = way.largest_chunk * row_bytes
    sizes = -(-way.num_rows // num_chunks), -(-way.num_edges // num_chunks)
    kept = num_chunks * sum(layer.kept_numbers(*sizes) for layer in layers)
    activations = element_bytes * kept
    num_tensors = 1 + len({name for layer in layers for name in layer.reads})
    ahead = min(RECEIVES_AHEAD, num_chunks) * chunk_bytes
    messages = num_tensors * (ahead + num_cuts * way.num_rows * row_bytes) if num_cuts else 0
    training = activations + messages + CHUNK_TEMPORARIES * chunk_bytes
    evaluation = EVALUATION_TEMPORARIES * way.num_rows * row_bytes
    return MemoryBytes(
        tables=element_bytes * sum(_table_numbers(layer, way, period) for layer in layers),
        activations=activations,
        records=RECORD_BYTES * len(layers) * num_chunks,
        adjacency=_adjacency_bytes(layers, way, element_bytes),
        features=_feature_bytes(way, features, num_chunks, element_bytes) if is_first else 0,
        parameters=4 * element_bytes * num_parameters(layers),
        messages=messages,
        working=max(training, evaluation) - activations - messages,
    )


def _table_numbers(layer: LayerShape, way: WayCounts, period: int) -> int:
    """Numbers in one layer's table: values, gradients, snapshot."""
    if layer.operator == "none":
        return 0
    is_gather = layer.operator.startswith("edges")
    num_values = way.num_rows + way.in_mirrors
    num_gradients = way.num_rows + (way.in_mirrors if is_gather else way.out_mirrors)
    copies = 2 if period > 1 else 1
    return (copies * num_values + num_gradients) * layer.table_channels


def _adjacency_bytes(layers: Sequence[LayerShape], way: WayCounts, element_bytes: int) -> int:
    """The way's edges, and row blocks or edge lists of each operator in use."""
    sides = 1 if way.is_symmetric else 2
    rows = way.num_rows
    plain = sides * (8 * rows + 4 * way.num_edges)
    ids = 8 * (2 * rows + way.in_mirrors)  # new and original ids of rows and mirrors
    total = plain + ids
    for operator in {layer.operator for layer in layers} - {"none"}:
        loops = rows if operator in ("gcn", "edges_self", "edges_gcn") else 0
        edges = way.num_edges + loops
        if operator.startswith("edges"):
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
    """The way's slice, and the chunks' tensors made of it."""
    if features.num_entries is None:
        return way.num_rows * features.num_channels * (4 + element_bytes)
    entries, columns = features.num_entries, features.num_channels
    slice_bytes = 8 * entries + 4 * way.num_rows
    # value and index, and the transposed order: row and position; dropped-out values beside
    chunk_bytes = (2 * element_bytes + 4 + 4 + 8) * entries
    chunk_bytes += ENTRY_BYTES * entries
    return slice_bytes + chunk_bytes + 8 * num_chunks * columns + 8 * way.num_rows
