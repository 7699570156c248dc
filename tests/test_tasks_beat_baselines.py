"""Each kind of task beats a constant answer, or a network without edges, on a real graph."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHORT = {  # epochs that are enough, and what must be beaten
    "single_label": (15, "perceptron"),
    "regression": (30, "perceptron"),
    "multi_task_auc": (10, "constant"),
    "link": (20, "perceptron"),
    "inductive": (10, "perceptron"),
}


@pytest.fixture(scope="module")
def tasks() -> Any:
    """The benchmark, which is no package."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "tasks.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_tasks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # NamedTuples look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SHORT)
def test_task_beats_its_baseline(
    name: str, tasks: Any, shared_data: Callable[[str], Path]
) -> None:
    case, (epochs, baseline) = tasks.CASES[name], SHORT[name]
    data = shared_data("cora.npz").parent
    shared_data(f"{case.data}.npz")
    options = argparse.Namespace(epochs=epochs, seeds=1, data=data)
    graph = case.graph(data)
    ours = tasks.trained_figure(case, graph, 0, options, case.layers)
    if baseline == "perceptron":
        other = tasks.trained_figure(case, graph, 0, options, tasks.perceptron)
    else:
        other = tasks.constant(tasks.configured(case, 0, options), graph)
    assert ours > other + 0.02
