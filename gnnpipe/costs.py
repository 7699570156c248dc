"""How long a layer takes on a chunk, and a message on a link: the planner's constants.

A forward or backward of one layer over n rows and e edges takes ``a + b n + c e`` seconds. The
constants differ by the layer's role in the model: input, convolution, output. A message costs its
sender and its receiver time as well, before and after it is on its way.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gnnpipe.errors import UserError
from gnnpipe.schedule import KINDS, ScheduleName

LOCAL_GBPS = 10.0
"""Assumed between ranks of one host, through gloo on the loopback."""

LATENCY_US = 200.0
"""Assumed for a small message through gloo."""

MESSAGE_S = 8e-5
"""Work of one rank on a message that it posts and waits for, or sends, through gloo."""

PACK_S_PER_BYTE = 4.5e-10
"""Of collecting the rows that another way mirrors; both measured on one core of a Xeon."""

ROLES = ("input", "convolution", "output")

ENTER = "E"
"""Kind of what a stage does once for each chunk, whatever its layers: it looks which rows are
historical. Of the convolutions, as other stages have none."""


class Line(NamedTuple):
    """``fixed_s + per_row_s * rows + per_edge_s * edges``."""

    fixed_s: float
    per_row_s: float
    per_edge_s: float

    def seconds(self, rows: float, edges: float) -> float:
        """Time for a chunk."""
        return self.fixed_s + self.per_row_s * rows + self.per_edge_s * edges


class Profile(NamedTuple):
    """What one model costs on one machine."""

    lines: Mapping[str, Line]
    """By role and kind of action, such as ``convolution F``."""
    step_s_per_parameter: float
    """Optimizer's time."""
    note: str
    """Where it comes from."""
    post_s: float = MESSAGE_S
    """Work on a message, on either side."""
    pack_s_per_byte: float = PACK_S_PER_BYTE
    """Of collecting rows to send."""

    @property
    def enter(self) -> Line:
        """What a stage with convolutions does before each chunk."""
        return self.lines.get(f"convolution {ENTER}", Line(0.0, 0.0, 0.0))

    @property
    def schedules(self) -> list[ScheduleName]:
        """What can be predicted: the kinds of actions of these schedules were measured."""
        return [
            name
            for name, kinds in KINDS.items()
            if all(f"{role} {kind}" in self.lines for role in ROLES for kind in kinds)
        ]

    def message_s(self, num_messages: float, packed_bytes: float = 0.0) -> float:
        """Seconds that a rank works on messages."""
        return num_messages * self.post_s + packed_bytes * self.pack_s_per_byte


class Links(NamedTuple):
    """The network."""

    bandwidth_gbps: float
    """Between hosts, per rank and direction, Gbit/s."""
    latency_us: float
    """Of a message, microseconds."""
    local_gbps: float
    """The same bandwidth inside a host."""
    ranks_per_host: int

    def seconds(self, num_bytes: float, *, is_local: bool) -> float:
        """How long a message keeps its link busy, without latency."""
        gbps = self.local_gbps if is_local else self.bandwidth_gbps
        return num_bytes * 8e-9 / gbps

    @property
    def latency_s(self) -> float:
        """Of a message."""
        return self.latency_us * 1e-6


def role_of(index: int, num_layers: int) -> str:
    """The role of a layer in a model: its first and its last one differ from the others."""
    if index == 0:
        return "input"
    return "output" if index == num_layers - 1 else "convolution"


def save_profile(profile: Profile, path: str | Path) -> None:
    """Writes a profile as JSON."""
    text = json.dumps(profile._asdict(), indent=2)
    Path(path).write_text(text + "\n", encoding="utf-8")


def load_profile(path: str | Path) -> Profile:
    """Reads what :func:`save_profile` wrote.

    Raises:
        UserError: the file is no profile.
    """
    try:
        values: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        lines = {str(name): Line(*map(float, line)) for name, line in values["lines"].items()}
        rest = {name: float(values[name]) for name in Profile._field_defaults if name in values}
        step_s, note = float(values["step_s_per_parameter"]), str(values["note"])
        profile = Profile(lines, step_s, note, **rest)
        missing = {f"{role} {kind}" for role in ROLES for kind in "FB"} - lines.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        missing = {"anything"}
    if missing:
        raise UserError(
            f"`--profile` (={path}) must be a file that --save-profile wrote; make one on that"
            " machine"
        )
    return profile
