"""GAT: a mean over the neighbours and the node itself, weighted by learned attention."""

import torch
from torch import Tensor, nn

from gnnpipe.errors import UserError
from gnnpipe.models.convolution import Convolution, glorot
from gnnpipe.models.cost import dense_flops, edge_flops
from gnnpipe.models.layer import GraphView


class GATLayer(Convolution):
    """Velickovic et al., "Graph attention networks".

    For each head, with ``z = x W^T`` and j over the in-neighbours of i and i itself::

        alpha_ij = softmax_j(leaky_relu(a_src . z_j + a_dst . z_i))
        convolve(x)_i = sum_j dropout(alpha_ij) z_j + b

    the heads side by side, equal to torch_geometric's ``GATConv``. What neighbours read is
    ``z``: their attention is computed from the rows that were read.

    Args:
        in_channels: width of the input.
        out_channels: width of the output, all heads together.
        heads: number of heads; must divide ``out_channels``.
        dropout: probability of a zero in the input and in the attention, in [0, 1).
    """

    operator = "edges_self"

    def __init__(
        self, in_channels: int, out_channels: int, *, heads: int = 8, dropout: float = 0.0
    ) -> None:
        if heads < 1 or out_channels % heads:
            raise UserError(
                f"`heads` (={heads}) must divide `hidden_channels` (={out_channels}); "
                "choose a divisor"
            )
        super().__init__(in_channels, out_channels, dropout=dropout)
        self.table_channels = out_channels
        self.heads = heads
        shape = (1, heads, out_channels // heads)
        self.lin = nn.Linear(in_channels, out_channels, bias=False)
        self.att_src = nn.Parameter(torch.empty(shape))
        self.att_dst = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def convolve(self, x: Tensor, graph: GraphView) -> Tensor:
        """Weighs the gathered rows by attention and adds them up."""
        z: Tensor = self.lin(x)  # [num_rows, heads * C]
        z_src, _ = graph.gather(z)  # [num_src, heads * C]
        logits = z_src @ self._columns(self.att_src), z @ self._columns(self.att_dst)
        return graph.attend(z_src, logits, self.dropout) + self.bias

    def _columns(self, att: Tensor) -> Tensor:
        """Each head's vector as a column over all heads' channels, ``[heads * C, heads]``."""
        spread = torch.eye(self.heads, dtype=att.dtype, device=att.device).unsqueeze(1)
        return (att.squeeze(0).unsqueeze(2) * spread).flatten(0, 1)

    def reset_parameters(self) -> None:
        """Draws the weights by Glorot's rule; the bias starts at zero."""
        super().reset_parameters()
        for weight in (self.lin.weight, self.att_src, self.att_dst):
            glorot(weight)
        nn.init.zeros_(self.bias)

    def kept_numbers(self, num_rows: int, num_edges: int) -> int:
        """Input, projected rows, gathered ones with their halo; attention of every edge."""
        rows = num_rows * (self.in_channels + 4 * self.out_channels)
        edges = 3 * (num_edges + num_rows) * self.heads
        return rows + edges + self.norm_numbers(num_rows)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """One dense product; rows are gathered, weighted and summed edge by edge."""
        dense = dense_flops(num_nodes, self.in_channels, self.out_channels)
        return dense + 3.0 * edge_flops(num_edges + num_nodes, self.table_channels)


def edge_softmax(logit: Tensor, target: Tensor, num_rows: int) -> Tensor:
    """Softmax over the edges that share a target.

    Args:
        logit: ``[E, heads]``.
        target: row of each edge's target, ``[E]``, int64.
        num_rows: number of target rows.

    Returns:
        ``[E, heads]``; the edges of each target add up to one.
    """
    shape = (num_rows, logit.shape[1])
    index = target.unsqueeze(1).expand_as(logit)
    # The largest logit is only a shift against overflow: no gradient flows through it.
    top = logit.new_zeros(shape).scatter_reduce(
        0, index, logit.detach(), "amax", include_self=False
    )
    weight = (logit - top.index_select(0, target)).exp()
    total = logit.new_zeros(shape).index_add(0, target, weight)
    return weight / total.index_select(0, target)
