"""Trains an 8-layer GraphSAGE of torch_geometric modules on ogbn-products through a pipeline.

    torchrun --nproc_per_node 4 examples/ogbn_products.py data.root=/data/ogb
    python -m launch local --nproc 4 examples/configs/ogbn_products.yaml data.root=/data/ogb
    python -m launch ray examples/configs/ogbn_products.yaml data.root=/data/ogb

The last two train the configuration's own GraphSAGE, the first the list of modules below.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch_geometric.nn import DeepGCNLayer, SAGEConv

from gnnpipe.config import load_config
from gnnpipe.trainer import Trainer

FEATURES, WIDTH, CLASSES, DEPTH = 100, 128, 47, 8

configs = Path(__file__).with_name("configs")
config = load_config(str(configs / "ogbn_products.yaml"), sys.argv[1:])

# Every rank builds the same list: the same seed gives the same weights.
torch.manual_seed(config.seed)
layers: list[nn.Module] = [nn.Linear(FEATURES, WIDTH)]
for _ in range(DEPTH):
    conv = SAGEConv(WIDTH, WIDTH)
    layers += [DeepGCNLayer(conv, nn.LayerNorm(WIDTH), nn.ReLU(), block="res+", dropout=0.3)]
layers += [nn.LayerNorm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)]

summary = Trainer(config, layers=layers).fit()

if summary:  # empty on every rank but the first
    print(f"best epoch {summary['best_epoch']}: test accuracy {summary['test_at_best']:.4f}")
    print(f"median epoch {summary['median_epoch_s']:.3f} s on {summary['world_size']} rank(s)")
