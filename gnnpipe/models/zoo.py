"""Deep models made of torch_geometric's convolutions, residual blocks and propagation.

torch_geometric is imported inside the functions: the other models do without it.
"""

from torch import nn

from gnnpipe.errors import UserError
from gnnpipe.models.decoupled import NAME, GatedHopLayer, PredictLayer
from gnnpipe.models.foreign.block import BlockLayer
from gnnpipe.models.foreign.hops import HopLayer, Recurrence
from gnnpipe.models.foreign.residual import ResidualLayer
from gnnpipe.models.layer import Layer
from gnnpipe.models.norm import make_norm
from gnnpipe.sections import NormName


def deepergcn_layer(channels: int, *, dropout: float, norm: NormName) -> Layer:
    """Li et al., "DeeperGCN": res+ around GENConv with learned softmax aggregation."""
    from torch_geometric.nn import GENConv

    conv = GENConv(channels, channels, aggr="softmax", learn_t=True, num_layers=2, norm="layer")
    return _residual(conv, channels, dropout, norm)


def transformer_layer(channels: int, *, heads: int, dropout: float, norm: NormName) -> Layer:
    """A pre-normalised transformer block whose attention is over the in-neighbours."""
    from torch_geometric.nn import TransformerConv

    if channels % heads:
        raise UserError(
            f"`heads` (={heads}) must divide `hidden_channels` (={channels}); choose a divisor"
        )
    conv = TransformerConv(channels, channels // heads, heads)
    return _residual(conv, channels, dropout, norm)


def decoupled_layers(
    *, widths: tuple[int, int], num_hops: int, dropout: float, alpha: float | None
) -> list[Layer]:
    """Scores first, then their propagation over ``num_hops`` hops.

    Args:
        widths: hidden width and number of classes.
        num_hops: at least 1.
        dropout: probability of a zero before the scores, in [0, 1).
        alpha: APPNP returns to the first scores with this probability at every hop; None is
            DAGNN, which weighs all hops by a learned gate.
    """
    hidden, classes = widths
    layers: list[Layer] = [PredictLayer(hidden, classes, dropout=dropout)]
    for hop in range(1, num_hops + 1):
        if alpha is None:
            layers.append(GatedHopLayer(classes, hop, is_last=hop == num_hops))
        else:
            step = Recurrence("gcn", 1.0 - alpha, alpha, reads=NAME)
            layers.append(HopLayer(step, channels=classes, out_channels=classes))
    return layers


def _residual(conv: nn.Module, channels: int, dropout: float, norm: NormName) -> Layer:
    block = BlockLayer(conv, "bipartite", widths=(channels, channels))
    return ResidualLayer(block, norm=make_norm(norm, channels), act=nn.ReLU(), dropout=dropout)
