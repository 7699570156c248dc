"""Mini-batch training as Cluster-GCN does it, of plain torch_geometric layers on torch CSR.

Chiang et al., "Cluster-GCN: an efficient algorithm for training deep and large graph convolutional
networks": a batch is a union of clusters, with the edges inside it and no others.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from gnnpipe.config import Config
from gnnpipe.configured import configured_updates
from gnnpipe.graph import Graph
from gnnpipe.models.plain import PlainModel
from gnnpipe.optimizer import averaged_weights, make_optimizer


class Batch(NamedTuple):
    """Some nodes with the edges among them."""

    x: Tensor
    """Features, dense or CSR."""
    matrix: Tensor
    """``D^-1/2 (A + I) D^-1/2`` with the batch's own degrees, CSR."""
    labels: Tensor
    train: Tensor
    """Rows to learn from."""


class Clusters:
    """One training run.

    Args:
        graph: undirected, with single labels.
        config: model and training.
        chunk_id: cluster of each node.
        steps: batches of an epoch.
        weights: initial, as a run's files name them.
    """

    def __init__(
        self,
        graph: Graph,
        config: Config,
        *,
        chunk_id: Any,
        steps: int,
        weights: dict[str, Tensor],
    ) -> None:
        self._graph, self._chunk_id, self._steps = graph, chunk_id, steps
        self._seed, self._p = config.seed, config.model.dropout
        arrays = np.ones(graph.num_edges, np.float32), graph.indices, graph.indptr
        self._adjacency = sparse.csr_array(arrays, shape=(graph.num_nodes,) * 2)
        self._model = PlainModel(config.model, graph.num_features, graph.num_classes)
        with torch.no_grad():
            for name, weight in self._model.named_parameters():
                weight.copy_(weights[self._model.name_of(name)])
        for conv in self._model.convs:
            conv.normalize = False  # Once for each batch, not in every layer.
        updates = configured_updates(config)
        self._optimizer = make_optimizer(self._model.parameters(), updates)
        torch.manual_seed(config.seed)
        self._whole = self._batch(np.arange(graph.num_nodes))

    def train_epoch(self, epoch: int) -> float:
        """One pass over all clusters; returns the seconds of making batches."""
        draw = np.random.default_rng((self._seed, epoch))
        order = draw.permutation(int(self._chunk_id.max()) + 1)
        seconds = 0.0
        for group in np.array_split(order, self._steps):
            start_s = time.perf_counter()
            batch = self._batch(np.flatnonzero(np.isin(self._chunk_id, group)))
            seconds += time.perf_counter() - start_s
            if not len(batch.train):
                continue
            self._optimizer.zero_grad()
            scores = self._forward(batch, is_training=True)
            functional.cross_entropy(scores[batch.train], batch.labels[batch.train]).backward()
            self._optimizer.step()
        return seconds

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Accuracy of validation and test nodes, on the whole graph."""
        labels = self._whole.labels
        with averaged_weights(self._optimizer):
            scores = self._forward(self._whole, is_training=False)
        right = (scores.argmax(1) == labels).double()
        masks = (self._graph.val_mask, self._graph.test_mask)
        known = [torch.from_numpy(mask) & (labels >= 0) for mask in masks]
        return float(right[known[0]].mean()), float(right[known[1]].mean())

    def _forward(self, batch: Batch, *, is_training: bool) -> Tensor:
        """As the module's own forward, but for features that may be sparse."""
        model, p = self._model, self._p
        x, first = batch.x, model.first
        if x.layout == torch.sparse_csr:
            values = functional.dropout(x.values(), p, is_training)
            x = torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape)
            h0 = (torch.sparse.mm(x, first.weight.T) + first.bias).relu()
        else:
            h0 = first(functional.dropout(x, p, is_training)).relu()
        h = h0
        for conv in model.convs:
            h = conv(functional.dropout(h, p, is_training), h0, batch.matrix).relu()
        scores: Tensor = model.last(functional.dropout(h, p, is_training))
        return scores

    def _batch(self, nodes: Any) -> Batch:
        graph, features = self._graph, self._graph.features[nodes]
        inside = self._adjacency[nodes][:, nodes]
        inside = inside + sparse.eye_array(len(nodes), dtype=np.float32)
        scale = sparse.diags_array(np.asarray(inside.sum(axis=1), np.float32) ** -0.5)
        is_trained = graph.train_mask[nodes] & (graph.labels[nodes] >= 0)
        dense = not sparse.issparse(features)
        return Batch(
            torch.from_numpy(features) if dense else _csr(features),
            _csr((scale @ inside @ scale).tocsr()),
            torch.from_numpy(graph.labels[nodes]),
            torch.from_numpy(np.flatnonzero(is_trained)),
        )


def _csr(rows: Any) -> Tensor:
    """A SciPy matrix as torch's, int64 indices."""
    pointers = (torch.from_numpy(part.astype(np.int64)) for part in (rows.indptr, rows.indices))
    values = torch.from_numpy(rows.data)
    return torch.sparse_csr_tensor(*pointers, values, size=rows.shape)
