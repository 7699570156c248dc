"""Trains a 16-layer GAT that reads edge attributes on ogbn-proteins through a pipeline.

    torchrun --nproc_per_node 4 examples/ogbn_proteins.py data.root=/data/ogb
    python -m launch local --nproc 4 examples/configs/ogbn_proteins.yaml data.root=/data/ogb
    python -m launch ray examples/configs/ogbn_proteins.yaml data.root=/data/ogb

The last two train the configuration's own ResGCN+, which does not read edge attributes. The 112
tasks are judged by OGB's metric, the mean of their ROC-AUC.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch_geometric.nn import DeepGCNLayer, GATConv

from gnnpipe.config import load_config
from gnnpipe.trainer import Trainer

# The data set has no node features: it is given the mean of the 8 attributes of the in-edges.
FEATURES, WIDTH, TASKS, DEPTH, HEADS = 8, 64, 112, 16, 4

configs = Path(__file__).with_name("configs")
config = load_config(str(configs / "ogbn_proteins.yaml"), sys.argv[1:])

# Every rank builds the same list: the same seed gives the same weights.
torch.manual_seed(config.seed)
layers: list[nn.Module] = [nn.Linear(FEATURES, WIDTH)]
for _ in range(DEPTH):
    conv = GATConv(WIDTH, WIDTH // HEADS, heads=HEADS, edge_dim=FEATURES)
    layers += [DeepGCNLayer(conv, nn.LayerNorm(WIDTH), nn.ReLU(), block="res+", dropout=0.1)]
layers += [nn.LayerNorm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, TASKS)]

summary = Trainer(config, layers=layers).fit()

if summary:  # empty on every rank but the first
    print(f"best epoch {summary['best_epoch']}: test ROC-AUC {summary['test_at_best']:.4f}")
    print(f"median epoch {summary['median_epoch_s']:.3f} s on {summary['world_size']} rank(s)")
