"""Network namespaces joined by links of a chosen speed, made and removed by root.

    python benchmarks/shaped_links.py --mbit 82     # how far they keep that speed

Each rank has a namespace of its own with one interface, ``eth0``. All are ports of one bridge::

    rank 0 [eth0] --- htb --- [bridge] --- htb --- [eth0] rank 1

``tc``'s token buckets limit what leaves each end, so both directions of a rank have the speed,
which is that of payload: the headers of full TCP segments come on top. Queues hold all that
senders can have under way, so nothing is lost and sent again. Short packets go first: behind a
full queue acknowledgements would come so late that a sender's window stops it, and a chain of
ranks that send both ways would get two thirds of the speed.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PORT = 5000
ROUNDS = 20
SIZES = (1_000, 20_000, 50_000, 200_000, 1_000_000)
CHAIN_RANKS, CHAIN_BYTES = 4, 20_000_000

HEADERS = 1514 / 1448
"""Bytes on the wire for each byte of payload."""

QUEUE_BYTES = 64_000_000
SEGMENT_BYTES = 6_000
"""Largest packet, which leaves as a whole as soon as the ones before have been paid for."""

CLASSES = (("3", "1:", 1.0, "0"), ("1", "1:3", 0.1, "0"), ("2", "1:3", 0.9, "1"))
"""Number, parent, assured share and priority: the link, its short packets, all others. Either may
take what the other leaves."""


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
    for namespace, device in ((name, "eth0"), (hub, port)):
        _shape(namespace, device, mbit * 1e6 * HEADERS)


def _shape(namespace: str, device: str, bits_s: float) -> None:
    """Limits what leaves a device; short packets first."""
    # What has not been used in the last 0.2 ms is lost: a message after a pause has no head start.
    burst = str(max(SEGMENT_BYTES, int(bits_s / 8 * 0.0002)))
    _ip("-n", namespace, "link", "set", "dev", device, "gso_max_size", str(SEGMENT_BYTES))
    _tc(namespace, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "2")
    for number, parent, share, priority in CLASSES:
        place = ["dev", device, "parent", parent, "classid", f"1:{number}", "htb"]
        rates = ["rate", f"{bits_s * share:.0f}bit", "ceil", f"{bits_s:.0f}bit"]
        bursts = ["burst", burst, "cburst", burst, "quantum", "60000", "prio", priority]
        _tc(namespace, "class", "add", *place, *rates, *bursts)
        if parent != "1:":
            queue = ["parent", f"1:{number}", "bfifo", "limit", str(QUEUE_BYTES)]
            _tc(namespace, "qdisc", "add", "dev", device, *queue)
    is_short = ["match", "u16", "0x0000", "0xff00", "at", "2"]  # IPv4's length: below 256 bytes.
    place = ["dev", device, "parent", "1:", "protocol", "ip", "prio", "1"]
    _tc(namespace, "filter", "add", *place, "u32", *is_short, "flowid", "1:1")


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _tc(namespace: str, *arguments: str) -> None:
    subprocess.run(["tc", "-n", namespace, *arguments], check=True)


def main() -> None:
    """Prints how long messages take after a pause, and in a chain that sends both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbit", type=float, default=82.0, help="speed of each link, Mbit/s")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        (_ping if options.bytes else _chain)(options.rank, options.bytes)
        return
    if reason := why_not():
        parser.error(reason)
    say("| message | ms | at the link's speed |\n| --- | ---: | ---: |")
    with shaped_links(2, options.mbit) as names:
        for size in SIZES:
            (median_s,) = _seconds(names, size)
            say(f"| {size} bytes | {median_s * 1e3:.2f} | {size * 8 / options.mbit / 1e3:.2f} |")
    with shaped_links(CHAIN_RANKS, options.mbit) as names:
        longest_s, ideal_s = max(_seconds(names, 0)), 2 * CHAIN_BYTES * 8e-6 / options.mbit
        say(f"| {CHAIN_BYTES} both ways | {longest_s * 1e3:.0f} | {ideal_s * 1e3:.0f} |")


def _seconds(names: list[str], size: int) -> list[float]:
    """What the ranks print, each in its namespace."""
    program = [sys.executable, __file__, "--bytes", str(size), "--rank"]
    commands = [inside(name, [*program, str(rank)]) for rank, name in enumerate(names)]
    children = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    return [float(x) for child in children for x in child.communicate(timeout=120)[0].split()]


def _address(rank: int) -> tuple[str, int]:
    return f"10.213.0.{rank + 1}", PORT


def _to(rank: int) -> socket.socket:
    for _ in range(100):  # Until it listens.
        try:
            return socket.create_connection(_address(rank))
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError


def _take(peer: socket.socket, size: int) -> None:
    while size > 0:
        size -= len(peer.recv(min(size, 1 << 20)))


def _ping(rank: int, size: int) -> None:
    """Rank 0 sends after pauses, and prints the median time until a byte comes back."""
    if rank:
        peer, _ = socket.create_server(_address(rank)).accept()
        for _ in range(ROUNDS):
            _take(peer, size)
            peer.sendall(b".")
        return
    peer, found = _to(1), []
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(ROUNDS):
        time.sleep(0.05)
        start_s = time.perf_counter()
        peer.sendall(bytes(size))
        _take(peer, 1)
        found.append(time.perf_counter() - start_s)
    say(str(statistics.median(found)))


def _chain(rank: int, _: int) -> None:
    """Every rank sends to both neighbours at once, and prints when it has all of theirs."""
    server = socket.create_server(_address(rank))
    peers = [peer for peer in (rank - 1, rank + 1) if 0 <= peer < CHAIN_RANKS]
    out = [_to(peer) for peer in peers]
    into = [server.accept()[0] for _ in peers]
    start_s = time.perf_counter()
    jobs = [threading.Thread(target=peer.sendall, args=(bytes(CHAIN_BYTES),)) for peer in out]
    jobs += [threading.Thread(target=_take, args=(peer, CHAIN_BYTES)) for peer in into]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    say(str(time.perf_counter() - start_s))


def say(text: str) -> None:
    """One line of output."""
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
