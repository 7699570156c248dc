"""What ``python -m gnnpipe plan`` was asked, checked before anything heavy loads."""

import argparse
import os
from typing import NamedTuple

from gnnpipe.config import Config
from gnnpipe.errors import UserError


class PlanRequest(NamedTuple):
    """The options of the command."""

    ranks: int
    hosts: int
    bandwidth_gbps: float
    local_gbps: float
    latency_us: float
    memory_gb: float | None
    chunks: tuple[int, ...] | None
    """Numbers of chunks to try; None for the usual ones."""
    shape: str | None
    profile: str | None
    save_profile: str | None
    write: str | None
    picture: str | None
    is_json: bool


def plan_request(options: argparse.Namespace, config: Config) -> PlanRequest:
    """Checks the options.

    Raises:
        UserError: a number that cannot be, or a file that is not there.
    """
    ranks = config.world_size if options.ranks is None else options.ranks
    local_gbps = options.bandwidth_gbps if options.local_gbps is None else options.local_gbps
    for name, value in (("ranks", ranks), ("hosts", options.hosts)):
        if value < 1:
            raise UserError(f"`--{name}` (={value}) must be at least 1; ask for one or more")
    if ranks % options.hosts:
        raise UserError(
            f"`--hosts` (={options.hosts}) must divide `--ranks` (={ranks}); change either"
        )
    positive = {
        "bandwidth-gbps": options.bandwidth_gbps,
        "local-gbps": local_gbps,
        "memory-gb": 1.0 if options.memory_gb is None else options.memory_gb,
    }
    for name, value in positive.items():
        if not value > 0:
            raise UserError(f"`--{name}` (={value:g}) must be above 0; give what the machine has")
    if not options.latency_us >= 0:
        raise UserError(f"`--latency-us` (={options.latency_us:g}) must be at least 0; 50 is fair")
    if options.profile is not None and not os.path.isfile(options.profile):
        raise UserError(f"`--profile` (={options.profile}) must be a file that exists; check it")
    return PlanRequest(
        ranks,
        options.hosts,
        options.bandwidth_gbps,
        local_gbps,
        options.latency_us,
        options.memory_gb,
        _chunks(options.chunks),
        options.shape,
        options.profile,
        options.save_profile,
        options.write,
        options.picture,
        options.json,
    )


def _chunks(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"`--chunks` (={text}) must be numbers of at least 1; such as 8,16,32")
    return tuple(int(part) for part in parts)
