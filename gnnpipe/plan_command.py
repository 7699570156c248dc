"""``python -m gnnpipe plan``: profile, predict, choose, show, write."""

from pathlib import Path
from typing import Any

from gnnpipe.config import Config, to_yaml
from gnnpipe.configured import model_layers
from gnnpipe.costs import Links, Profile, load_profile, save_profile
from gnnpipe.errors import UserError
from gnnpipe.metrics import json_text
from gnnpipe.pictures import predicted_figure
from gnnpipe.plan_request import PlanRequest
from gnnpipe.planner import Planner, Prediction, choose, reason
from gnnpipe.planning import (
    CHUNKS,
    GPU,
    SHAPES,
    applied,
    assumed_layers,
    assumed_shape,
    predict_all,
    profile_of,
    report,
    shape_of,
)
from gnnpipe.room import PROCESS_BYTES, by_purpose, free_bytes, size_text
from gnnpipe.trainer import load_data


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
    predictions = predict_all(
        planner, request.ranks, chunks=chunks, num_layers=num_layers, num_nodes=num_nodes
    )
    limit = None if request.memory_gb is None else request.memory_gb * 1e9
    best = choose(predictions, memory_bytes=limit)
    if request.picture is not None:
        predicted_figure(best.timeline).savefig(request.picture)
    if request.write is not None:
        Path(request.write).write_text(to_yaml(applied(config, best.setting)), encoding="utf-8")
    if request.is_json:
        figures = {"best": _figures(best), "why": reason(best, predictions)}
        return json_text(figures | {"settings": [_figures(p) for p in predictions]})
    table = report(predictions, best, links, profile.note)
    return f"{table}\n{memory_line(best, request)}"


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
        "element_bytes": 8 if config.model.dtype == "float64" else 4,
        "period": config.history.period,
        "steps": config.training.steps_per_epoch,
        "recalled": config.history.is_recalled,
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
