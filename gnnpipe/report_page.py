"""``gnnpipe report``: one page that compares runs, in one file that needs no network.

Everything is read from the run directories; plots are drawn by matplotlib and stand in the page
as SVG.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gnnpipe import pictures
from gnnpipe.errors import UserError
from gnnpipe.metrics import read_metrics
from gnnpipe.run_directory import (
    CONFIG_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    TIMELINE_FILE,
    flatten,
    write_whole,
)
from gnnpipe.timeline import Timeline, load_timeline

SHARES_OF_BEST = (0.9, 0.95, 0.99, 1.0)
"""Of the best validation figure that every run reaches: how long does each run take to it?"""
BYTE_KINDS = ("boundary", "carried", "halo", "gradient")

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #202428; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } caption { text-align: left; color: #606870; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #e0e4e8; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; }
"""


class RunFiles(NamedTuple):
    """What a run directory holds."""

    name: str
    config: Mapping[str, Any]
    """Dotted keys."""
    records: list[dict[str, Any]]
    summary: Mapping[str, Any]
    """Empty while the run is going on, or when it was killed."""
    timeline: Timeline | None

    def seconds(self) -> list[float]:
        """Training time at the end of each epoch, evaluations not counted, ``[epochs]``."""
        total, ends = 0.0, []
        for record in self.records:
            total += record["epoch_s"]
            ends.append(total)
        return ends

    def evaluations(self) -> list[tuple[int, float, float]]:
        """Epoch, training seconds and validation figure of each evaluation."""
        return [
            (record["epoch"], second, record["accuracy"]["val"])
            for record, second in zip(self.records, self.seconds(), strict=True)
            if (record.get("accuracy") or {}).get("val") is not None
        ]


def write_report(directories: Sequence[str], out: str) -> None:
    """Writes the page.

    Args:
        directories: run directories, of finished runs or others.
        out: the file.

    Raises:
        UserError: a directory holds no run, or none that can be read.
    """
    runs = [_read(directory, directories) for directory in directories]
    write_whole(Path(out), page(runs))


def page(runs: Sequence[RunFiles]) -> str:
    """The page as HTML."""
    sections = [
        ("Results", _table(*_results(runs))),
        ("Time to accuracy", _time_to_accuracy(runs)),
        ("Curves", _svg(curves_figure(runs))),
        ("Where the time goes", _svg(time_figure(runs))),
        *(
            (f"Timeline of {run.name}", _svg(pictures.timeline_figure(run.timeline)))
            for run in runs
            if run.timeline is not None
        ),
        ("Bytes sent per epoch", _svg(bytes_figure(runs))),
        ("Memory of each rank", _svg(memory_figure(runs))),
        ("Configuration: what differs", _table(*_differences(runs))),
    ]
    body = "\n".join(f"<h2>{escape(title)}</h2>\n{content}" for title, content in sections)
    title = escape(", ".join(run.name for run in runs))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>gnnpipe: {title}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><h1>gnnpipe: {title}</h1>\n{body}\n</body></html>\n"
    )


def curves_figure(runs: Sequence[RunFiles]) -> Figure:
    """Loss by epoch; validation figure by epoch and by training time."""
    figure = Figure(figsize=(12, 3.6), layout="tight")
    loss, by_epoch, by_time = figure.subplots(1, 3)
    for run in runs:
        points = [(r["epoch"], r["loss"]) for r in run.records if r["loss"] is not None]
        loss.plot([p[0] for p in points], [p[1] for p in points], label=run.name)
        found = run.evaluations()
        values = [value for _, _, value in found]
        by_epoch.plot([epoch for epoch, _, _ in found], values, marker=".", label=run.name)
        by_time.plot([second for _, second, _ in found], values, marker=".", label=run.name)
    loss.set(xlabel="epoch", title="training loss")
    by_epoch.set(xlabel="epoch", title="validation figure")
    by_time.set(xlabel="seconds of training", title="validation figure")
    loss.legend()
    return figure


