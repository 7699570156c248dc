"""Network namespaces joined by links of a chosen speed, made and removed by root.

Each rank has a namespace of its own with one interface, ``eth0``. All are ports of one bridge::

    rank 0 [eth0] --- tbf --- [bridge] --- tbf --- [eth0] rank 1

``tc``'s token bucket limits what leaves each end, so both directions of a rank have the speed,
which is that of payload: the headers of full TCP segments come on top. Queues hold all that
senders can have under way, so nothing is lost and sent again.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

HEADERS = 1514 / 1448
"""Bytes on the wire for each byte of payload."""

QUEUE_BYTES = 64_000_000


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
    hub = f"gnnpipe-{os.getpid()}-hub"
    names = [f"gnnpipe-{os.getpid()}-r{rank}" for rank in range(num_ranks)]
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "hub", "type", "bridge")
        _ip("-n", hub, "link", "set", "hub", "up")
        for rank, name in enumerate(names):
            _join(hub, rank, name, mbit)
        yield names
    finally:
        _remove([hub, *names])


def inside(namespace: str, command: list[str]) -> list[str]:
    """The command that runs ``command`` in a namespace."""
    return ["ip", "netns", "exec", namespace, *command]


def _join(hub: str, rank: int, name: str, mbit: float) -> None:
    """Makes one namespace and ties it to the bridge."""
    port = f"port{rank}"
    _ip("netns", "add", name)
    pair = ["link", "add", "eth0", "netns", name, "type", "veth"]
    _ip(*pair, "peer", "name", port, "netns", hub)
    _ip("-n", name, "addr", "add", f"10.213.0.{rank + 1}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", name, "link", "set", device, "up")
    _ip("-n", hub, "link", "set", port, "master", "hub", "up")
    bits_s = mbit * 1e6 * HEADERS
    for namespace, device in ((name, "eth0"), (hub, port)):
        # 1 ms of traffic may leave at once, and no less than one large segment.
        burst = max(70_000, int(bits_s / 8 * 0.001))
        limits = ["rate", f"{bits_s:.0f}bit", "burst", str(burst), "limit", str(QUEUE_BYTES)]
        tbf = ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limits]
        subprocess.run(tbf, check=True)


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
