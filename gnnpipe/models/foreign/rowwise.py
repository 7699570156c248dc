"""Modules that map each row by itself: Linear, activations, LayerNorm, Dropout, Sequential."""

import copy

from torch import Tensor, nn

from gnnpipe.kernels import SparseRows, linear
from gnnpipe.models.cost import dense_flops
from gnnpipe.models.foreign.run import dense, foreign, reset
from gnnpipe.models.layer import GraphView, Layer


class RowWiseLayer(Layer):
    """Applies a module to the rows.

    ``nn.Dropout`` becomes the pipeline's counter-based dropout, so that its masks do not depend
    on the chunks; ``nn.Linear`` multiplies sparse input features without making them dense.

    Args:
        module: maps ``[num_rows, in_channels]`` to ``[num_rows, out_channels]`` row by row.
        in_channels: width of the input.
        out_channels: width of the output.
    """

    def __init__(self, module: nn.Module, *, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.module = module
        self.in_channels = in_channels
        self.out_channels = out_channels

    def forward(self, x: Tensor | SparseRows, graph: GraphView) -> Tensor:
        """Maps the rows."""
        return dense(_apply(self.module, x, graph))

    def reset_parameters(self) -> None:
        """Draws the module's weights by its own rule."""
        reset(self.module)

    def cost(self, num_nodes: int, num_edges: int) -> float:
        """A product with every weight."""
        weights = sum(p.numel() for p in self.module.parameters() if p.ndim == 2)
        return dense_flops(num_nodes, weights + self.out_channels, 1)


def _apply(module: nn.Module, x: Tensor | SparseRows, graph: GraphView) -> Tensor | SparseRows:
    match module:
        case nn.Sequential():
            for child in module:
                x = _apply(child, x, graph)
            return x
        case nn.Dropout():
            # One by one: the two kinds of rows are one type variable.
            if isinstance(x, Tensor):
                return graph.dropout(x, module.p)
            return graph.dropout(x, module.p)
        case nn.Identity():
            return x
        case nn.Linear() if type(module) is nn.Linear:
            return linear(x, module.weight, module.bias)
    with foreign(module, graph):
        # The input may be a leaf of autograd, which must not be overwritten.
        out: Tensor = _out_of_place(module)(dense(x))
    return out


def _out_of_place(module: nn.Module) -> nn.Module:
    if not getattr(module, "inplace", False):
        return module
    twin = copy.copy(module)
    twin.inplace = False  # type: ignore[assignment]
    return twin