def time_figure(runs: Sequence[RunFiles]) -> Figure:
    """Seconds of each epoch, and what all ranks' time went into in the last one."""
    figure = Figure(figsize=(12, 3.2), layout="tight")
    epochs, shares = figure.subplots(1, 2)
    for place, run in enumerate(runs):
        epochs.plot([r["epoch"] for r in run.records], [r["epoch_s"] for r in run.records])
        left = 0.0
        last = (run.records[-1].get("time_shares") or {}) if run.records else {}
        for number, name in enumerate(("compute", "wait", "transfer")):
            share = last.get(name) or 0.0
            label = name if place == 0 else None
            shares.barh(place, share, left=left, color=f"C{number}", label=label)
            left += share
    epochs.set(xlabel="epoch", ylabel="seconds", title="epoch", yscale="log")
    shares.set_yticks(range(len(runs)), [run.name for run in runs])
    shares.invert_yaxis()
    shares.set(xlim=(0, 1), title="shares of all ranks' time, last epoch")
    shares.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def bytes_figure(runs: Sequence[RunFiles]) -> Figure:
    """Payload of the last epoch by kind."""
    figure = Figure(figsize=(12, 1.2 + 0.5 * len(runs)), layout="tight")
    axes = figure.subplots()
    for place, run in enumerate(runs):
        left, sent = 0.0, run.records[-1]["comm_bytes"] if run.records else {}
        for number, kind in enumerate(BYTE_KINDS):
            count = sent.get(kind, 0) / 1e6
            label = kind if place == 0 else None
            axes.barh(place, count, left=left, color=f"C{number}", label=label)
            left += count
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.invert_yaxis()
    axes.set(xlabel="MB")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def memory_figure(runs: Sequence[RunFiles]) -> Figure:
    """The most that each rank has held."""
    figure = Figure(figsize=(12, 3.2), layout="tight")
    axes = figure.subplots()
    width = 0.8 / max(len(runs), 1)
    for place, run in enumerate(runs):
        peaks = run.records[-1]["peak_memory_bytes"] if run.records else []
        ranks = [rank + place * width for rank in range(len(peaks))]
        axes.bar(ranks, [peak / 1e9 for peak in peaks], width, label=run.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="rank", ylabel="GB")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def _read(directory: str, all_directories: Sequence[str]) -> RunFiles:
    path = Path(directory)
    if not (path / METRICS_FILE).is_file() or not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"`RUN_DIR` (={directory}) must hold a run's {CONFIG_FILE} and {METRICS_FILE}; give"
            " the run.dir of a run"
        )
    try:
        config = yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8"))
        summary = path / SUMMARY_FILE
        found = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
        if not isinstance(config, dict) or not isinstance(found, dict):
            raise ValueError
    except (ValueError, yaml.YAMLError):
        raise UserError(
            f"`RUN_DIR` (={directory}) must hold a readable {CONFIG_FILE} and {SUMMARY_FILE}, one"
            " is damaged; leave this run out"
        ) from None
    names = [Path(each).resolve().name for each in all_directories]
    name = directory if names.count(path.resolve().name) > 1 else path.resolve().name
    timeline = load_timeline(path / TIMELINE_FILE)
    return RunFiles(name, flatten(config), read_metrics(path / METRICS_FILE), found, timeline)


def _results(runs: Sequence[RunFiles]) -> tuple[list[str], list[list[str]]]:
    """One row per run."""
    heads = ["run", "state", "epochs", "best epoch", "val", "test", "ms/epoch", "sent MB/epoch"]
    heads += ["peak GB", "ranks", "parameters"]
    rows = []
    for run in runs:
        summary = run.summary
        sent = sum((summary.get("comm_bytes_per_epoch") or {}).values())
        peak = (summary.get("peak_memory_bytes") or {}).get("max")
        rows.append(
            [
                run.name,
                "finished" if summary else "not finished",
                str(len(run.records)),
                _number(summary.get("best_epoch"), "d"),
                _number(summary.get("val_at_best"), ".4f"),
                _number(summary.get("test_at_best"), ".4f"),
                _number(summary.get("median_epoch_s"), ",.1f", scale=1e3),
                _number(sent if summary else None, ",.1f", scale=1e-6),
                _number(peak, ".2f", scale=1e-9),
                _number(summary.get("world_size"), "d"),
                _number(summary.get("num_parameters"), ",d"),
            ]
        )
    return heads, rows


def _time_to_accuracy(runs: Sequence[RunFiles]) -> str:
    """Seconds of training until the validation figure is as good as what every run reaches."""
    bests = [max((value for _, _, value in run.evaluations()), default=None) for run in runs]
    known = [best for best in bests if best is not None]
    if len(known) < len(runs):
        return "<p>A run without an evaluation reaches nothing.</p>"
    targets = [share * min(known) for share in SHARES_OF_BEST]
    heads = ["run", *(f"val {target:.4f}" for target in targets)]
    rows = []
    for run in runs:
        reached = [
            next((second for _, second, value in run.evaluations() if value >= target), None)
            for target in targets
        ]
        rows.append([run.name, *(_number(second, ",.1f") for second in reached)])
    return _table(heads, rows, caption="seconds of training, evaluations not counted")


def _differences(runs: Sequence[RunFiles]) -> tuple[list[str], list[list[str]]]:
    """The keys in which the runs differ, ``run.dir`` left out."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = []
    for key in keys:
        shown = [json.dumps(run.config.get(key)) for run in runs]
        if len(set(shown)) > 1 and key != "run.dir":
            rows.append([key, *shown])
    return ["key", *(run.name for run in runs)], rows


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> str:
    lines = [f"<table><caption>{escape(caption)}</caption>"]
    lines.append("<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>")
    for row in rows:
        cells = [f"<td{_kind(place, cell)}>{escape(cell)}</td>" for place, cell in enumerate(row)]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    if len(lines) == 2:
        lines.append("<tr><td>nothing</td></tr>")
    return "\n".join([*lines, "</table>"])


def _kind(place: int, cell: str) -> str:
    return ' class="number"' if place > 0 and cell[:1].isdigit() else ""


def _number(value: float | None, form: str, *, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale if scale != 1 else value, form)


def _svg(figure: Figure) -> str:
    """A figure as an SVG element; letters are text, in the reader's font."""
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
