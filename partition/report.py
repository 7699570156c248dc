"""A partition's figures for a person: a table and one line that judges them."""

from collections.abc import Sequence

from partition.quality import Quality

MAX_ROWS = 32
"""Chunks shown one by one; the summary above them covers the rest."""

GOOD_CUT = 0.3
LARGE_CUT = 0.6
"""Shares of cut edges: up to the first few reads are historical, beyond the second most are."""

UNEVEN = 1.2
"""Imbalance from which waiting for the largest chunk or way is worth a word."""

LARGE_REPLICATION = 2.0
"""Rows kept or sent per own row from which ways spend their time on mirrors."""


def verdict(figures: Quality) -> str:
    """Judges a partition in one line."""
    cut = figures.edge_cut_fraction
    words = [f"cut {cut:.0%} of edges: {_judge_cut(cut)}"]
    if figures.work_imbalance > UNEVEN:
        words.append(
            f"work is uneven: stages wait for a chunk of {figures.work_imbalance:.2f}x the mean"
        )
    if figures.num_ways > 1 and figures.cell_work_imbalance > UNEVEN:
        words.append(
            f"ways are uneven: {figures.cell_work_imbalance:.2f}x the time of equal cells"
        )
    if figures.num_ways > 1 and figures.way_replication_factor > LARGE_REPLICATION:
        words.append(
            f"halo of the ways is large: {figures.way_replication_factor:.2f} rows per node"
        )
    return "; ".join(words)


def _judge_cut(cut: float) -> str:
    if cut <= GOOD_CUT:
        return "good for pipelining"
    if cut <= LARGE_CUT:
        return "fair for pipelining, watch the staleness"
    return "halo is large, most reads cross chunks; fewer chunks or method metis cut less"


def table(figures: Quality) -> str:
    """Draws the figures as text, ending in the verdict."""
    lines = _summary(figures)
    lines += ["", *_chunk_rows(figures)]
    if figures.num_ways > 1:
        lines += ["", *_way_rows(figures)]
    return "\n".join([*lines, "", f"verdict: {verdict(figures)}"])


def _summary(figures: Quality) -> list[str]:
    """Whole-graph figures, one to a line."""
    rows = [
        ("nodes", f"{figures.num_nodes}"),
        ("edges (directed)", f"{figures.num_edges}"),
        ("chunks x ways", f"{figures.num_chunks} x {figures.num_ways}"),
        ("edge cut", f"{figures.edge_cut_fraction:.1%}"),
        (
            "imbalance (max/mean)",
            f"nodes {figures.node_imbalance:.3f}, edges {figures.edge_imbalance:.3f}, "
            f"work {figures.work_imbalance:.3f}",
        ),
        ("replication factor", f"{figures.replication_factor:.3f}"),
    ]
    if figures.num_ways > 1:
        rows += [
            ("edge cut of ways", f"{figures.way_cut_fraction:.1%}"),
            (
                "imbalance of ways",
                f"epoch {figures.way_work_imbalance:.3f}, "
                f"chunk by chunk {figures.cell_work_imbalance:.3f}",
            ),
            ("replication of ways", f"{figures.way_replication_factor:.3f}"),
        ]
    return [f"{name:<22}{value}" for name, value in rows]


def _chunk_rows(figures: Quality) -> list[str]:
    """One line per chunk, the first ``MAX_ROWS`` of them."""
    header = ["chunk", "nodes", "edges", "halo", "halo/nodes"]
    if figures.num_ways > 1:
        header.append("  nodes by way")
    lines = [_line(header)]
    for chunk in range(min(figures.num_chunks, MAX_ROWS)):
        nodes, halo = figures.chunk_nodes[chunk], figures.chunk_halo[chunk]
        ratio = f"{halo / nodes:.2f}" if nodes else "-"
        row = [str(chunk), str(nodes), str(figures.chunk_edges[chunk]), str(halo), ratio]
        if figures.num_ways > 1:
            row.append("  " + " ".join(str(count) for count in figures.cell_nodes[chunk]))
        lines.append(_line(row))
    if figures.num_chunks > MAX_ROWS:
        lines.append(f"... {figures.num_chunks - MAX_ROWS} more chunks: --json lists them all")
    return lines


def _way_rows(figures: Quality) -> list[str]:
    """Mirrors by pair of ways."""
    ways = range(figures.num_ways)
    lines = ["mirrors: row way reads nodes of column way"]
    lines.append(_line(["way", *(str(way) for way in ways)]))
    lines += [_line([str(way), *(str(n) for n in figures.way_halo[way])]) for way in ways]
    return lines


def _line(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>12}" if index else f"{cell:>5}" for index, cell in enumerate(cells))
