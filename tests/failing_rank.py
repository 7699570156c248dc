"""One rank of a run in which something happens to rank 1 in epoch 2.

``failing_rank.py HOW TIMEOUT_S DIRECTORY`` stands in for ``python -m gnnpipe train``: same
processes, same messages, same exit.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

from gnnpipe.cli import guarded
from gnnpipe.config import load_config
from gnnpipe.environment import end_with_parent
from gnnpipe.models import build_layers
from gnnpipe.models.gcn import GCNLayer
from gnnpipe.models.layer import GraphView
from gnnpipe.trainer import Trainer

NUM_CHUNKS = 4
TROUBLE = "trouble"
"""A file of this name is made when it happens."""


class TroubledLayer(GCNLayer):
    """A convolution that fails in the first chunk of epoch 2."""

    def __init__(self, channels: int, how: str, directory: Path) -> None:
        super().__init__(channels, channels)
        self.calls_left = 1 + NUM_CHUNKS  # the warm start, then epoch 1
        self.how = how
        self.directory = directory

    def forward(self, x: Tensor, graph: GraphView) -> Tensor:
        self.calls_left -= 1
        if self.calls_left < 0:
            (self.directory / TROUBLE).touch()
            if self.how == "raise":
                raise RuntimeError("the layer broke\nin two lines")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.how])
        return super().forward(x, graph)


def train(how: str, timeout_s: str, directory: Path, *, num_stages: int = 3) -> None:
    """Trains six layers on the graph in ``directory``; the third is the troubled one."""
    config = load_config(
        None,
        [
            f"data.name={directory / 'graph.npz'}",
            f"partition.num_chunks={NUM_CHUNKS}",
            "partition.method=contiguous",
            f"parallel.num_stages={num_stages}",
            f"parallel.layers_per_stage={[6 // num_stages] * num_stages}",
            "model.name=gcn",
            "model.num_layers=4",
            f"run.dir={directory / 'run'}",
            "run.tensorboard=false",
            "run.threads=1",
            f"run.timeout_s={timeout_s}",
        ],
    )
    counts = {"in_channels": 5, "hidden_channels": 8, "out_channels": 3, "num_layers": 4}
    with torch.device("meta"):
        layers = build_layers("gcn", **counts, dropout=0.0, options={})
        layers[2] = TroubledLayer(8, how, directory)
    Trainer(config, layers=layers).fit()


def main(how: str, timeout_s: str, directory: str) -> int:
    train(how, timeout_s, Path(directory))
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(guarded(lambda: main(*sys.argv[1:])))
