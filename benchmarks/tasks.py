"""Every kind of task on a real graph, beside what a constant and a network without edges reach.

    python benchmarks/tasks.py --data ../shared/data        goes on where it was stopped

All models, the baseline too, are trained by the pipeline in one process: 8 chunks,
weights of the best validation epoch. The baseline is a perceptron on the same features and
split. Where a graph has no labels of a kind, they are derived from what it has; see `CASES`.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import nn

from gnnpipe.config import Config, from_dict
from gnnpipe.configured import configured_task
from gnnpipe.datasets import load_graph
from gnnpipe.graph import Graph
from gnnpipe.links import link_graph
from gnnpipe.losses import Targets
from gnnpipe.subgraph import induced
from gnnpipe.trainer import Trainer

WORDS = 20
LAST_YEAR = 2013
WIDTH = 64

Layers = Callable[[Graph], list[nn.Module]]


class Case(NamedTuple):
    """One row of the table."""

    data: str
    labels: str
    """What is predicted, in words."""
    graph: Callable[[Path], Graph]
    values: dict[str, Any]
    """Configuration of the graph network."""
    layers: Layers | None = None
    """The network, if it is not a configured one."""
    epochs: int = 30
    """Enough for the validation figures of both networks to level off, or to be told apart."""


def own(name: str) -> Callable[[Path], Graph]:
    """The graph as it is."""
    return lambda data: load_graph(str(data / f"{name}.npz"))


def words_of_reviews(data: Path) -> Graph:
    """amazon_computers: which of 20 words a product's reviews hold; those are no features then.

    Taken are the words that come nearest to being in the reviews of half the products.
    """
    graph = load_graph(str(data / "amazon_computers.npz"))
    table = sparse.csc_array(graph.features)
    share = np.diff(table.indptr) / graph.num_nodes
    chosen = np.argsort(np.abs(share - 0.5), kind="stable")[:WORDS]
    rest = np.setdiff1d(np.arange(table.shape[1]), chosen)
    labels = (table[:, chosen].toarray() > 0).astype(np.int64)
    features = sparse.csr_array(table[:, rest])
    return replace(graph, features=features, labels=labels, num_classes=WORDS)


def workers_as_a_task(data: Path) -> Graph:
    """tolokers: banned or not as one yes-or-no task, judged by ROC-AUC as its authors do."""
    graph = load_graph(str(data / "tolokers.npz"))
    return replace(graph, labels=graph.labels[:, None], num_classes=1)


def traffic(data: Path) -> Graph:
    """chameleon: the class is the quintile of a page's traffic; here it is a number."""
    graph = load_graph(str(data / "chameleon.npz"))
    labels = graph.labels[:, None].astype(np.float32) - 2.0
    return replace(graph, labels=labels, num_classes=1)


def links(data: Path) -> Graph:
    """cora: 15% of the links are held out; the embedding is as wide as the hidden rows."""
    return link_graph(load_graph(str(data / "cora.npz")), channels=WIDTH)


def citations(data: Path) -> Graph:
    """ogbn-arxiv up to 2013: citations (type 0) and, the other way, being cited (type 1).

    Papers of 2013 are tested, those of 2012 validate. Features are surrogates, made from these
    papers' citations alone.
    """
    with np.load(data / "ogbn_arxiv.npz", allow_pickle=False) as file:
        year = file["node_year"]
    old = np.flatnonzero(year <= LAST_YEAR)
    part = induced(load_graph(str(data / "ogbn_arxiv.npz"), features="degree"), old)
    target = np.repeat(np.arange(part.num_nodes), np.diff(part.indptr))
    forward = np.stack((part.indices.astype(np.int64), target))  # source cites target
    return Graph.from_edge_index(
        np.concatenate((forward, forward[::-1]), axis=1),
        edge_type=np.repeat([0, 1], part.num_edges),
        name="ogbn_arxiv",
        labels=part.labels,
        num_classes=part.num_classes,
        features=surrogate(part),
        train_mask=year[old] < LAST_YEAR - 1,
        val_mask=year[old] == LAST_YEAR - 1,
        test_mask=year[old] == LAST_YEAR,
    )


