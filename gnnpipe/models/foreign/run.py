"""How a foreign module is run: in the right mode, and with random numbers of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gnnpipe.kernels import SparseRows
from gnnpipe.models.layer import GraphView


@contextmanager
def foreign(module: nn.Module, graph: GraphView) -> Iterator[None]:
    """Lets a module draw from torch's generator as a function of the seed and the place.

    While training the generator is forked and seeded from (seed, epoch, layer, chunk, way);
    evaluation puts the module into evaluation mode.
    """
    seed = graph.foreign_seed()
    if module.training != (seed is not None):
        module.train(seed is not None)
    if seed is None:
        yield
        return
    devices = {p.device for p in module.parameters() if p.device.type != "cpu"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed >> 1)
        yield


def dense(x: Tensor | SparseRows) -> Tensor:
    """Rows as a dense tensor; modules of others know no sparse ones."""
    if isinstance(x, Tensor):
        return x
    out = x.values.new_zeros(x.shape)
    row = torch.arange(x.shape[0], device=out.device).repeat_interleave(x.indptr.diff())
    return out.index_put_((row, x.indices.long()), x.values, accumulate=True)


def reset(module: nn.Module) -> None:
    """Draws a module's weights anew, from torch's global generator."""
    if callable(getattr(module, "reset_parameters", None)):
        module.reset_parameters()  # type: ignore[operator]
        return
    for child in module.children():
        reset(child)
