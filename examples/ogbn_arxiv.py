"""Trains a 16-layer GCNII of torch_geometric modules on ogbn-arxiv through a pipeline.

    python examples/ogbn_arxiv.py parallel.num_stages=1
    torchrun --nproc_per_node 4 examples/ogbn_arxiv.py data.root=/data/ogb
    python -m launch local --nproc 4 examples/configs/ogbn_arxiv.yaml data.root=/data/ogb
    python -m launch ray examples/configs/ogbn_arxiv.yaml data.root=/data/ogb

The last two train the configuration's own GCNII, the first two the list of modules below. A
copy of the data without features trains with data.features=surrogate, which is not comparable
with OGB's leaderboard.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch_geometric.nn import GCN2Conv

from gnnpipe.config import load_config
from gnnpipe.trainer import Trainer

FEATURES, WIDTH, CLASSES, DEPTH = 128, 128, 40, 16

configs = Path(__file__).with_name("configs")
config = load_config(str(configs / "ogbn_arxiv.yaml"), sys.argv[1:])

# Every rank builds the same list: the same seed gives the same weights.
torch.manual_seed(config.seed)
layers: list[nn.Module] = [nn.Linear(FEATURES, WIDTH), nn.ReLU()]
for layer in range(1, DEPTH + 1):
    layers += [
        nn.Dropout(0.1),
        GCN2Conv(WIDTH, alpha=0.5, theta=1.0, layer=layer),
        nn.LayerNorm(WIDTH),
        nn.ReLU(),
    ]
layers += [nn.Linear(WIDTH, CLASSES)]

summary = Trainer(config, layers=layers).fit()

if summary:  # empty on every rank but the first
    print(f"best epoch {summary['best_epoch']}: test accuracy {summary['test_at_best']:.4f}")
    print(f"median epoch {summary['median_epoch_s']:.3f} s on {summary['world_size']} rank(s)")