def surrogate(graph: Graph) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Features from the papers there are, so that none knows of later citations."""
    from gnnpipe.datasets.features import surrogate_features

    return surrogate_features(graph, seed=0)


def relational(graph: Graph) -> list[nn.Module]:
    """Two R-GCN layers."""
    from torch_geometric.nn import RGCNConv

    layers: list[nn.Module] = [nn.Linear(graph.num_features, WIDTH), nn.ReLU()]
    for _ in range(2):
        layers += [RGCNConv(WIDTH, WIDTH, num_relations=2), nn.ReLU(), nn.Dropout(0.3)]
    return [*layers, nn.Linear(WIDTH, graph.num_classes)]


def perceptron(graph: Graph) -> list[nn.Module]:
    """Two hidden layers; no edge is read."""
    return [
        nn.Dropout(0.5),
        nn.Linear(graph.num_features, WIDTH),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, graph.num_classes),
    ]


def model(name: str, num_layers: int, **more: Any) -> dict[str, Any]:
    """The model section."""
    sizes = {"num_layers": num_layers, "hidden_channels": WIDTH, "dropout": 0.5}
    return {"model": {"name": name, **sizes, **more}}


CASES: dict[str, Case] = {
    "single_label": Case("cora", "subject", own("cora"), model("gcnii", 8)),
    "multi_label": Case(
        "amazon_computers", "20 words", words_of_reviews, model("sage", 2), epochs=60
    ),
    "multi_task_auc": Case(
        "tolokers",
        "banned",
        workers_as_a_task,
        {**model("resgcn+", 4, dropout=0.2), "task": {"kind": "multi_task_auc"}},
    ),
    "regression": Case("chameleon", "quintile of traffic", traffic, model("sage", 2)),
    "typed edges": Case("ogbn_arxiv to 2013", "subject", citations, {}, relational, epochs=60),
    "link": Case("cora", "held-out links", links, {**model("gcn", 1), "task": {"kind": "link"}}),
    "inductive": Case(
        "facebook_pages",
        "kind of page",
        own("facebook_pages"),
        {**model("sage", 2, dropout=0.2), "data": {"inductive": True}},
    ),
}


def main() -> int:
    """Trains everything that is not done yet, and writes one table."""
    options = _parser().parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    text = "\n".join(_report(options))
    options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return 0


def _report(options: argparse.Namespace) -> Iterator[str]:
    command = f"python benchmarks/tasks.py --seeds {options.seeds}"
    yield "# Tasks on real graphs"
    yield ""
    yield f"`{command}`; {platform.machine()}, CPU, one thread."
    yield ""
    yield (
        "Test figure at the best validation epoch, mean and standard deviation over seeds of "
        "weights and dropout; the split is fixed. `constant` is the best answer that is the same "
        "for every node, `perceptron` reads no edges and has as many epochs."
    )
    yield ""
    yield "| task | graph | predicted | epochs | metric | constant | perceptron | graph network |"
    yield "| --- | --- | --- | ---: | --- | ---: | ---: | ---: |"
    for name in options.cases:
        case, found = CASES[name], _figures(name, options)
        spreads = [_spread(found[who]) for who in ("perceptron", "network")]
        start = f"| {name} | {case.data} | {case.labels} | {options.epochs or case.epochs} |"
        yield f"{start} {found['metric']} | {found['constant']:.3f} | {' | '.join(spreads)} |"


def _figures(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one case reached: found in ``--work``, or trained now."""
    case = CASES[name]
    path = options.work / f"{name}-{options.epochs or case.epochs}-{options.seeds}.json"
    if not path.exists():
        graph, seeds = case.graph(options.data), range(options.seeds)
        config = configured(case, 0, options)
        found = {
            "metric": configured_task(config, graph).metric,
            "constant": constant(config, graph),
            "perceptron": [trained_figure(case, graph, s, options, perceptron) for s in seeds],
            "network": [trained_figure(case, graph, s, options, case.layers) for s in seeds],
        }
        path.write_text(json.dumps(found))
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def trained_figure(
    case: Case, graph: Graph, seed: int, options: argparse.Namespace, layers: Layers | None
) -> float:
    """Trains once; the test figure of the best validation epoch."""
    torch.manual_seed(seed)
    config = configured(case, seed, options)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=replace(config.run, dir=str(Path(folder) / "run")))
        modules = None if layers is None else layers(graph)
        summary = Trainer(config, graph=graph, layers=modules).fit()
    return float(summary["test_at_best"])


def constant(config: Config, graph: Graph) -> float:
    """The test figure of the best constant scores, judged on the training nodes."""
    task = configured_task(config, graph)
    like = torch.zeros(1)
    labels = task.labels_of(graph.labels, like)
    masks = [graph.train_mask, graph.val_mask, graph.test_mask]
    targets = Targets(labels, torch.from_numpy(np.stack(masks)))
    found = []
    for row in _constants(task.kind, labels[targets.masks[0]], graph.num_classes):
        scores = row.expand(graph.num_nodes, -1)
        figures = task.figures(task.tally(scores, targets))
        found.append((figures["train"] or 0.0, figures["test"] or 0.0))
    return max(found)[1]


def _constants(kind: str, train: torch.Tensor, width: int) -> Sequence[torch.Tensor]:
    """Scores worth trying."""
    if kind == "single_label":
        return [torch.bincount(train[train >= 0], minlength=width).float()]
    if kind == "link":
        return [torch.ones(width)]
    mean = train.nanmean(dim=0)
    if kind == "regression":
        return [mean]
    return [torch.ones(width), mean - 0.5]


def configured(case: Case, seed: int, options: argparse.Namespace) -> Config:
    values: dict[str, Any] = {
        "seed": seed,
        "partition": {"num_chunks": 8},
        "training": {"epochs": options.epochs or case.epochs, "eval_every": 5},
        "checkpoint": {"every": 0},
        "run": {"tensorboard": False, "log_every": 10_000},
    }
    return from_dict({**values, **case.values})


def _spread(figures: Sequence[float]) -> str:
    deviation = statistics.stdev(figures) if len(figures) > 1 else 0.0
    return f"{statistics.mean(figures):.3f} ({deviation:.3f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="folder of the .npz graphs")
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    add("--seeds", type=int, default=3)
    add("--epochs", type=int, help="instead of each case's own")
    add("--work", type=Path, default=Path("runs/tasks"), help="folder of what has been trained")
    add("--out", type=Path, default=Path("benchmarks/results/tasks.md"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
