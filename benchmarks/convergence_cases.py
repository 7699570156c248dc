"""What a convergence study compares: variants of the method, graphs and models."""

from collections.abc import Mapping

from gnnpipe.sources import merge

PUBLISHED = {"period": 23, "warm_start": "zeros", "order": "shuffled", "cross_chunk_gradient": 2.0}


def _late(factor: float, *, momentum: float = 0.0) -> dict[str, object]:
    return {"late_gradient": factor, "late_gradient_momentum": momentum}


_UNMOVED: Mapping[str, Mapping[str, object]] = {"history": {"strata": 0}}
_NEVER: Mapping[str, Mapping[str, object]] = {"history": {"strata": 0, "refresh_every": 0}}
_NEVER_REFRESHED: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "never refreshed": {},
    "published": {"history": PUBLISHED, "partition": {"method": "metis-grouped"}},
    # Each of the published techniques taken away, and each alone.
    "published, fixed order": {"history": {**PUBLISHED, "order": "fixed"}},
    "published, period 1": {"history": {**PUBLISHED, "period": 1}},
    "published, factor 1": {"history": {**PUBLISHED, "cross_chunk_gradient": 1.0}},
    "published, exact start": {"history": {**PUBLISHED, "warm_start": "exact"}},
    "fixed order": {"history": {"order": "fixed"}},
    "factor 0": {"history": {"cross_chunk_gradient": 0.0}},
    "factor 2": {"history": {"cross_chunk_gradient": 2.0}},
    "zero start": {"history": {"warm_start": "zeros"}},
    "period 5": {"history": {"period": 5}},
    "period 23": {"history": {"period": 23}},
    "antithetic": {"history": {"order": "antithetic"}},
    "steps 2": {"training": {"steps_per_epoch": 2}},
    "steps 4": {"training": {"steps_per_epoch": 4}},
    "steps 8": {"training": {"steps_per_epoch": 8}},
    "steps 4, grouped": {
        "training": {"steps_per_epoch": 4},
        "partition": {"method": "metis-grouped"},
    },
    "dropout false": {"history": {"dropout": False}},
    "momentum 0.5": {"history": {"dropout": False, "momentum": 0.5}},
    "late gradient 0.5": {"history": _late(0.5)},
    "late gradient 1": {"history": _late(1.0)},
    "dropout false, late gradient 1": {"history": {"dropout": False, **_late(1.0)}},
    "late gradient 1, smoothed 0.5": {"history": _late(1.0, momentum=0.5)},
    "late gradient 1, smoothed 0.8": {"history": _late(1.0, momentum=0.8)},
    "exact histories": {"history": {"dropout": False, "max_drift": 0.0}},
    "exact histories, late gradient 1": {
        "history": {"dropout": False, "max_drift": 0.0, **_late(1.0)}
    },
    # Ideas that no option has: kept before the dropout and read without a mask.
    "clean": {"idea": {"store": "clean"}},
    "clean, predict 0.5": {"idea": {"store": "clean", "predict": 0.5}},
}

VARIANTS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "exact": {},
    "default": {},
    "unmoved": _UNMOVED,
    "strata": {"history": {"strata": 16, "refresh_every": 10, "late_gradient": 0.0}},
    "one stratum": {"history": {"strata": 1, "late_gradient": 0.0}},
    "undamped late gradients": {"history": _late(1.0, momentum=0.8)},
    **{
        f"refresh every {every}": {"history": {"strata": 0, "refresh_every": every}}
        for every in (1, 2, 5, 10)
    },
    "correct every 10": {"history": {"strata": 0, "correct_every": 10}},
    "correct every 20": {"history": {"strata": 0, "correct_every": 20}},
    **{
        f"refreshed, {name}": merge(_UNMOVED, _NEVER_REFRESHED[name])
        for name in ("dropout false, late gradient 1", "late gradient 1, smoothed 0.8")
    },
    **{name: merge(_NEVER, changes) for name, changes in _NEVER_REFRESHED.items()},
}

