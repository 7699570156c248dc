"""Trains an 8-layer residual GraphSAGE on ogbn-papers100M, stages times ways.

    torchrun --nproc_per_node 8 examples/ogbn_papers100m.py data.root=/data/ogb
    python -m launch local --nproc 8 examples/configs/ogbn_papers100m.yaml data.root=/data/ogb
    python -m launch ray examples/configs/ogbn_papers100m.yaml data.root=/data/ogb

111 million papers, features memory-mapped from the archive. Cut the graph once beforehand and
give every run its path:

    python -m partition --dataset ogbn-papers100m --root /data/ogb --num-chunks 64 --num-ways 2 \
        --method bfs --out /data/papers
    torchrun --nproc_per_node 8 examples/ogbn_papers100m.py partition.path=/data/papers
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch_geometric.nn import DeepGCNLayer, SAGEConv

from gnnpipe.config import load_config
from gnnpipe.trainer import Trainer

FEATURES, WIDTH, CLASSES, DEPTH = 128, 128, 172, 8

configs = Path(__file__).with_name("configs")
config = load_config(str(configs / "ogbn_papers100m.yaml"), sys.argv[1:])

# Every rank builds the same list: the same seed gives the same weights.
torch.manual_seed(config.seed)
layers: list[nn.Module] = [nn.Linear(FEATURES, WIDTH)]
for _ in range(DEPTH):
    conv = SAGEConv(WIDTH, WIDTH)
    layers += [DeepGCNLayer(conv, nn.LayerNorm(WIDTH), nn.ReLU(), block="res+", dropout=0.2)]
layers += [nn.LayerNorm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)]

summary = Trainer(config, layers=layers).fit()

if summary:  # empty on every rank but the first
    print(f"best epoch {summary['best_epoch']}: test accuracy {summary['test_at_best']:.4f}")
    print(f"median epoch {summary['median_epoch_s']:.3f} s on {summary['world_size']} rank(s)")
