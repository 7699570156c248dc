"""K-hop convolutions of torch_geometric, each as the list of its hops.

The hops hold the very parameters of the convolution, so training them trains it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from gnnpipe.errors import UserError
from gnnpipe.models.foreign.hops import (
    AddBias,
    HopLayer,
    KeepLayer,
    Recurrence,
    StackHopLayer,
    StartLayer,
    Term,
)
from gnnpipe.models.layer import Layer, Operator

Conv = Any  # torch_geometric's classes have no types


def unrolled(conv: nn.Module, *, in_channels: int, prefix: str) -> list[Layer] | None:
    """The hops of a convolution; None if it is not one of those that are known.

    Args:
        conv: APPNP, TAGConv, SGConv, SSGConv, ChebConv or ARMAConv.
        in_channels: width of its input.
        prefix: of the names of what it carries, once per model.

    Raises:
        UserError: it is one of them with a setting that cannot be unrolled.
    """
    build = next(
        (UNROLLED[c.__name__] for c in type(conv).__mro__ if c.__name__ in UNROLLED), None
    )
    return None if build is None else build(conv, in_channels, prefix)


def _appnp(conv: Conv, channels: int, prefix: str) -> list[Layer]:
    _refuse(conv, dropout=conv.dropout > 0 and "drops edges inside the propagation")
    _refuse(conv, normalize=not conv.normalize and "takes weights that are normalised already")
    step = Recurrence(_operator(conv), 1.0 - conv.alpha, conv.alpha, reads=prefix)
    hops = [HopLayer(step, channels=channels, out_channels=channels) for _ in range(conv.K)]
    return [KeepLayer(prefix, channels), *hops]


def _sg(conv: Conv, channels: int, prefix: str) -> list[Layer]:
    step, last = Recurrence(_operator(conv)), conv.K - 1
    return [
        HopLayer(
            step,
            channels=channels,
            out_channels=conv.lin.out_channels if k == last else channels,
            is_last=k == last,
            head=conv.lin if k == last else None,
        )
        for k in range(conv.K)
    ]


def _ssg(conv: Conv, channels: int, prefix: str) -> list[Layer]:
    terms = [Term(prefix, None, conv.alpha)]
    terms += [Term(prefix, None, (1.0 - conv.alpha) / conv.K)] * conv.K
    steps = [Recurrence(_operator(conv))] * conv.K
    return _polynomial(terms, steps, (channels, channels, conv.lin.out_channels), head=conv.lin)


def _tag(conv: Conv, channels: int, prefix: str) -> list[Layer]:
    _refuse(conv, normalize=not conv.normalize and "takes weights that are normalised already")
    steps = [Recurrence("sym")] * conv.K
    return _linear_terms(conv, channels, prefix, steps)


def _cheb(conv: Conv, channels: int, prefix: str) -> list[Layer]:
    kind = conv.normalization
    _refuse(conv, normalization=kind != "sym" and "needs the largest eigenvalue")
    before = f"{prefix}_before"
    num_hops = len(conv.lins) - 1
    # With the largest eigenvalue 2, the scaled Laplacian is -D^-1/2 A D^-1/2.
    steps = [
        Recurrence("laplacian", -1.0, writes=before)
        if k == 0
        else Recurrence("laplacian", -2.0, -1.0, reads=before, writes=before)
        for k in range(num_hops)
    ]
    return _linear_terms(conv, channels, prefix, steps)


def _arma(conv: Conv, channels: int, prefix: str) -> list[Layer]:
    num_hops = conv.num_layers
    is_shared = conv.shared_weights and num_hops > 1
    _refuse(conv, shared_weights=is_shared and "would share weights between pipeline stages")
    weights = [conv.init_weight, *(conv.weight[: num_hops - 1])]
    hops: list[Layer] = [
        StackHopLayer(
            (_view(w), _view(conv.root_weight[k]), _bias(conv, k)),
            act=conv.act,
            dropout=conv.dropout,
            first_rows=prefix if k else None,
            is_last=k == num_hops - 1,
        )
        for k, w in enumerate(weights)
    ]
    return hops if num_hops == 1 else [KeepLayer(prefix, channels), *hops]


def _bias(conv: Conv, k: int) -> nn.Parameter | None:
    return None if conv.bias is None else _view(conv.bias[k])


def _view(part: Any) -> nn.Parameter:
    """A part of a parameter, in the same memory: training it trains the whole."""
    return nn.Parameter(part.detach())


def _linear_terms(conv: Conv, channels: int, prefix: str, steps: list[Recurrence]) -> list[Layer]:
    terms = [Term(prefix, lin) for lin in conv.lins]
    head = None if conv.bias is None else AddBias(conv.bias)
    if not steps:
        raise _error(conv, "K", "reads no neighbours at K = 0")
    return _polynomial(terms, steps, (channels, conv.out_channels, conv.out_channels), head=head)


def _polynomial(
    terms: list[Term],
    steps: list[Recurrence],
    widths: tuple[int, int, int],
    *,
    head: nn.Module | None,
) -> list[Layer]:
    """The layers of ``sum_k term_k(t_k)``; widths are those of t, the total and the result."""
    channels, total, result = widths
    layers: list[Layer] = [StartLayer(terms[0], in_channels=channels, total_channels=total)]
    for k, (step, term) in enumerate(zip(steps, terms[1:], strict=True)):
        is_last = k == len(steps) - 1
        hop = HopLayer(
            step,
            channels=channels,
            out_channels=result if is_last else channels,
            term=term,
            is_last=is_last,
            head=head if is_last else None,
        )
        hop.total_channels = total
        layers.append(hop)
    return layers


def _operator(conv: Conv) -> Operator:
    return "gcn" if conv.add_self_loops else "sym"


def _refuse(conv: Conv, **reasons: str | bool) -> None:
    for name, reason in reasons.items():
        if reason:
            raise _error(conv, name, str(reason))


def _error(conv: Conv, name: str, reason: str) -> UserError:
    value = getattr(conv, name, None)
    return UserError(
        f"`{type(conv).__name__}.{name}` (={value}) {reason}, which cannot be unrolled into "
        "layers; choose another setting"
    )


UNROLLED: Mapping[str, Callable[[Conv, int, str], list[Layer]]] = {
    "APPNP": _appnp,
    "TAGConv": _tag,
    "SGConv": _sg,
    "SSGConv": _ssg,
    "ARMAConv": _arma,
    "ChebConv": _cheb,
}
"""Class names of torch_geometric, and what unrolls them."""
