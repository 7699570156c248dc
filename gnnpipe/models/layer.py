"""What a layer is, and what it may ask of the graph.

A layer is row-wise autograd code around at most one look at the neighbours, through the
:class:`GraphView` it receives. It does not know whether its rows are one chunk of a pipeline,
the part of a way, or the whole graph.
"""

from abc import ABC, abstractmethod
from typing import Literal, Protocol, TypeVar

from torch import Tensor, nn

from gnnpipe.kernels import SparseRows
from gnnpipe.models.norm import NodeNorm

NEGATIVE_SLOPE = 0.2
"""Slope of attention's leaky ReLU below zero."""

Rows = TypeVar("Rows", Tensor, SparseRows)
Operator = Literal[
    "none",
    "sum",
    "mean",
    "gcn",
    "sym",
    "laplacian",
    "edges",
    "edges_self",
    "edges_gcn",
    "edges_sym",
]
EdgeValue = Literal["weight", "attr", "type"]


class GraphView(Protocol):
    """The neighbourhood of some rows: a chunk while training, all rows in evaluation."""

    def aggregate(self, x: Tensor) -> Tensor:
        """Multiplies the layer's operator with the table that holds ``x``.

        Args:
            x: the rows' own values, ``[num_rows, F]``; they become the fresh values that
                other chunks read, and next epoch's historical ones.

        Returns:
            The weighted sums over the in-neighbours, ``[num_rows, F]``. Their gradient takes
            their place in memory: nothing may read them once it is known.
        """
        ...

    def gather(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Collects the values of the rows and of their in-neighbours.

        Args:
            x: the rows' own values, ``[num_rows, F]``.

        Returns:
            ``x_src [num_src, F]``, own rows first, and ``edge_index [2, E]``, int64, sorted by
            target: sources as rows of ``x_src``, targets as rows of ``x``.
        """
        ...

    def dropout(self, x: Rows, p: float) -> Rows:
        """Zeroes entries with probability ``p`` by counter, keyed by original node id."""
        ...

    def edge_dropout(self, alpha: Tensor, p: float) -> Tensor:
        """The same for values on the edges of ``gather``, ``[E, heads]``."""
        ...

    def normalise(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Runs one of the layer's norms, once in a forward; see :mod:`gnnpipe.models.norm`.

        Statistics over nodes are those of all nodes, as far as they are known (moments.py).
        """
        ...

    def relu(self, x: Tensor) -> Tensor:
        """``max(x, 0)`` of a result that nothing else needs: it may be overwritten."""
        ...

    def attend(self, x_src: Tensor, logits: tuple[Tensor, Tensor], p: float) -> Tensor:
        """Weighs the rows of ``gather`` by attention and adds them up, head by head.

        ``alpha_e = softmax_i(leaky_relu(logit_src[j] + logit_dst[i]))`` over the edges j -> i, and
        the result is ``sum_e dropout(alpha_e) x_src[j]``.

        Args:
            x_src: rows of the sources, ``[num_src, heads * C]``.
            logits: of sources ``[num_src, heads]`` and of targets ``[num_rows, heads]``.
            p: probability of a zero in alpha, keyed like :meth:`edge_dropout`.

        Returns:
            ``[num_rows, heads * C]``.
        """
        ...

    def largest(self, x_src: Tensor) -> Tensor:
        """The largest of the rows of ``gather`` that each row's edges read, column by column.

        Args:
            x_src: rows of the sources, ``[num_src, F]``.

        Returns:
            ``[num_rows, F]``; 0 where a row has no edges. Of equal values the one of the smallest
            original node id gets the gradient.
        """
        ...

    def edge_values(self, name: EdgeValue) -> Tensor | None:
        """Values on the edges of ``gather``, in its order; None where the graph has none.

        ``weight [E]`` (of ``edges_gcn`` and ``edges_sym``: normalised by the whole graph's
        degrees), ``attr [E, D]``, ``type [E]`` int64.
        """
        ...

    def foreign_seed(self) -> int | None:
        """Seed of a module that draws from torch's generator; None in evaluation."""
        ...

    def carry(self, name: str, value: Tensor) -> None:
        """Hands ``value [num_rows, F]`` to later layers that read ``name``."""
        ...

    def carried(self, name: str) -> Tensor:
        """The rows' value that an earlier layer carried under ``name``."""
        ...


class Layer(nn.Module, ABC):
    """One layer of a deep GNN; a model is a list of them that can be cut anywhere."""

    operator: Operator = "none"
    """How the layer sees its neighbours.

    ``sum`` A, ``mean`` D^-1 A, ``gcn`` D^-1/2 (A + I) D^-1/2, ``sym`` D^-1/2 A D^-1/2 with
    in-degrees, ``laplacian`` D^-1/2 A D^-1/2 without self-loops with out-degrees, all through
    ``aggregate``; ``edges``, ``edges_self`` (exactly one self-loop per node), ``edges_gcn`` and
    ``edges_sym`` (the weights of ``gcn`` and ``sym``) through ``gather``; ``none`` is row-wise.
    """
    table_channels: int = 0
    """Width of the tensor handed to ``aggregate`` or ``gather``; 0 for row-wise layers."""
    aggregates_input: bool = False
    """Whether the first tensor dropped out is the one handed to ``aggregate``."""
    dropout: float = 0.0
    """Probability of a zero in that tensor."""
    reads: tuple[str, ...] = ()
    """Names of the carried tensors that the layer reads."""
    writes: tuple[str, ...] = ()
    """Names of the carried tensors that the layer hands on."""

    in_channels: int
    out_channels: int

    @property
    def step_numbers(self) -> int:
        """Numbers that are kept once for all chunks of a step, besides the parameters."""
        return 0

    @property
    def input_lies_in_table(self) -> bool:
        """Whether the layer looks at its input through that dropout only, so that the rows in
        the table are all of it that a backward needs."""
        return False

    @abstractmethod
    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        """Maps the rows ``[num_rows, in_channels]`` to ``[num_rows, out_channels]``.

        The input layer may receive :class:`SparseRows`; its annotation says so.
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draws all parameters anew from torch's global generator."""

    @abstractmethod
    def cost(self, num_nodes: int, num_edges: int) -> float:
        """Estimates the work of one epoch, in floating-point operations."""

    def kept_numbers(self, num_rows: int, num_edges: int) -> int:
        """Estimates what the forward of one chunk keeps for its backward: memory in numbers.

        Counted is what products and nonlinearities save, not what lies in the table. By default
        two rows as wide as the input, one of the table, and the output.

        Args:
            num_rows: rows of the chunk.
            num_edges: edges into them.
        """
        return num_rows * (2 * self.in_channels + self.table_channels + self.out_channels)

    @property
    def norm_channels(self) -> int:
        """Columns that are normalised over all nodes."""
        return sum(part.num_features for part in self.modules() if isinstance(part, NodeNorm))

    def carried_channels(self, name: str) -> int:
        """Width of the carried tensor ``name`` that this layer writes."""
        assert name in self.writes, name
        return self.out_channels
