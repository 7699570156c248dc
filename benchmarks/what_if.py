"""The what-if of docs/planning.md: plans for graphs and clusters that are not here.

    python benchmarks/what_if.py                  # the tables, as Markdown
    python benchmarks/what_if.py --gpus 8 64      # some columns

Nothing is measured: every number is the planner's, from counts, an assumed GPU and told links.
"""

import argparse
import sys
from collections.abc import Sequence

from gnnpipe.config import load_config
from gnnpipe.costs import Links
from gnnpipe.planner import Planner
from gnnpipe.planning import GPU, SHAPES, assumed_layers, assumed_shape, predict_all
from gnnpipe.setting import Prediction

NAMES = ("ogbn-products", "ogbn-papers100M")
LAYERS = (8, 32, 128)
GPUS = (8, 64, 256)
GPUS_PER_HOST = 8
BANDWIDTH_GBPS, LOCAL_GBPS, LATENCY_US = 100.0, 400.0, 20.0
CHUNKS = (8, 32, 64)
HIDDEN = 100


def main() -> None:
    """Prints the table and the crossover."""
    options = parse()
    say("| shape | layers | GPUs | graph s | pipeline or hybrid s | setting | graph / pipeline |")
    say("| --- | ---: | ---: | ---: | ---: | --- | ---: |")
    winners: dict[tuple[str, int], list[str]] = {}
    for name in NAMES:
        for num_layers in LAYERS:
            for num_gpus in options.gpus:
                graph, piped = best_of_both(name, num_layers, num_gpus)
                ratio = graph.epoch_s / piped.epoch_s
                say(row(name, num_layers, num_gpus, graph, piped))
                winners.setdefault((name, num_layers), []).append("P" if ratio > 1 else "g")
    say("")
    say(" " * 24 + "".join(f"{f'{count} GPUs':>10}" for count in options.gpus))
    for (name, num_layers), letters in winners.items():
        cells = "".join(f"{letter:>10}" for letter in letters)
        say(f"    {name:<16}{num_layers:>4}{cells}")


def best_of_both(name: str, num_layers: int, num_gpus: int) -> tuple[Prediction, Prediction]:
    """The quickest graph-parallel setting, and the quickest with a pipeline."""
    overrides = [f"model.num_layers={num_layers}", f"model.hidden_channels={HIDDEN}"]
    config, counts = load_config(None, overrides), SHAPES[name]
    layers = assumed_layers(config, counts)
    links = Links(BANDWIDTH_GBPS, LATENCY_US, LOCAL_GBPS, min(GPUS_PER_HOST, num_gpus))
    planner = Planner(layers, assumed_shape(counts), profile=GPU, links=links)
    sizes = {"num_layers": len(layers), "num_nodes": counts.num_nodes}
    predictions = predict_all(planner, num_gpus, chunks=CHUNKS, **sizes)
    found = [p for p in predictions if p.setting.num_ranks == num_gpus]
    graph = next(p for p in found if p.setting.num_stages == 1)
    return graph, next(p for p in found if p.setting.num_stages > 1)


def row(name: str, num_layers: int, num_gpus: int, graph: Prediction, piped: Prediction) -> str:
    """One line of the table."""
    S, W, C, v, _ = piped.setting
    setting = f"{S} x {W}, C {C}" + (f", v {v}" if v > 1 else "")
    ratio = f"{graph.epoch_s / piped.epoch_s:.2f}"
    ratio = f"**{ratio}**" if graph.epoch_s > piped.epoch_s else ratio
    cells: Sequence[object] = (name, num_layers, num_gpus, seconds(graph), seconds(piped))
    return "| " + " | ".join(map(str, (*cells, setting, ratio))) + " |"


def seconds(prediction: Prediction) -> str:
    return f"{prediction.epoch_s:.3g}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    return parser.parse_args()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
