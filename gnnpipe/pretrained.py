"""A trained model without the pipeline: one plain module on one device, for any graph.

Three ways out of a run directory: :class:`PretrainedModel` runs the run's own layers;
:func:`plain_model` gives a torch_geometric model with the same weights; :func:`load_into` gives
the user's own modules the weights that were trained through them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from gnnpipe import chunk
from gnnpipe.config import Config, load_config
from gnnpipe.configured import layers_between
from gnnpipe.errors import UserError
from gnnpipe.full_graph import FullGraph, FullGraphView
from gnnpipe.graph import Graph
from gnnpipe.models import end_widths
from gnnpipe.models.foreign import EdgeFacts, adapt
from gnnpipe.models.layer import Layer
from gnnpipe.models.norm import GraphNorm
from gnnpipe.models.plain import PlainModel
from gnnpipe.run_directory import CONFIG_FILE, PARTITION_DIR, WEIGHTS_DIR
from gnnpipe.state import load_state, named_state
from gnnpipe.subgraph import checked_nodes, induced, neighbourhood
from gnnpipe.weights import check_weights, load_weights


class PretrainedModel(nn.Module):
    """The layers of a model in a row, in evaluation: ``scores = model(graph)``.

    Args:
        layers: the whole model.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @classmethod
    def from_pretrained(
        cls,
        run_dir: str | Path,
        *,
        weights: str = "best",
        device: str | torch.device = "cpu",
        layers: Sequence[nn.Module] | None = None,
    ) -> "PretrainedModel":
        """Loads what a run has saved; no graph is needed for a configured model.

        Args:
            run_dir: a run directory.
            weights: ``best`` or ``last``.
            device: where the module is to be.
            layers: the model, if it is not the configured one; as for :func:`load_into`.

        Raises:
            UserError: the weights are missing, damaged or of another model.
        """
        config, tensors = _saved(run_dir, weights)
        if layers is not None:
            return cls(load_into(layers, run_dir, weights=weights)).to(device).eval()
        own = _built(config, tensors)
        numbered = list(enumerate(own))
        check_weights(tensors, {name: t.shape for name, t in named_state(numbered).items()})
        dtype = next(iter(tensors.values())).dtype
        model = cls(own).to_empty(device="cpu").to(dtype)
        load_state(numbered, tensors)
        return model.to(device).eval()

    @property
    def num_hops(self) -> int:
        """How far a node sees: layers that look at neighbours."""
        return sum(layer.operator != "none" for layer in self._all)

    @torch.no_grad()
    def forward(self, graph: Graph) -> Tensor:
        """Class scores of every node ``[N, num_classes]``, in the graph's own order."""
        like = next(self.parameters())
        full = FullGraph(graph, dtype=like.dtype, device=like.device)
        carried: dict[str, Tensor] = {}
        x = full.features
        for layer in self._all:
            x = layer(x, FullGraphView(full, layer.operator, carried=carried))
        return x

    def predict(self, graph: Graph, nodes: ArrayLike) -> Tensor:
        """Class scores of a few nodes ``[n, num_classes]``, from what they see alone.

        Taken are the nodes within ``num_hops`` edges, and one hop more, so that every node that
        counts has all its in-edges: the degrees, and so the scores, are those of the whole graph.

        Args:
            graph: the whole; its arrays may be memory-mapped.
            nodes: ids, in any order.

        Raises:
            UserError: no such nodes; or a layer that needs out-degrees, on a directed graph; or
                one that normalises by the whole graph.
        """
        if any(isinstance(part, GraphNorm) for part in self.modules()):
            raise UserError(
                "`nodes` cannot be served alone: `model.norm` (=graph) normalises by the whole "
                "graph; call the model on it"
            )
        wanted = checked_nodes(graph, nodes)
        if graph.is_directed and any(layer.operator == "laplacian" for layer in self._all):
            raise UserError(
                "`nodes` cannot be served alone: a layer (ChebConv) normalises by the out-degrees "
                "of a directed graph; call the model on the whole graph"
            )
        node_id = neighbourhood(graph, wanted, self.num_hops + 1)
        scores: Tensor = self(induced(graph, node_id))  # [len(node_id), num_classes]
        rows = torch.from_numpy(node_id.searchsorted(wanted))
        return scores[rows.to(scores.device)]

    @property
    def _all(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]


def plain_model(run_dir: str | Path, *, weights: str = "best") -> PlainModel:
    """The model of a run as torch_geometric's modules, in evaluation mode.

    Args:
        run_dir: a run directory of a configured model.
        weights: ``best`` or ``last``.

    Raises:
        UserError: torch_geometric has no such model, or the weights are not sound.
    """
    config, tensors = _saved(run_dir, weights)
    widths = end_widths(config.model.name, config.model.num_layers, tensors)
    plain = PlainModel(config.model, *widths)
    plain.to(next(iter(tensors.values())).dtype)
    # Not the whole state: GIN's constant eps is no weight.
    saved = [*plain.named_parameters(), *plain.running_statistics()]
    named = {plain.name_of(name): weight for name, weight in saved}
    check_weights(tensors, {name: weight.shape for name, weight in named.items()})
    with torch.no_grad():
        for name, weight in named.items():
            weight.copy_(tensors[name])
    return plain.eval()


def load_into(
    modules: Sequence[nn.Module],
    run_dir: str | Path,
    *,
    weights: str = "best",
    graph: Graph | None = None,
) -> list[Layer]:
    """Gives modules the weights that a run has trained through such modules.

    Args:
        modules: as ``Trainer(layers=...)`` was given, or ``from_pyg(model)``: these very modules
            have the weights afterwards, so plain torch_geometric code serves with them.
        run_dir: the run's directory.
        weights: ``best`` or ``last``.
        graph: says what edges carry and how wide features are, where the run's own partition is
            not at hand.

    Returns:
        The layers around the modules.

    Raises:
        UserError: the weights are missing, damaged or of another model.
    """
    config, tensors = _saved(run_dir, weights)
    known = graph
    if known is None:
        path = Path(config.partition.path or Path(run_dir) / PARTITION_DIR)
        facts_of = chunk.load(path)
        facts, width = EdgeFacts.of(facts_of), facts_of.num_features
    else:
        facts, width = EdgeFacts.of(known), known.num_features
    dtype = next(iter(tensors.values())).dtype
    for module in modules:
        module.to(dtype)
    layers = adapt(modules, in_channels=width, facts=facts)
    own = list(enumerate(layers))
    check_weights(tensors, {name: t.shape for name, t in named_state(own).items()})
    load_state(own, tensors)
    return layers


def _saved(run_dir: str | Path, weights: str) -> tuple[Config, dict[str, Tensor]]:
    directory = Path(run_dir)
    config = load_config(str(directory / CONFIG_FILE))
    return config, load_weights(directory / WEIGHTS_DIR / f"{weights}.safetensors")[0]


def _built(config: Config, tensors: dict[str, Tensor]) -> list[Layer]:
    """The configured model without storage; its ends are as wide as the weights."""
    widths = end_widths(config.model.name, config.model.num_layers, tensors)
    return layers_between(config, *widths)
