"""Finds the adapter for each module of a list, or says why there is none."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import nn

from gnnpipe.errors import UserError
from gnnpipe.models.foreign.block import BlockLayer
from gnnpipe.models.foreign.facts import EdgeFacts
from gnnpipe.models.foreign.hops import KeepLayer
from gnnpipe.models.foreign.probe import NUM_NODES, TOLERANCE, Sample, difference, whole_call
from gnnpipe.models.foreign.residual import Order, ResidualLayer
from gnnpipe.models.foreign.rowwise import RowWiseLayer
from gnnpipe.models.foreign.unrolled import unrolled
from gnnpipe.models.layer import Layer, Operator

NORMALISED: Mapping[str, str] = {
    "GCNConv": "edge_weight",
    "GCN2Conv": "edge_weight",
    "FAConv": "edge_weight",
    "LGConv": "edge_weight",
}
"""Convolutions of torch_geometric that weigh edges by the degrees of both ends, and the argument
that takes such weights from outside when ``normalize`` is off."""

COUPLING = ("BatchNorm", "InstanceNorm", "GraphNorm", "PairNorm", "MeanSubtraction")
"""Beginnings of the names of modules whose rows depend on each other."""

EDGE_INDICES = ("edge_index", "pos_edge_index")
OPTIONAL = ("edge_weight", "edge_attr", "edge_type")
NEEDED = ("x", "x_0", "edge_index", "pos_edge_index", "neg_edge_index", *OPTIONAL)


def adapt(
    modules: Sequence[nn.Module], *, in_channels: int, facts: EdgeFacts | None = None
) -> list[Layer]:
    """Makes a list of modules a list of layers.

    Args:
        modules: layers of the pipeline, row-wise torch modules, convolutions of
            torch_geometric, in order. Their parameters are not copied: the layers train them.
        in_channels: number of input features.
        facts: of the graph's edges.

    Returns:
        At least as many layers as modules where convolutions are unrolled; leading row-wise
        modules are joined, so that sparse features meet a Linear.

    Raises:
        UserError: a module fits no adapter; the message says why.
    """
    builder = _Adapter(in_channels, facts or EdgeFacts())
    leading = _leading_rowwise(modules)
    if len(leading) > 1:
        modules = [nn.Sequential(*leading), *modules[len(leading) :]]
    for position, module in enumerate(modules):
        builder.add(module, position)
    return builder.layers


class _Adapter:
    def __init__(self, in_channels: int, facts: EdgeFacts) -> None:
        self.layers: list[Layer] = []
        self._channels = in_channels
        self._facts = facts
        self._has_first_rows = False

    def add(self, module: nn.Module, position: int) -> None:
        where = f"`layers[{position}]` (={type(module).__name__})"
        if isinstance(module, Layer):
            self._append(module)
            return
        _refuse_coupling(module, where)
        if type(module).__name__ == "DeepGCNLayer":
            self._append(self._residual(module, where))
            return
        if not is_convolution(module):
            self._append(_rowwise(module, self._channels, where))
            return
        self._materialise(module, where)
        hops = unrolled(module, in_channels=self._channels, prefix=f"hops{position}")
        for layer in [self._block(module, where)] if hops is None else hops:
            self._append(layer)

    def _residual(self, block: Any, where: str) -> Layer:  # torch_geometric has no types
        """torch_geometric's residual block around a convolution."""
        if block.block not in get_args(Order):
            raise UserError(f"{where} with block={block.block} is not supported; use block=res+")
        self._materialise(block.conv, where)
        inner = self._block(block.conv, where)
        for part in (block.norm, block.act):
            if part is not None:
                _rowwise(part, inner.out_channels, where)
        return ResidualLayer(
            inner, norm=block.norm, act=block.act, order=block.block, dropout=block.dropout
        )

    def _append(self, layer: Layer) -> None:
        if layer.in_channels != self._channels:
            raise UserError(
                f"`layers[{len(self.layers)}]` (={type(layer).__name__}) must take rows of width "
                f"{self._channels}, not {layer.in_channels}; match the widths"
            )
        self.layers.append(layer)
        self._channels = layer.out_channels

    def _materialise(self, conv: nn.Module, where: str) -> None:
        """Gives lazily built weights their shapes."""
        lazy = any(isinstance(p, nn.UninitializedParameter) for p in conv.parameters())
        if lazy:
            self._runnable(conv, where)

    def _run_whole(self, conv: nn.Module, arguments: tuple[str, ...], where: str) -> int:
        """Runs the convolution on the small graph; returns the width of its result."""
        sample = Sample.draw(self._facts, torch.Generator().manual_seed(1))
        dtype = next((p.dtype for p in conv.parameters() if not _is_lazy(p)), torch.float32)
        sample = sample._replace(
            values={k: v.to(dtype) if k != "type" else v for k, v in sample.values.items()}
        )
        x = torch.randn(NUM_NODES, self._channels, generator=torch.Generator().manual_seed(2))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                out = whole_call(conv, x.to(dtype), sample=sample, arguments=arguments)
        except Exception as error:  # whatever the convolution raises is the reason
            text = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{where} cannot run on rows of width {self._channels} with "
                f"{', '.join(arguments) or 'no edge values'}: {type(error).__name__}: {text}"
            ) from error
        if not isinstance(out, torch.Tensor) or out.ndim != 2 or out.shape[0] != NUM_NODES:
            raise UserError(f"{where} must return one row for each node; wrap it so that it does")
        return int(out.shape[1])

    def _block(self, conv: nn.Module, where: str) -> Layer:
        given, width = self._runnable(conv, where)
        twin, operator, arguments = _without_normalisation(conv, given, where)
        if "x_0" in given:
            self._keep_first_rows()
        found = []
        for kind in BlockLayer.adapters:
            layer = BlockLayer(
                twin,
                kind,
                widths=(self._channels, width),
                operator=operator,
                arguments=arguments,
            )
            reason = _misfit(conv, layer, facts=self._facts, arguments=given)
            if reason is None:
                return layer
            found.append(f"{kind}: {reason}")
        raise UserError(
            f"{where} fits no adapter: on a block of a chunk it must give what it gives on the "
            f"whole graph ({'; '.join(found)}); write it with one look at the in-neighbours"
        )

    def _runnable(self, conv: nn.Module, where: str) -> tuple[tuple[str, ...], int]:
        """The most that the convolution, as it was made, can take, and the result's width.

        Many take an argument only if they were built for it, such as with ``edge_dim``.
        """
        given = chosen_arguments(conv, self._facts, where)
        parameters = inspect.signature(conv.forward).parameters
        optional = [n for n in OPTIONAL if n in given and parameters[n].default is None]
        fewer = [
            tuple(n for n in given if n not in optional[-k:]) for k in range(1, len(optional) + 1)
        ]
        for arguments in fewer and (given, *fewer[:-1]):
            try:
                return arguments, self._run_whole(conv, arguments, where)
            except UserError:
                continue
        arguments = fewer[-1] if fewer else given
        return arguments, self._run_whole(conv, arguments, where)

    def _keep_first_rows(self) -> None:
        """x_0 are the rows that the first such convolution receives."""
        if not self._has_first_rows:
            self._append(KeepLayer("x_0", self._channels))
            self._has_first_rows = True