GRAPHS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "cora": {"data": {"row_normalize": True}, "training": {"epochs": 200}},
    "pubmed": {"training": {"epochs": 100}},
    "chameleon": {"training": {"epochs": 100}},
    "citeseer": {"data": {"row_normalize": True}, "training": {"epochs": 100}},
    "squirrel": {"training": {"epochs": 200}},
    "amazon_computers": {"training": {"epochs": 100}},
    "facebook_pages": {"training": {"epochs": 100}},
    "coauthor_physics": {"training": {"epochs": 60}},
    "ogbn_arxiv": {"data": {"features": "surrogate"}, "training": {"epochs": 60}},
}
"""What a graph needs besides its name; the same for all variants."""


def normed(name: str) -> Mapping[str, Mapping[str, object]]:
    """A model without shortcuts, with layer norm."""
    return {
        "training": {"lr": 5e-3, "weight_decay": 0.0},
        "model": {"name": name, "norm": "layer", "dropout": 0.0},
    }


MODELS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "gcnii": {"training": {"lr": 0.01, "weight_decay": 5e-4}, "model": {"dropout": 0.5}},
    "resgcn+": {"training": {"lr": 1e-3, "weight_decay": 0.0}, "model": {"dropout": 0.5}},
    "gcn": {"training": {"lr": 5e-3, "weight_decay": 0.0}, "model": {"dropout": 0.0}},
    **{f"{name}+norm": normed(name) for name in ("gcn", "sage", "gin", "gat")},
    "jknet+norm": {"model": {"name": "jknet", "norm": "layer"}},
}
"""Hyperparameters of a model, the same for all variants; other models take the defaults. Models
without shortcuts train at 8 layers with a norm only."""

TUNED: Mapping[tuple[str, str], Mapping[str, Mapping[str, object]]] = {
    ("squirrel", "gcnii"): {"training": {"epochs": 100, "weight_decay": 0.0}},
    ("squirrel", "resgcn+"): {"training": {"epochs": 100, "lr": 3e-3}},
    ("pubmed", "gcnii"): {"training": {"epochs": 60}, "model": {"dropout": 0.3}},
    ("pubmed", "resgcn+"): {"training": {"epochs": 80, "lr": 5e-3}, "model": {"dropout": 0.3}},
    ("amazon_computers", "gcnii"): {
        "training": {"epochs": 240, "weight_decay": 0.0, "clip_norm": 1.0},
        "model": {"dropout": 0.2, "alpha": 0.3, "norm": "layer"},
    },
    ("amazon_computers", "resgcn+"): {
        "training": {"epochs": 240, "lr": 5e-3},
        "model": {"dropout": 0.2},
    },
    ("facebook_pages", "gcnii"): {"training": {"epochs": 50}, "model": {"dropout": 0.2}},
    ("facebook_pages", "resgcn+"): {
        "training": {"epochs": 40, "lr": 5e-3},
        "model": {"dropout": 0.2},
    },
    ("coauthor_physics", "gcnii"): {"training": {"epochs": 30}, "model": {"dropout": 0.2}},
    ("coauthor_physics", "resgcn+"): {
        "training": {"epochs": 40, "lr": 5e-3},
        "model": {"dropout": 0.2},
    },
    ("cora", "gcn"): {"training": {"epochs": 500, "lr": 2e-3}},
    ("cora", "sage+norm"): {
        "training": {"epochs": 400, "lr": 2e-3, "weight_decay": 1e-3},
        "model": {"dropout": 0.3},
    },
    ("cora", "deepergcn"): {"training": {"epochs": 200, "lr": 1e-3}},
    ("ogbn_arxiv", "gcnii"): {
        "training": {"epochs": 40, "weight_decay": 0.0},
        "model": {"dropout": 0.1},
    },
}
"""Where a pair of graph and model was tuned, by exact training's validation: over the above."""
