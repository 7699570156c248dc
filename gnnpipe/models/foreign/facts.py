"""What a foreign convolution may ask of a graph's edges."""

from typing import NamedTuple, Protocol


class _HasEdges(Protocol):
    """Graph and ChunkedGraph."""

    @property
    def edge_weight(self) -> object: ...
    @property
    def edge_attr(self) -> object: ...
    @property
    def edge_type(self) -> object: ...


class EdgeFacts(NamedTuple):
    """Which values the edges carry."""

    has_weight: bool = False
    attr_channels: int = 0
    """Width of the edge attributes; 0 where there are none."""
    num_types: int = 0
    """Edge types; 0 where edges have none."""

    @staticmethod
    def of(graph: _HasEdges) -> "EdgeFacts":
        """The facts of a graph, whole or chunked."""
        attr, kind = graph.edge_attr, graph.edge_type
        return EdgeFacts(
            has_weight=graph.edge_weight is not None,
            attr_channels=0 if attr is None else int(attr.shape[1]),  # type: ignore[attr-defined]
            num_types=0 if kind is None else int(kind.max(initial=0)) + 1,  # type: ignore[attr-defined]
        )