def is_convolution(module: nn.Module) -> bool:
    """Whether the module's ``forward`` takes edges."""
    if type(module).__name__ == "DeepGCNLayer":
        return True
    return any(name in inspect.signature(module.forward).parameters for name in EDGE_INDICES)


def chosen_arguments(conv: nn.Module, facts: EdgeFacts, where: str) -> tuple[str, ...]:
    """What to give the convolution: all that it takes and the graph has."""
    if getattr(conv, "flow", "source_to_target") != "source_to_target":
        raise UserError(f"{where} must have flow=source_to_target; nodes read their in-neighbours")
    available = {
        "edge_weight": facts.has_weight,
        "edge_attr": bool(facts.attr_channels) and getattr(conv, "edge_dim", 0) is not None,
        "edge_type": bool(facts.num_types),
        "x_0": True,
        "pos_edge_index": bool(facts.num_types) or facts.has_weight,
    }
    chosen = []
    for name, parameter in inspect.signature(conv.forward).parameters.items():
        is_needed = parameter.default is parameter.empty and parameter.kind in (0, 1, 3)
        if is_needed and (name not in NEEDED or available.get(name) is False):
            lacking = "has no signs" if name == "pos_edge_index" else f"has no {name}"
            raise UserError(
                f"{where} needs `{name}`, but the graph {lacking}; add it to the graph"
            )
        if available.get(name):
            chosen.append(name)
    return tuple(chosen)


