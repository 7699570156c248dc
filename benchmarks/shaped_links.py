"""Network namespaces joined by links of a chosen speed, made and removed by root.

Each rank has a namespace of its own with one interface, ``eth0``. All are ports of one bridge::

    rank 0 [eth0] --- tbf --- [bridge] --- tbf --- [eth0] rank 1

``tc``'s token bucket limits what leaves each end, so both directions of a rank have the speed.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

HUB = "gnnpipe-hub"


def why_not() -> str | None:
    """Why links cannot be shaped here, or None."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install iproute2"
    if os.geteuid() != 0:
        return "only root can make network namespaces; run as root"
    return None


@contextmanager
def shaped_links(num_ranks: int, mbit: float) -> Iterator[list[str]]:
    """Names of one namespace per rank; gone afterwards.

    Args:
        num_ranks: namespaces.
        mbit: speed of each link and direction, Mbit/s.
    """
    names = [f"gnnpipe-r{rank}" for rank in range(num_ranks)]
    _remove([HUB, *names])
    try:
        _ip("netns", "add", HUB)
        _ip("-n", HUB, "link", "add", "hub", "type", "bridge")
        _ip("-n", HUB, "link", "set", "hub", "up")
        for rank, name in enumerate(names):
            _join(rank, name, mbit)
        yield names
    finally:
        _remove([HUB, *names])


def inside(namespace: str, command: list[str]) -> list[str]:
    """The command that runs ``command`` in a namespace."""
    return ["ip", "netns", "exec", namespace, *command]


def _join(rank: int, name: str, mbit: float) -> None:
    """Makes one namespace and ties it to the bridge."""
    port = f"port{rank}"
    _ip("netns", "add", name)
    pair = ["link", "add", "eth0", "netns", name, "type", "veth"]
    _ip(*pair, "peer", "name", port, "netns", HUB)
    _ip("-n", name, "addr", "add", f"10.213.0.{rank + 1}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", name, "link", "set", device, "up")
    _ip("-n", HUB, "link", "set", port, "master", "hub", "up")
    for namespace, device in ((name, "eth0"), (HUB, port)):
        # 2 ms of traffic may leave at once; 100 ms may queue.
        burst = max(32_000, int(mbit * 1e6 / 8 * 0.002))
        limits = ["rate", f"{mbit}mbit", "burst", str(burst), "latency", "100ms"]
        tbf = ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limits]
        subprocess.run(tbf, check=True)


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
