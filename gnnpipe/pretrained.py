"""A trained model as one plain module on one device, for graphs of any size that fits there."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gnnpipe.config import Config, load_config
from gnnpipe.errors import UserError
from gnnpipe.full_graph import FullGraph, FullGraphView
from gnnpipe.graph import Graph
from gnnpipe.models.layer import Layer
from gnnpipe.run_directory import CONFIG_FILE, WEIGHTS_DIR
from gnnpipe.runs import layers_between
from gnnpipe.state import load_state, named_state
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
        layers: Sequence[Layer] | None = None,
    ) -> "PretrainedModel":
        """Loads what a run has saved; no graph is needed.

        Args:
            run_dir: a run directory.
            weights: ``best`` or ``last``.
            device: where the module is to be.
            layers: the model, if it is not the configured one.

        Raises:
            UserError: the weights are missing, damaged or of another model.
        """
        directory = Path(run_dir)
        config = load_config(str(directory / CONFIG_FILE))
        tensors, _ = load_weights(directory / WEIGHTS_DIR / f"{weights}.safetensors")
        own = list(enumerate(_built(config, tensors) if layers is None else layers))
        check_weights(tensors, {name: t.shape for name, t in named_state(own).items()})
        dtype = next(iter(tensors.values())).dtype
        model = cls([layer for _, layer in own]).to_empty(device="cpu").to(dtype)
        load_state(own, tensors)
        return model.to(device).eval()

    @torch.no_grad()
    def forward(self, graph: Graph) -> Tensor:
        """Class scores of every node ``[N, num_classes]``, in the graph's own order."""
        like = next(self.parameters())
        full = FullGraph(graph, dtype=like.dtype, device=like.device)
        carried: dict[str, Tensor] = {}
        x = full.features
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x = layer(x, FullGraphView(full, layer.operator, carried=carried))
        return x


def _built(config: Config, tensors: dict[str, Tensor]) -> list[Layer]:
    """The configured model without storage; its ends are as wide as the weights."""
    first, last = "layers.0.lin.weight", f"layers.{config.model.num_layers + 1}.lin.weight"
    for name in (first, last):
        if name not in tensors:
            raise UserError(f"weights must hold `{name}`; load the weights of this very model")
    return layers_between(config, tensors[first].shape[1], tensors[last].shape[0])