def _without_normalisation(
    conv: nn.Module, given: tuple[str, ...], where: str
) -> tuple[nn.Module, Operator, tuple[str, ...]]:
    """A twin with the same weights that takes its normalisation from outside."""
    twin: Any = copy.copy(conv)  # shares the parameters, not the settings
    if getattr(twin, "cached", False):
        twin.cached = False
    name = next((c.__name__ for c in type(conv).__mro__ if c.__name__ in NORMALISED), None)
    if name is None or not twin.normalize:
        return twin, "edges", given
    if getattr(twin, "improved", False):
        raise UserError(f"{where} with improved=True is not supported; set improved=False")
    twin.normalize = False
    has_loops = getattr(twin, "add_self_loops", name != "LGConv")
    return (
        twin,
        "edges_gcn" if has_loops else "edges_sym",
        tuple(dict.fromkeys((*given, NORMALISED[name]))),
    )


def _misfit(
    conv: nn.Module, layer: BlockLayer, *, facts: EdgeFacts, arguments: tuple[str, ...]
) -> str | None:
    """Why a block layer is not the convolution; None if it is."""
    try:
        largest = difference(conv, layer, facts=facts, whole_arguments=arguments)
    except Exception as error:  # whatever the convolution raises is the reason
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None if largest < TOLERANCE else f"differs by {largest:.2g}"


def _leading_rowwise(modules: Sequence[nn.Module]) -> list[nn.Module]:
    found = []
    for module in modules:
        if isinstance(module, Layer) or is_convolution(module):
            break
        found.append(module)
    return found


def _rowwise(module: nn.Module, in_channels: int, where: str) -> Layer:
    """A row-wise layer, after a check that the module is row-wise."""
    twin = copy.deepcopy(module).double().eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, in_channels, generator=generator).double()
    try:
        with torch.no_grad():
            out, part = twin(x.clone()), twin(x[:2].clone())
    except Exception as error:  # whatever the module raises is the reason
        text = (str(error).splitlines() or [""])[0]
        raise UserError(f"{where} cannot run on rows of width {in_channels}: {text}") from error
    is_rows = isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[0] == 4
    if not is_rows or not torch.allclose(out[:2], part, rtol=0, atol=1e-9):
        raise UserError(
            f"{where} must map each row by itself; normalise rows, not the whole graph "
            "(nn.LayerNorm, or torch_geometric's LayerNorm with mode=node)"
        )
    return RowWiseLayer(module, in_channels=in_channels, out_channels=int(out.shape[1]))


def _refuse_coupling(module: nn.Module, where: str) -> None:
    for part in module.modules():
        name = type(part).__name__
        if name.startswith(COUPLING):
            raise UserError(
                f"{where} holds a {name}, whose statistics would be those of a chunk; "
                "use nn.LayerNorm, which normalises each row"
            )


def _is_lazy(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, nn.UninitializedParameter)
