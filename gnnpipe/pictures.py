"""Pictures of a run, drawn from arrays: the measured timeline, chunks, drift."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gnnpipe.recorder import ACTION, ACTION_KINDS, EXACT, MESSAGE_KINDS, STEP, WAIT, Array
from gnnpipe.schedule import Timeline as Predicted
from gnnpipe.timeline import Timeline

DOTS_PER_INCH = 100
ACTION_NAMES = {"forward": "F", "backward": "BI", "weight gradients": "G"}
"""Kinds of actions by what a picture calls them."""
COLOURS = {
    "forward": "#4878a8",
    "backward": "#e08840",
    "weight gradients": "#f0c080",
    "exact gradient": "#a070b0",
    "step": "#50a060",
    "waiting": "#dcdcdc",
}
_WHAT, _KIND, _START_S, _END_S = 0, 1, 5, 6


def png(figure: Figure) -> tuple[bytes, tuple[int, int]]:
    """A figure as a PNG file, with its width and height in pixels."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    width, height = (round(inches * DOTS_PER_INCH) for inches in figure.get_size_inches())
    return file.getvalue(), (width, height)


def timeline_figure(timeline: Timeline) -> Figure:
    """What every rank did in one measured epoch: actions, and the waits inside them."""
    figure, axes = _figure(11, 1.4 + 0.35 * len(timeline.ranks))
    starts_s = [events[:, _START_S].min() for events in timeline.ranks if len(events)]
    zero_s = min(starts_s, default=0.0)
    idle, longest_s = 0.0, 0.0
    for rank, events in enumerate(timeline.ranks):
        for name, chosen in _kinds(events):
            bars = chosen[:, [_START_S, _END_S]]
            spans = np.column_stack((bars[:, 0] - zero_s, bars[:, 1] - bars[:, 0])) * 1e3
            _bars(axes, rank, spans, name)
            idle += spans[:, 1].sum() / 1e3 if name == "waiting" else 0.0
        longest_s = max(longest_s, float(events[:, _END_S].max(initial=zero_s)) - zero_s)
    share = idle / (longest_s * len(timeline.ranks)) if longest_s else 0.0
    title = f"epoch {timeline.epoch}, measured: {_milliseconds(longest_s)}, {share:.0%} waiting"
    return _finish_timeline(figure, axes, len(timeline.ranks), title)


def predicted_figure(timeline: Predicted) -> Figure:
    """What every rank would do in an epoch, as the planner simulates it."""
    figure, axes = _figure(11, 1.4 + 0.35 * len(timeline.ranks))
    for rank, spans in enumerate(timeline.ranks):
        for name, kinds in ACTION_NAMES.items():
            chosen = [span for span in spans if span.action.kind in kinds]
            bars = [(span.start_s * 1e3, (span.end_s - span.start_s) * 1e3) for span in chosen]
            _bars(axes, rank, np.array(bars).reshape(-1, 2), name)
    bubble = f"bubble {timeline.bubble_fraction:.3f}"
    title = f"predicted: {_milliseconds(timeline.makespan_s)}, {bubble}"
    return _finish_timeline(figure, axes, len(timeline.ranks), title)


def dependency_figure(reads: Array) -> Figure:
    """Which chunk reads which: edges by chunk of target and source, ``[C, C]``."""
    figure, axes = _figure(6.2, 5.2)
    total = reads.sum()
    inside = reads.trace() / total if total else 1.0
    shares = reads / np.maximum(reads.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the reader's edges")
    axes.set(xlabel="read chunk", ylabel="reading chunk")
    axes.set_title(f"{inside:.0%} of all edges stay inside their chunk")
    return figure


def sizes_figure(nodes: Array, edges: Array) -> Figure:
    """Nodes and edges of each chunk, relative to the mean, ``[C]`` each."""
    figure, axes = _figure(8, 3.2)
    chunks = np.arange(len(nodes))
    for shift, name, counts in ((-0.2, "nodes", nodes), (0.2, "edges", edges)):
        mean = max(float(counts.mean()), 1e-9)
        axes.bar(chunks + shift, counts / mean, 0.4, label=f"{name} (mean {mean:,.0f})")
    axes.axhline(1.0, color="grey", lw=0.8)
    axes.set(xlabel="chunk", ylabel="times the mean")
    axes.legend(loc="lower right")
    return figure


def drift_figure(epochs: Sequence[int], drift: Array) -> Figure:
    """Relative drift of every layer's history over the epochs, ``drift [epochs, layers]``."""
    figure, axes = _figure(8, 4)
    image = axes.imshow(drift.T, aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="|fresh - historical| / |fresh|")
    places = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), 8)).round().astype(int))
    axes.set_xticks(places, [str(epochs[place]) for place in places])
    axes.set(xlabel="epoch", ylabel="layer that reads neighbours")
    axes.set_title("how far the history is from the values it stands for")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="tight")
    return figure, figure.subplots()


def _kinds(events: Array) -> list[tuple[str, Any]]:
    """The events by what a picture shows them as; waits last, so that they lie on top."""
    what, kind = events[:, _WHAT], events[:, _KIND]
    is_message = kind < MESSAGE_KINDS.index("ranks")
    return [
        *(
            (name, events[(what == ACTION) & np.isin(kind, _numbers(kinds))])
            for name, kinds in ACTION_NAMES.items()
        ),
        ("exact gradient", events[what == EXACT]),
        ("step", events[what == STEP]),
        ("waiting", events[(what == WAIT) & is_message]),
    ]


def _numbers(kinds: str) -> list[int]:
    return [ACTION_KINDS.index(kind) for kind in kinds]


def _bars(axes: Axes, rank: int, spans: Array, name: str) -> None:
    """Bars of one rank, ``spans [n, 2]``: start and length in milliseconds."""
    if not len(spans):
        return
    axes.broken_barh(
        [tuple(span) for span in spans.tolist()],
        (rank - 0.4, 0.8),
        facecolors=COLOURS[name],
        label=name,
        edgecolor="white",
        linewidth=0.2,
    )


def _finish_timeline(figure: Figure, axes: Axes, num_ranks: int, title: str) -> Figure:
    handles, names = axes.get_legend_handles_labels()
    shown = {name: handle for handle, name in zip(handles, names, strict=True)}  # one of all ranks
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=title)
    axes.legend(shown.values(), shown, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2g} ms"
