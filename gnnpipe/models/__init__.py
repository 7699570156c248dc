"""Models as flat lists of layers that can be cut anywhere.

Every model is an input layer, ``num_layers`` convolutions and an output layer; between any two
of them the rows are ``hidden_channels`` wide, beside what the layers carry.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gnnpipe.errors import UserError
from gnnpipe.models.convolution import Convolution
from gnnpipe.models.dgmlp import dgmlp_layers
from gnnpipe.models.gat import GATLayer
from gnnpipe.models.gcn import GCNLayer
from gnnpipe.models.gcnii import GCNIILayer
from gnnpipe.models.gin import GINLayer
from gnnpipe.models.io import InputLayer, OutputLayer
from gnnpipe.models.jknet import JKLayer, JKOutputLayer
from gnnpipe.models.layer import GraphView, Layer
from gnnpipe.models.norm import make_norm
from gnnpipe.models.resgcn import ResGCNLayer, ResGCNOutputLayer
from gnnpipe.models.reversible import ReversibleLayer
from gnnpipe.models.sage import SAGELayer
from gnnpipe.models.zoo import decoupled_layers, deepergcn_layer, transformer_layer
from gnnpipe.sections import MODEL_OPTIONS, NormName, Option

__all__ = ["GraphView", "Layer", "build_layers", "end_widths"]

DECOUPLED = ("appnp", "dagnn")
"""Models that make the class scores first and propagate them."""

PRE_ACTIVATED = ("resgcn+", "deepergcn", "transformer", "revgnn")
"""Models of residual blocks that begin with a norm, as their output layer does."""


def build_layers(
    name: str,
    *,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    num_layers: int,
    dropout: float,
    options: Mapping[str, Option],
    row_entries: float | None = None,
) -> list[Layer]:
    """Builds a model, with weights drawn from torch's global generator.

    Args:
        name: a key of :data:`~gnnpipe.sections.MODEL_OPTIONS`.
        in_channels: number of features.
        hidden_channels: width of the rows between layers.
        out_channels: number of classes.
        num_layers: number of convolutions.
        dropout: probability of a zero, in [0, 1).
        options: the model's own options; missing ones take their defaults.
        row_entries: mean number of stored features of a node, for the cost of sparse features;
            None for dense ones.

    Returns:
        ``num_layers + 2`` layers.

    Raises:
        UserError: an unknown model or option, or heads that do not divide the width.
    """
    chosen = _choose(name, options)
    norm = chosen.get("norm", "none")
    writes = ("h0",) if name == "gcnii" else ()
    first = InputLayer(
        in_channels, hidden_channels, dropout=dropout, writes=writes, row_entries=row_entries
    )
    if name in DECOUPLED:
        widths, alpha = (hidden_channels, out_channels), chosen.get("alpha")
        hops = decoupled_layers(widths=widths, num_hops=num_layers, dropout=dropout, alpha=alpha)
        return [first, *hops]
    if name == "dgmlp":
        widths = (hidden_channels, out_channels)
        return [first, *dgmlp_layers(widths=widths, num_layers=num_layers, dropout=dropout)]
    convolutions = _Convolutions(name, hidden_channels, dropout, chosen, norm)
    middle = [convolutions.layer(i) for i in range(1, num_layers + 1)]
    ends = hidden_channels, out_channels
    if name in PRE_ACTIVATED:
        return [first, *middle, ResGCNOutputLayer(*ends, dropout=dropout, norm=norm)]
    head = JKOutputLayer if name == "jknet" else OutputLayer
    return [first, *middle, head(*ends, dropout=dropout)]


def end_widths(name: str, num_layers: int, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Numbers of features and of classes of a model, read off its weights.

    Args:
        name: the model.
        num_layers: number of convolutions.
        tensors: weights as files name them.

    Raises:
        UserError: the weights of either end are missing.
    """
    scores = "1.lin" if name in DECOUPLED else f"{num_layers + 1}.lin"
    if name == "jknet":
        scores = f"{num_layers + 1}.head.lin"
    ends = ("layers.0.lin.weight", f"layers.{scores}.weight")
    for end in ends:
        if end not in tensors:
            raise UserError(f"weights must hold `{end}`; load the weights of this very model")
    return tensors[ends[0]].shape[1], tensors[ends[1]].shape[0]


def _choose(name: str, options: Mapping[str, Option]) -> dict[str, Any]:
    """All of the model's own options."""
    if name not in MODEL_OPTIONS:
        raise UserError(
            f"`model.name` (={name}) is unknown; choose from {', '.join(MODEL_OPTIONS)}"
        )
    for key in options:
        if key not in MODEL_OPTIONS[name]:
            known = ", ".join(MODEL_OPTIONS[name]) or "none"
            raise UserError(f"`model.{key}` is no option of {name}; its options: {known}")
    return {**MODEL_OPTIONS[name], **options}


class _Convolutions(NamedTuple):
    """Makes one model's convolutions, the hidden width and dropout of all of them."""

    name: str
    channels: int
    dropout: float
    options: Mapping[str, Any]  # of their own types
    norm: NormName

    def layer(self, layer_index: int) -> Layer:
        """The convolution at a place, from 1."""
        if self.name in PRE_ACTIVATED:
            return self._residual()
        layer = self._plain(layer_index)
        inner = layer.conv if isinstance(layer, JKLayer) else layer
        inner.norm = make_norm(self.norm, self.channels)
        return layer

    def _plain(self, layer_index: int) -> Convolution | JKLayer:
        channels, dropout, options = self.channels, self.dropout, self.options
        match self.name:
            case "gcn":
                return GCNLayer(channels, channels, dropout=dropout)
            case "sage":
                aggregator = options["aggregator"]
                return SAGELayer(channels, channels, dropout=dropout, aggregator=aggregator)
            case "gin":
                train_eps = bool(options["train_eps"])
                return GINLayer(channels, channels, dropout=dropout, train_eps=train_eps)
            case "gat":
                return GATLayer(channels, channels, heads=int(options["heads"]), dropout=dropout)
            case "jknet":
                return JKLayer(channels, dropout=dropout, is_first=layer_index == 1)
            case _:
                alpha, theta = options["alpha"], options["theta"]
                return GCNIILayer(channels, layer_index, dropout=dropout, alpha=alpha, theta=theta)

    def _residual(self) -> Layer:
        channels, dropout, norm = self.channels, self.dropout, self.norm
        match self.name:
            case "deepergcn":
                return deepergcn_layer(channels, dropout=dropout, norm=norm)
            case "transformer":
                heads = int(self.options["heads"])
                return transformer_layer(channels, heads=heads, dropout=dropout, norm=norm)
            case "revgnn":
                return ReversibleLayer(channels, dropout=dropout, norm=norm)
            case _:
                return ResGCNLayer(channels, dropout=dropout, norm=norm)
