"""``python -m gnnpipe plan``: profile, predict, choose, show, write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gnnpipe.config import Config, to_yaml
from gnnpipe.configured import model_layers
from gnnpipe.console import working
from gnnpipe.costs import Links, Profile, load_profile, save_profile
from gnnpipe.errors import UserError
from gnnpipe.memory import storage_of
from gnnpipe.metrics import json_text
from gnnpipe.pictures import predicted_figure
from gnnpipe.plan_request import PlanRequest
from gnnpipe.planner import Planner
from gnnpipe.planning import (
    CHUNKS,
    GPU,
    SHAPES,
    applied,
    assumed_layers,
    assumed_shape,
    predict_all,
    profile_of,
    shape_of,
)
from gnnpipe.room import PROCESS_BYTES, by_purpose, free_bytes, size_text
from gnnpipe.schedule import draw
from gnnpipe.setting import Prediction, choose, reason
from gnnpipe.trainer import load_data

SHOWN = 12
MOST_DRAWN = 16
COLUMNS = {
    "S": 4,
    "W": 4,
    "C": 4,
    "v": 2,
    "schedule": 14,
    "epoch ms": 11,
    "bubble": 7,
    "sent MB": 11,
    "memory MB": 11,
}
"""Of the table, with their widths where it is plain text."""


def run_plan(config: Config, request: PlanRequest) -> str:
    """Plans as asked; returns what to print."""
    links = Links(
        request.bandwidth_gbps,
        request.latency_us,
        request.local_gbps,
        request.ranks // request.hosts,
    )
    planner, profile, num_layers, num_nodes = _planner(config, request, links)
    chunks = request.chunks or (*CHUNKS, config.partition.num_chunks)
    with working("predicting settings"):
        predictions = predict_all(
            planner, request.ranks, chunks=chunks, num_layers=num_layers, num_nodes=num_nodes
        )
    limit = None if request.memory_gb is None else request.memory_gb * 1e9
    best = choose(predictions, memory_bytes=limit)
    if request.picture is not None:
        predicted_figure(best.timeline).savefig(request.picture)
    if request.write is not None:
        written = applied(config, best.setting, best.sizes)
        Path(request.write).write_text(to_yaml(written), encoding="utf-8")
    if request.is_json:
        figures = {"best": _figures(best), "why": reason(best, predictions)}
        return json_text(figures | {"settings": [_figures(p) for p in predictions]})
    words = (
        f"costs: {profile.note}; links: {links.bandwidth_gbps:g} Gbit/s, {links.latency_us:g} us",
        _table(predictions, best, Console()),
        _picture(best),
        _verdict(best, predictions),
        memory_line(best, request),
    )
    return "\n".join(words)


def _table(predictions: Sequence[Prediction], best: Prediction, console: Console) -> str:
    """The quickest settings, the chosen one and one rank: in colour on a terminal."""
    alone = next(p for p in predictions if p.setting.num_ranks == 1)
    quickest = predictions[:SHOWN]
    rest = [p for p in predictions[SHOWN:] if p is best or p is alone]
    rows = [("*" if p is best else " ", _cells(p)) for p in (*quickest, *rest)]
    foot = f"... of {len(predictions)} settings"
    if not console.is_terminal:
        lines = [mark + _plain(row) for mark, row in [(" ", tuple(COLUMNS)), *rows]]
        return "\n".join([*lines, foot, ""])
    table = Table("", caption=foot, caption_justify="left", header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for mark, row in rows:
        table.add_row(mark, *row, style="bold green" if mark == "*" else None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _plain(cells: tuple[str, ...]) -> str:
    return " ".join(
        f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)
    )


def _cells(prediction: Prediction) -> tuple[str, ...]:
    return (
        *(str(part) for part in prediction.setting),
        f"{prediction.epoch_s * 1e3:.4g}",
        f"{prediction.bubble_fraction:.3f}",
        f"{sum(prediction.comm_bytes.values()) / 1e6:.4g}",
        f"{prediction.memory_bytes / 1e6:.4g}",
    )


def _picture(best: Prediction) -> str:
    """The timeline of the chosen setting, with an empty line after it."""
    S = best.setting.num_stages
    if S > MOST_DRAWN:
        return f"({S} stages are too many to draw)\n"
    return draw(best.timeline, slot_s=best.timeline.makespan_s / 24 or 1.0) + "\n"


def _verdict(best: Prediction, predictions: Sequence[Prediction]) -> str:
    S, W, C, v, schedule = best.setting
    why = reason(best, predictions)
    return f"* {S} stage(s) x {W} way(s), {C} chunk(s), {v} virtual, {schedule}: {why}"


def memory_line(best: Prediction, request: PlanRequest) -> str:
    """What the fullest rank needs, by purpose, and whether this host has it for its ranks."""
    here = best.setting.num_ranks // min(request.hosts, best.setting.num_ranks)
    need = best.memory.total + PROCESS_BYTES
    room = "" if request.shape is not None else f"; {_room_here(here, need)}"
    return f"memory of the fullest rank: {by_purpose(best.memory)}{room}"


def _room_here(num_ranks: int, need: int) -> str:
    free = free_bytes()
    if num_ranks * need <= free:
        return f"this host has {size_text(free)}, enough for {num_ranks} rank(s)"
    return f"this host has {size_text(free)}, TOO LITTLE for {num_ranks} rank(s); see --memory-gb"


def _planner(
    config: Config, request: PlanRequest, links: Links
) -> tuple[Planner, Profile, int, int]:
    sizes: dict[str, Any] = {
        "links": links,
        "storage": storage_of(config),
        "steps": config.training.steps_per_epoch,
    }
    given = None if request.profile is None else load_profile(request.profile)
    if request.shape is not None:
        if request.shape not in SHAPES:
            raise UserError(
                f"`--shape` (={request.shape}) must be one of {', '.join(SHAPES)}; or name a data"
                " set by data.name"
            )
        counts, profile = SHAPES[request.shape], given or GPU
        layers = assumed_layers(config, counts)
        planner = Planner(layers, assumed_shape(counts), profile=profile, **sizes)
        return planner, profile, len(layers), counts.num_nodes
    graph = load_data(config)
    with working("measuring a few layers"):
        profile = given or profile_of(graph, config)
    if request.save_profile is not None:
        save_profile(profile, request.save_profile)
    layers = model_layers(config, graph)
    planner = Planner(layers, shape_of(graph), profile=profile, **sizes)
    return planner, profile, len(layers), graph.num_nodes


def _figures(prediction: Prediction) -> dict[str, Any]:
    return {
        **prediction.setting._asdict(),
        "layers_per_stage": prediction.sizes,
        "epoch_s": prediction.epoch_s,
        "bubble_fraction": prediction.bubble_fraction,
        "comm_bytes": prediction.comm_bytes,
        "memory_bytes": prediction.memory_bytes,
        "memory": prediction.memory._asdict(),
    }
