"""A configured model as plain torch_geometric modules, for serving without the pipeline.

torch_geometric is imported inside the functions: training the built-in models does without it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from gnnpipe.errors import UserError
from gnnpipe.models.norm import make_norm
from gnnpipe.sections import NormName

Options = Mapping[str, Any]
MakeConv = Callable[[int, Options], nn.Module]


class Settings(Protocol):
    """The configuration's model section."""

    @property
    def name(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_channels(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def options(self) -> Options: ...


class PlainModel(nn.Module):
    """``scores = model(x, edge_index, edge_weight)``, the whole graph at once.

    Args:
        settings: the model, one of :data:`PLAIN`.
        in_channels: number of features.
        out_channels: number of classes.

    Raises:
        UserError: torch_geometric has no such model.
    """

    def __init__(self, settings: Settings, in_channels: int, out_channels: int) -> None:
        super().__init__()
        name, hidden = settings.name, settings.hidden_channels
        if name not in PLAIN:
            raise UserError(
                f"`model.name` (={name}) must be one of {', '.join(PLAIN)} to become a plain "
                "torch_geometric model; serve it with PretrainedModel"
            )
        make, numbers = PLAIN[name], range(1, settings.num_layers + 1)
        options = {**settings.options, "dropout": settings.dropout}
        self.name = name
        self.dropout = nn.Dropout(settings.dropout)
        self.first = nn.Linear(in_channels, hidden)
        self.convs = nn.ModuleList(make(hidden, {**options, "layer": i}) for i in numbers)
        # Every block has its own norm and the last rows one; plain convolutions one after each.
        is_residual, kind = name in PRE_ACTIVATED, settings.options["norm"]
        self.norm = _norm(kind, hidden) if is_residual else nn.Identity()
        self.norms = nn.ModuleList(
            nn.Identity() if is_residual else _norm(kind, hidden) for _ in numbers
        )
        self.last = nn.Linear(hidden, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Maps ``[N, F]`` to scores ``[N, num_classes]``."""
        h = first = self.first(self.dropout(x)).relu()
        jumps = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            if self.name in PRE_ACTIVATED:
                h = conv(h, edge_index)
                continue
            own = (self.dropout(h), first) if self.name == "gcnii" else (self.dropout(h),)
            weights = {"edge_weight": edge_weight} if self.name in WEIGHTED else {}
            h = norm(conv(*own, edge_index, **weights)).relu()
            jumps.append(h)
        if self.name == "jknet":
            for each in jumps:
                h = h.maximum(each)
        h = self.norm(h).relu() if self.name in PRE_ACTIVATED else h
        scores: Tensor = self.last(self.dropout(h))
        return scores

    def running_statistics(self) -> Iterator[tuple[str, Tensor]]:
        """What batch norms know besides their weights, by name."""
        for place, part in self.named_modules():
            if isinstance(part, nn.BatchNorm1d):
                yield from ((f"{place}.{name}", value) for name, value in part.named_buffers())

    def name_of(self, name: str) -> str:
        """What a run's file calls one of this module's tensors, ``layers.{i}.{parameter}``."""
        part, _, rest = name.partition(".")
        last = len(self.convs) + 1
        if part == "first":
            return f"layers.0.lin.{rest}"
        if part == "last":
            return f"layers.{last}.{'head.' if self.name == 'jknet' else ''}lin.{rest}"
        if part == "norm":
            return f"layers.{last}.norm.{rest}"
        index, _, inner = rest.partition(".")
        if part == "norms":
            return f"layers.{int(index) + 1}.{'conv.' if self.name == 'jknet' else ''}norm.{inner}"
        for theirs, ours in RENAMED.get(self.name, ()):
            inner = inner.replace(theirs, ours)
        return f"layers.{int(index) + 1}.{inner}"


def _gcn(channels: int, options: Options) -> nn.Module:
    from torch_geometric.nn import GCNConv

    return GCNConv(channels, channels)  # type: ignore[no-any-return]


def _sage(channels: int, options: Options) -> nn.Module:
    from torch_geometric.nn import SAGEConv

    aggregator = options.get("aggregator", "mean")
    return SAGEConv(channels, channels, aggr=aggregator)  # type: ignore[no-any-return]


def _gin(channels: int, options: Options) -> nn.Module:
    from torch_geometric.nn import GINConv

    inner = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))
    return GINConv(inner, train_eps=bool(options["train_eps"]))  # type: ignore[no-any-return]


def _gat(channels: int, options: Options) -> nn.Module:
    from torch_geometric.nn import GATConv

    heads, dropout = int(options["heads"]), options["dropout"]
    return GATConv(channels, channels // heads, heads, dropout=dropout)  # type: ignore[no-any-return]


def _gcnii(channels: int, options: Options) -> nn.Module:
    from torch_geometric.nn import GCN2Conv

    own = {key: options[key] for key in ("alpha", "theta", "layer")}
    return GCN2Conv(channels, **own)  # type: ignore[no-any-return]


def _resgcn(channels: int, options: Options) -> nn.Module:
    return _residual(_sage(channels, options), channels, options)


def _deepergcn(channels: int, options: Options) -> nn.Module:
    from torch_geometric.nn import GENConv

    settings = {"aggr": "softmax", "learn_t": True, "num_layers": 2, "norm": "layer"}
    return _residual(GENConv(channels, channels, **settings), channels, options)


def _transformer(channels: int, options: Options) -> nn.Module:
    from torch_geometric.nn import TransformerConv

    heads = int(options["heads"])
    return _residual(TransformerConv(channels, channels // heads, heads), channels, options)


def _residual(conv: nn.Module, channels: int, options: Options) -> nn.Module:
    from torch_geometric.nn import DeepGCNLayer

    own = {"block": "res+", "dropout": options["dropout"]}
    norm = _norm(options["norm"], channels)
    return DeepGCNLayer(conv, norm, nn.ReLU(), **own)  # type: ignore[no-any-return]


def _norm(kind: NormName, channels: int) -> nn.Module:
    if kind == "graph":
        from torch_geometric.nn import GraphNorm

        return GraphNorm(channels)  # type: ignore[no-any-return]
    return make_norm(kind, channels)


PLAIN: Mapping[str, MakeConv] = {
    "gcn": _gcn,
    "sage": _sage,
    "gin": _gin,
    "gat": _gat,
    "gcnii": _gcnii,
    "jknet": _gcn,
    "resgcn+": _resgcn,
    "deepergcn": _deepergcn,
    "transformer": _transformer,
}
"""Models that torch_geometric's own modules make up, and the convolution of each."""

PRE_ACTIVATED = ("resgcn+", "deepergcn", "transformer")
WEIGHTED = ("gcn", "gcnii", "jknet")
RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "gin": (("nn.0.", "first."), ("nn.2.", "second.")),
    "jknet": (("lin.", "conv.lin."), ("bias", "conv.bias")),
    "deepergcn": (("conv.", "conv.conv."),),
    "transformer": (("conv.", "conv.conv."),),
}
"""Where a model's layers call a part otherwise than torch_geometric's convolution."""
