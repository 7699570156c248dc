"""Bytes that one training epoch sends, by kind, as closed formulas.

The counters of ``comm`` add up what is handed to the network; these formulas say what they must
find, from the list of layers and a few counts of the partition. With N nodes, b bytes per number,
and M mirror rows over all ways::

    boundary   2 N b  sum over cuts of the width of the rows that cross
    carried    N b    sum over cuts of the widths that cross on the way to a later layer
               N b    sum over cuts of those that the rank behind has not had in an earlier stage
    halo       b (M_in + M_out)  sum over aggregating layers of the table's width
               2 b M_in          sum over gathering layers of it
               b M_in            once more where kept rows are put back at an epoch's start
               16 (W - 1) C (4 H + 1)  for each norm of width H over all nodes: sums of a chunk
               2 b (W - 1) C G  sum of the tables' widths, for drift and for debts of G strata
               each, and where kept rows are put back; with one chunk none
    gradient   2 (W - 1) b  sum of parameters, as a ring moves them, for each optimizer step

Depth does not enter the first two, the number of chunks only norms over all nodes and strata.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gnnpipe.shapes import LayerShape, gathers, num_parameters

SUM_BYTES = 8
"""Of one number in the sums of a norm."""


class Crossing(NamedTuple):
    """Numbers per node that cross the cut in front of a stage."""

    boundary: int
    """In each direction."""
    carried_forward: int
    carried_backward: int


class MirrorCounts(NamedTuple):
    """Rows that ways mirror of each other, summed over the ways."""

    incoming: int
    """Distinct (way, source) pairs of edges that cross ways."""
    outgoing: int
    """Distinct (way, target) pairs; equal on undirected graphs."""


def predict_comm_bytes(
    layers: Sequence[LayerShape],
    *,
    bounds: Sequence[int],
    num_stages: int,
    num_nodes: int,
    num_ways: int,
    mirrors: MirrorCounts,
    element_bytes: int,
    steps: int = 1,
    recalled: bool = False,
    num_chunks: int = 1,
    num_strata: int = 0,
    sums_of_strata: int = 2,
) -> dict[str, int]:
    """Bytes of one epoch over all ranks, by kind.

    Args:
        layers: the whole model.
        bounds: first layer of each stage, virtual ones included, and the number of layers.
        num_stages: pipeline ranks, among which the stages are dealt in turn.
        num_nodes: nodes of the graph.
        num_ways: ways per stage.
        mirrors: of these ways.
        element_bytes: bytes of one number.
        steps: optimizer steps of the epoch, all with training nodes; a step without any has no
            backward.
        recalled: whether histories are kept apart from the tables.
        num_chunks: chunks.
        num_strata: whose mean drift moves historical rows; 0 where they are left as they are.
        sums_of_strata: how often the strata of a chunk are summed over the ways: 2, and 1 more
            where tables start an epoch with kept rows.
    """
    cuts = crossings(layers, bounds=bounds, num_stages=num_stages)
    tables = [layer for layer in layers if layer.operator != "none"]
    halo_rows = sum(
        layer.table_channels
        * (_rows_per_layer(layer.operator, mirrors) + recalled * mirrors.incoming)
        for layer in tables
    )
    values = {
        "boundary": 2 * num_nodes * sum(cut.boundary for cut in cuts),
        "carried": num_nodes * sum(cut.carried_forward + cut.carried_backward for cut in cuts),
        "halo": halo_rows,
        "gradient": 2 * (num_ways - 1) * num_parameters(layers) * steps,
    }
    found = {kind: count * element_bytes for kind, count in values.items()}
    # Rows, sums and squares forward, two gradients backward; float64 whatever the model.
    sums = sum(4 * layer.norm_channels + 1 for layer in layers if layer.norm_channels)
    found["halo"] += 2 * (num_ways - 1) * num_chunks * SUM_BYTES * sums
    if num_chunks > 1:
        numbers = sums_of_strata * num_strata * sum(layer.table_channels for layer in tables)
        found["halo"] += 2 * (num_ways - 1) * num_chunks * element_bytes * numbers
    return found


def crossings(
    layers: Sequence[LayerShape], *, bounds: Sequence[int], num_stages: int
) -> list[Crossing]:
    """What crosses in front of each stage but the first; nothing where one rank has them all.

    A carried tensor goes to every rank once: after ``num_stages`` cuts it is where it has been.
    """
    if num_stages == 1:
        return []
    found = []
    for stage in range(1, len(bounds) - 1):
        widths = {True: 0, False: 0}
        for writer, width in _carried_over(layers, bounds[stage]):
            home = next(s for s in range(stage) if writer < bounds[s + 1])
            widths[stage - home < num_stages] += width
        boundary = layers[bounds[stage] - 1].out_channels
        found.append(Crossing(boundary, widths[True], sum(widths.values())))
    return found


def _rows_per_layer(operator: str, mirrors: MirrorCounts) -> int:
    """Mirror rows that travel in one layer: to the readers, and their gradients."""
    if gathers(operator):
        return 2 * mirrors.incoming
    return mirrors.incoming + mirrors.outgoing


def _carried_over(layers: Sequence[LayerShape], cut: int) -> Iterator[tuple[int, int]]:
    """Last writer and width of each tensor that is written before a cut and read behind it."""
    wanted = {name for layer in layers[cut:] for name in layer.reads}
    for name in sorted(wanted):
        writers = [index for index, layer in enumerate(layers[:cut]) if name in layer.writes]
        if writers:
            yield writers[-1], layers[writers[-1]].carried_channels(name)
