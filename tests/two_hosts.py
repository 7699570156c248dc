"""Two hosts on one: network namespaces that a pair of virtual interfaces joins."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import pytest

needs_namespaces = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="network namespaces need Linux, root and iproute2",
)


class Link(NamedTuple):
    """Two namespaces with an interface each; entry r belongs to rank r."""

    namespaces: tuple[str, str]
    interfaces: tuple[str, str]
    addresses: tuple[str, str]


@contextmanager
def joined() -> Iterator[Link]:
    """Joins two new namespaces; they are gone afterwards, whatever happens."""
    spaces = (f"gnnpipe-{os.getpid()}-0", f"gnnpipe-{os.getpid()}-1")
    made = Link(spaces, ("gp0", "gp1"), ("10.231.0.1", "10.231.0.2"))
    with ExitStack() as stack:
        for space in spaces:
            try:
                ip("netns", "add", space)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
            stack.callback(ip, "netns", "del", space)
        near, far = made.interfaces
        ends = ("peer", "name", far, "netns", spaces[1])
        ip("link", "add", near, "netns", spaces[0], "type", "veth", *ends)
        for rank, space in enumerate(spaces):
            interface = made.interfaces[rank]
            ip("-n", space, "addr", "add", f"{made.addresses[rank]}/24", "dev", interface)
            ip("-n", space, "link", "set", interface, "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield made


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)
