"""Whole models of torch_geometric as lists of modules, in the order of their forward."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from gnnpipe.errors import UserError
from gnnpipe.models.foreign.jumping import CollectLayer, JumpLayer

BASIC_PARTS = ("convs", "norms", "dropout", "act", "act_first", "jk_mode", "num_layers")


def from_pyg(model: nn.Module) -> list[nn.Module]:
    """Opens a basic GNN of ``torch_geometric.nn.models``, or ``nn.Sequential``.

    Args:
        model: GCN, GraphSAGE, GIN, GAT, PNA, EdgeCNN, with JumpingKnowledge or without. Norms
            must be row-wise (``norm="layer_norm", norm_kwargs={"mode": "node"}``).

    Returns:
        The modules for ``Trainer(layers=...)`` or :func:`gnnpipe.models.foreign.adapt`; they
        are the model's own, so training them trains it.

    Raises:
        UserError: the model has another structure.
    """
    if type(model) is nn.Sequential:
        return list(model)
    missing = [name for name in BASIC_PARTS if not hasattr(model, name)]
    if missing:
        raise UserError(
            f"`model` (={type(model).__name__}) must be a basic GNN of torch_geometric.nn.models "
            f"(it lacks {', '.join(missing)}); give its modules as a list"
        )
    return list(_basic(model))


def _basic(model: Any) -> Iterator[nn.Module]:  # torch_geometric's classes have no types
    mode = None if model.jk_mode in (None, "last") else model.jk_mode
    for i, (conv, norm) in enumerate(zip(model.convs, model.norms, strict=True)):
        yield conv
        if i == model.num_layers - 1 and model.jk_mode is None:
            continue
        acts = [] if model.act is None else [model.act]
        norms = [] if isinstance(norm, nn.Identity) else [norm]
        yield from (*acts, *norms) if model.act_first else (*norms, *acts)
        if model.dropout.p:
            yield model.dropout
        if mode is not None:
            yield CollectLayer(mode, model.hidden_channels, i)
    if mode is not None:
        yield JumpLayer(mode, model.hidden_channels, model.num_layers, module=model.jk)
    if hasattr(model, "lin"):
        yield model.lin
