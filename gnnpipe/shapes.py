"""What closed formulas ask of a layer: widths and counts, no torch."""

from collections.abc import Iterable
from typing import Protocol


class Counted(Protocol):
    """Something with a number of elements, such as a parameter."""

    def numel(self) -> int: ...


class LayerShape(Protocol):
    """Every ``models.Layer`` has this, on the meta device too."""

    @property
    def operator(self) -> str: ...

    table_channels: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    in_channels: int
    out_channels: int

    @property
    def norm_channels(self) -> int: ...

    def parameters(self) -> Iterable[Counted]: ...

    def carried_channels(self, name: str) -> int: ...

    @property
    def input_lies_in_table(self) -> bool: ...

    @property
    def step_numbers(self) -> int: ...

    def kept_numbers(self, num_rows: int, num_edges: int) -> int: ...


def gathers(operator: str) -> bool:
    """Whether layers of an operator collect their neighbours' rows instead of their sums."""
    return operator.startswith("edges")


def num_parameters(layers: Iterable[LayerShape]) -> int:
    """Parameters of some layers."""
    return sum(p.numel() for layer in layers for p in layer.parameters())
