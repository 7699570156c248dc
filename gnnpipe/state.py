"""What a rank puts into a checkpoint and takes out again, under names that no rank appears in.

``layers.{i}.{parameter}``, ``optimizer.layers.{i}.{parameter}.{key}``, ``history.{i}`` (own rows,
beside ``node_id``), ``moments.{i}.{norm}`` (sums over each chunk's rows), ``earlier.{i}`` and
``slope.{i}`` where histories are predicted, ``late.{i}`` where gradients are kept. Weights, their
optimizer's moments and norms' are equal on all ways, so way 0 writes them; each way writes the
rows that it owns. Mirrors are copies: they are pulled again from their owners, unless messages
round; then what a way has received is its own, ``mirrors.{i}.{way}of{ways}`` of values and
``late_mirrors.{i}.{way}of{ways}`` of kept gradients.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gnnpipe.models.layer import Layer
from gnnpipe.shards import NODE_ID, Shards
from gnnpipe.stage import LocalLayer

Layers = Sequence[tuple[int, nn.Module]]
"""Index in the model and layer."""


def named_state(layers: Sequence[tuple[int, Layer]] | Layers) -> dict[str, Tensor]:
    """Weights as files name them, ``layers.{index}.{parameter}``."""
    return {
        f"layers.{index}.{name}": tensor
        for index, layer in layers
        for name, tensor in layer.state_dict().items()
    }


def load_state(
    layers: Sequence[tuple[int, Layer]] | Layers, tensors: Mapping[str, Tensor]
) -> None:
    """Overwrites weights with those of the same names."""
    with torch.no_grad():
        for name, tensor in named_state(layers).items():
            tensor.copy_(tensors[name])


def model_state(layers: Layers, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights, running statistics and the optimizer's tensors by name."""
    tensors = named_state(layers)
    for name, parameter in _parameters(layers).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    return tensors


def load_model_state(layers: Layers, optimizer: Optimizer, shards: Shards) -> None:
    """Overwrites weights, running statistics and the optimizer's tensors."""
    wanted = named_state(layers)
    load_state(layers, {name: shards.tensor(name, t.shape) for name, t in wanted.items()})
    names = {parameter: name for name, parameter in _parameters(layers).items()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for number, parameter in enumerate(ordered):
        prefix = f"optimizer.{names[parameter]}."
        held = {
            name.removeprefix(prefix): shards.tensor(name).clone() for name in shards.names(prefix)
        }
        if held:
            state[number] = held
    # Through the optimizer, which knows which tensor belongs on which device.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def history_state(layers: Iterable[LocalLayer]) -> dict[str, Tensor]:
    """The historical values of this way's own rows, by layer, and whose they are."""
    tensors = {}
    for local in layers:
        if local.table is not None:
            rows = local.cells.whole.rows
            tensors[f"history.{local.layer_index}"] = local.table.historical[rows]
            tensors[NODE_ID] = local.cells.whole.node_id
            if local.table.late is not None:
                tensors[f"late.{local.layer_index}"] = local.table.late.rows[rows]
            recall = local.table.recall
            if recall is not None and recall.before is not None:
                tensors[f"earlier.{local.layer_index}"] = recall.before
                tensors[f"slope.{local.layer_index}"] = torch.tensor(
                    recall.slope, dtype=torch.float64
                )
    return tensors


def moment_state(layers: Iterable[LocalLayer]) -> dict[str, Tensor]:
    """What norms know of each chunk, by layer and norm; the same on all ways."""
    return {
        f"moments.{local.layer_index}.{moments.name}": moments.sums
        for local in layers
        for moments in local.norms.values()
    }


def load_moments(layers: Iterable[LocalLayer], shards: Shards) -> None:
    """Overwrites what norms know of each chunk."""
    for name, sums in moment_state(layers).items():
        sums.copy_(shards.tensor(name, sums.shape))


def load_history(local: LocalLayer, shards: Shards) -> None:
    """Overwrites the historical values and kept gradients of this way's own rows of one layer.

    A branch may keep gradients where its checkpoint has none; they start anew.
    """
    assert local.table is not None
    cell, late, index = local.cells.whole, local.table.late, local.layer_index
    rows = shards.rows(f"history.{index}", cell.node_id)
    local.table.values[cell.rows] = rows.to(local.table.values)
    if late is not None and f"late.{index}" in shards:
        late.rows[cell.rows] = shards.rows(f"late.{index}", cell.node_id).to(late.rows)


def mirror_state(layers: Iterable[LocalLayer], place: str) -> dict[str, Tensor]:
    """What this way's mirrors hold from epoch to epoch, by layer, and whose they are.

    Args:
        layers: of this rank.
        place: this way among how many, ``{way}of{ways}``.
    """
    tensors = {}
    for local in layers:
        if local.table is not None:
            for kind, rows, node_id in _mirrors(local, local.table.historical):
                tensors[f"{kind}mirrors.{local.layer_index}.{place}"] = rows
                tensors[f"{kind}mirror_id.{place}"] = node_id
    return tensors


def load_mirrors(local: LocalLayer, shards: Shards, place: str) -> None:
    """Overwrites the mirrors of one layer by those that a checkpoint has of the very nodes."""
    assert local.table is not None
    for kind, rows, node_id in _mirrors(local, local.table.values):
        name = f"{kind}mirrors.{local.layer_index}.{place}"
        if name in shards and torch.equal(shards.tensor(f"{kind}mirror_id.{place}"), node_id):
            rows.copy_(shards.tensor(name))


def _mirrors(local: LocalLayer, values: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Kind, rows and nodes of the mirrors of a layer's values and of its kept gradients."""
    assert local.table is not None
    cells, late = local.cells, local.table.late
    yield "", values[cells.whole.in_mirrors], cells.mirror_id
    if late is not None:
        yield "late_", late.rows[cells.whole.out_mirrors], cells.out_mirror_id


def load_recall(local: LocalLayer, shards: Shards) -> None:
    """Overwrites what a layer's table remembers beside its last values.

    A branch may predict where its checkpoint does not; that starts anew.
    """
    assert local.table is not None
    recall, index = local.table.recall, local.layer_index
    if recall is not None and recall.before is not None and f"earlier.{index}" in shards:
        rows = shards.rows(f"earlier.{index}", local.cells.whole.node_id)
        recall.before.copy_(rows)
        recall.slope = float(shards.tensor(f"slope.{index}"))


def _parameters(layers: Layers) -> dict[str, nn.Parameter]:
    return {
        f"layers.{index}.{name}": parameter
        for index, layer in layers
        for name, parameter in layer.named_parameters()
    }
