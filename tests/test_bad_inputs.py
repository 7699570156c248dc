"""Mistakes found once data, partitions and weights are read: one ``error:`` line, status 2.

What is found before anything heavy loads is in test_cli.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from combinations import both_ways, save_partition, write_npz

from gnnpipe import chunk
from gnnpipe.cli import main
from gnnpipe.config import load_config
from gnnpipe.preflight import THREAD_VARIABLES
from gnnpipe.trainer import Trainer
from launch.__main__ import main as launch
from partition.__main__ import main as partition

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[1]
NUM_NODES = 12
Change = Callable[[Path], object]


class Case(NamedTuple):
    """What is done to a sound folder, the command in it, and what the error line says."""

    name: str
    change: Change
    line: str
    message: str


def nothing(folder: Path) -> None:
    """Leaves the folder sound."""


def arrays(**changes: Any) -> Change:
    """Replaces arrays of the graph by values or by functions of what was there; None drops."""

    def change(folder: Path) -> None:
        with np.load(folder / "graph.npz") as file:
            found = dict(file)
        for key, value in changes.items():
            found[key] = value(found[key].copy()) if callable(value) else value
        kept = {key: value for key, value in found.items() if value is not None}
        np.savez(folder / "graph.npz", **kept)

    return change


def at(index: Any, value: float) -> Callable[[Any], Any]:
    """A function that sets one entry of an array."""

    def change(array: Any) -> Any:
        array[index] = value
        return array

    return change


def rewritten(name: str, content: Callable[[bytes], bytes]) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content((folder / name).read_bytes()))

    return change


def flipped(content: bytes) -> bytes:
    """Another last byte, the length as it was."""
    return content[:-1] + bytes([content[-1] ^ 1])


def flipped_inside(content: bytes) -> bytes:
    """Another byte in the middle."""
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


def written(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def removed(*names: str) -> Change:
    def change(folder: Path) -> None:
        for path in (folder / name for name in names):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    return change


def manifest(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "cut/manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def single_array(folder: Path) -> None:
    with (folder / "graph.npz").open("wb") as file:
        np.save(file, np.zeros(3))


TRAIN = "train c.yaml"
CUT = "train c.yaml partition.path=cut"
FILE = "train c.yaml partition.method=file partition.file=a.txt"
BEST = "run/weights/best.safetensors"

# fmt: off
CASES = [
    # the graph
    Case("nan-features", arrays(x=at((3, 1), np.nan)), TRAIN,
         r"`features` \(=nan in row 3\) must be finite"),
    Case("inf-features", arrays(x=at((3, 1), np.inf)), TRAIN,
         r"`features` \(=inf in row 3\) must be finite"),
    Case("features-of-others", arrays(x=lambda x: x[:-1]), TRAIN, r"`features` \(=\[11, 5\]\)"),
    Case("edge-to-nowhere", arrays(edge_index=at((1, 0), 12)), TRAIN, r"edge_index.*12"),
    Case("edge-from-nowhere", arrays(edge_index=at((0, 0), -1)), TRAIN, r"edge_index.*-1"),
    Case("edges-in-rows", arrays(edge_index=lambda e: e.T), TRAIN, r"edge_index.*\[2, E\]"),
    Case("label-too-large", arrays(y=at(4, 3)), TRAIN,
         r"`labels` \(=3\) must lie between 0 and 2"),
    Case("label-negative", arrays(y=at(4, -2)), TRAIN, r"`labels` \(=-2\) must lie between 0"),
    Case("labels-of-others", arrays(y=lambda y: y[:-1]), TRAIN, r"11"),
    Case("no-training-node", arrays(train_mask=np.zeros(12, bool)), TRAIN,
         r"`train_mask` \(=0 nodes\) must hold a labelled node"),
    Case("nobody-labelled", arrays(y=np.full(12, -1)), TRAIN,
         r"`train_mask` \(=6 nodes\) must hold a labelled node"),
    Case("short-mask", arrays(val_mask=np.ones(11, bool)), TRAIN, r"`val_mask` \(=\[11\]\)"),
    Case("long-mask", arrays(train_mask=np.ones(13, bool)), TRAIN, r"`train_mask` \(=\[13\]\)"),
    Case("missing-arrays", arrays(test_mask=None, y=None), TRAIN, "lacks the arrays y, test_mask"),
    Case("pickled-array", arrays(y=np.array([{}] * 12)), TRAIN, "no .npz file of plain arrays"),
    Case("same-for-reference", arrays(x=at((3, 1), np.nan)), "reference c.yaml", "`features`"),
    # its file
    Case("truncated-npz", rewritten("graph.npz", lambda b: b[:-100]), TRAIN, "or is damaged"),
    Case("flipped-npz", rewritten("graph.npz", flipped_inside), TRAIN, "or is damaged"),
    Case("foreign-npz", rewritten("graph.npz", lambda b: b"hello"), TRAIN, "or is damaged"),
    Case("empty-npz", rewritten("graph.npz", lambda b: b""), TRAIN, "or is damaged"),
    Case("single-array", single_array, TRAIN, "holds a single array"),
    Case("foreign-pt", written("g.pt", "hello"), f"{TRAIN} data.name=g.pt", r"g\.pt"),
    Case("unknown-name", nothing, f"{TRAIN} data.name=citeser", "citeseer"),
    Case("split-of-others", nothing, f"{TRAIN} data.split=random",
         r"`data.split` \(=random\) must"),
    # cutting it
    Case("more-chunks-than-nodes", nothing, f"{TRAIN} partition.num_chunks=13",
         r"`num_chunks` \(=13\) must be at most the number of nodes \(=12\)"),
    Case("more-parts-than-nodes", nothing,
         f"{TRAIN} partition.method=metis-grouped partition.num_chunks=4",
         r"makes 16 parts, which must be at most the number of nodes \(=12\)"),
    Case("short-assignment", written("a.txt", "0\n1\n"), FILE, r"holds \[2\] where \[12\]"),
    Case("empty-chunk", written("a.txt", "0\n" * 12), FILE, "leaves 2 of `num_chunks`"),
    Case("foreign-assignment", written("a.txt", "one\n"), FILE, "must hold integers"),
    # partitions on disk
    Case("no-manifest", removed("cut/manifest.json"), CUT, "its manifest.json cannot be read"),
    Case("no-json", rewritten("cut/manifest.json", lambda b: b[:50]), CUT, "must be JSON"),
    Case("foreign-partition", manifest(format="other"), CUT, r"`format` \(=other\) of cut"),
    Case("newer-partition", manifest(version=99), CUT, r"`version` \(=99\) of cut/manifest"),
    Case("edited-partition", manifest(num_chunks=2), CUT, "its SHA-256 must match"),
    Case("lost-array", removed("cut/labels.npy"), CUT, r"cut/labels\.npy cannot be read"),
    Case("truncated-array", rewritten("cut/indices.npy", lambda b: b[:-4]), CUT, "its size"),
    Case("flipped-array", rewritten("cut/features.npy", flipped), CUT, "features.npy is damaged"),
    Case("other-graph", arrays(x=at((0, 0), 9)), CUT, "must be made from the graph in hand"),
    Case("other-chunks", nothing, f"{CUT} partition.num_chunks=4",
         r"`partition.num_chunks` \(=4\) must equal the chunks of the partition \(=3\)"),
    # run directories
    Case("other-run", nothing, f"{TRAIN} run.dir=run seed=1", r"seed \(0 there, 1 here\)"),
    Case("damaged-summary", rewritten("run/summary.json", lambda b: b[:-9]),
         f"{TRAIN} run.dir=run", "must hold a readable config.yaml and summary.json, one is dam"),
    # saved weights
    Case("no-weights", removed("run/weights"), "evaluate run", r"`weights` \(=run/weights/best"),
    Case("truncated-weights", rewritten(BEST, lambda b: b[:-8]), "evaluate run",
         "must be a whole .safetensors file"),
    Case("foreign-weights", rewritten("run/weights/last.safetensors", lambda b: b"hello"),
         "predict run --weights last", "must be a whole .safetensors file"),
    Case("flipped-weights", rewritten(BEST, flipped), "predict run", "must match its SHA-256"),
    Case("weights-of-a-narrower", rewritten("run/config.yaml", lambda b: b.replace(
         b"hidden_channels: 4", b"hidden_channels: 8")), "evaluate run",
         "must have the model's shape"),
    Case("weights-of-a-deeper", rewritten("run/config.yaml", lambda b: b.replace(
         b"num_layers: 2", b"num_layers: 1")), "predict run", "load the weights of this very"),
    Case("damaged-config", rewritten("run/config.yaml", lambda b: b"{" + b), "evaluate run",
         "YAML"),
    Case("damaged-partition", rewritten("run/partition/labels.npy", flipped), "evaluate run",
         "labels.npy is damaged"),
    # keys
    Case("unknown-section", nothing, f"{TRAIN} modell.name=gcn", "the nearest is `model`"),
    Case("unknown-key", nothing, f"{TRAIN} training.learning_rate=1", "is not a known key; the n"),
    Case("key-of-another-section", nothing, f"{TRAIN} training.dropout=0.1",
         "the nearest is `(model|history).dropout`"),
    Case("option-of-another-model", nothing, f"{TRAIN} model.heads=4", "is an option of gat"),
    Case("key-without-value", nothing, f"{TRAIN} seed", "`seed` is not an override"),
    Case("key-twice", written("c.yaml", "seed: 1\nseed: 2\n"), TRAIN, "`seed` stands twice"),
    Case("section-as-number", written("c.yaml", "model: 3\n"), TRAIN, "must be a section of keys"),
    Case("unknown-preset", nothing, f"{TRAIN} preset=gnnpipe", "the nearest is gnnpipe-paper"),
    # types
    Case("text-for-number", nothing, f"{TRAIN} training.epochs=many", "must be an integer"),
    Case("fraction-for-count", nothing, f"{TRAIN} training.epochs=1.5", "must be an integer"),
    Case("number-for-truth", nothing, f"{TRAIN} run.trace=1", "must be true or false"),
    Case("list-for-number", nothing, f"{TRAIN} training.lr=[1]", "must be a finite number"),
    Case("infinite-rate", nothing, f"{TRAIN} training.lr=inf", "must be a finite number"),
    Case("number-for-list", nothing, f"{TRAIN} parallel.layers_per_stage=4", "a list of integers"),
    Case("unknown-choice", nothing, f"{TRAIN} history.order=random", "must be one of shuffled"),
    Case("no-yaml", written("c.yaml", "a: [1\n"), TRAIN, "is not valid YAML at line"),
    Case("yaml-list", written("c.yaml", "- 1\n"), TRAIN, "must be a mapping"),
    Case("binary-config", rewritten("c.yaml", lambda b: b"\xff\xfe"), TRAIN, "not UTF-8"),
    # sizes
    Case("no-epochs", nothing, f"{TRAIN} training.epochs=0", "must be at least 1"),
    Case("dropout-of-all", nothing, f"{TRAIN} model.dropout=1", "at least 0 and below 1"),
    Case("no-chunks", nothing, f"{TRAIN} partition.num_chunks=0", "must be at least 1"),
    Case("negative-seed", nothing, f"{TRAIN} seed=-1", "must be between 0 and"),
    Case("more-stages-than-layers", nothing, f"{TRAIN} parallel.num_stages=5",
         r"must be at most `model.num_layers` \+ 2"),
    Case("split-of-another-sum", nothing, f"{TRAIN} parallel.layers_per_stage=[9]", "the sum 4"),
    Case("heads-that-do-not-divide", nothing, f"{TRAIN} model.name=gat model.heads=3",
         "must divide `model.hidden_channels`"),
    # world sizes
    Case("too-few-processes", nothing, f"{TRAIN} parallel.num_stages=2",
         "start `torchrun --nproc_per_node 2"),
    Case("too-many-processes", nothing, f"WORLD_SIZE=3 {TRAIN}", "set parallel.num_stages=3"),
    Case("world-of-words", nothing, f"WORLD_SIZE=two {TRAIN}", "must be a whole number"),
    Case("several-for-one", nothing, "WORLD_SIZE=2 evaluate run", "must be 1 for `evaluate`"),
    Case("launch-too-few", nothing, "launch local --nproc 1 c.yaml parallel.num_stages=2",
         "`--nproc`"),
    Case("launch-none", nothing, "launch local --nproc 0 c.yaml", "must be at least 1"),
    Case("launch-nothing", nothing, "launch local --nproc 2 d.yaml", "cannot read the config"),
    # devices, threads and memory
    Case("no-such-device", nothing, f"{TRAIN} device=tpu", "must be one of auto, cpu, cuda"),
    Case("no-threads", nothing, f"{TRAIN} run.threads=0", "must be auto or at least 1"),
    # other commands
    Case("report-of-nothing", nothing, "report new", "must hold a run's config.yaml and metrics"),
    Case("report-into-nowhere", nothing, "report run --out c.yaml/r.html", "`--out`"),
    Case("plan-without-ranks", nothing, "plan c.yaml --ranks 0", "must be at least 1"),
    Case("plan-of-an-unknown-shape", nothing, "plan c.yaml --shape reddit --ranks 2",
         "must be one of ogbn-arxiv"),
    Case("plan-in-no-memory", nothing, "plan c.yaml --ranks 2 --chunks 2 --memory-gb 1e-9",
         "`--memory-gb` .* must be at least"),
    Case("partition-into-none", nothing,
         "partition --dataset graph.npz --num-chunks 0 --out p", "`num_chunks` .*=0"),
    Case("partition-of-nothing", nothing,
         "partition --dataset nope.npz --num-chunks 2 --out p", "nope.npz"),
    Case("partition-over-another", nothing,
         "partition --dataset graph.npz --num-chunks 2 --out run", "run"),
    Case("predict-into-text", nothing, "predict run --out scores.txt", "a .npy or a .parquet"),
    Case("nothing-to-evaluate-on", removed("run/partition", "graph.npz"), "evaluate run",
         r"`data.name` \(=graph.npz\) must be an existing file"),
]
# fmt: on

CONFIG = """
data: {name: graph.npz}
partition: {num_chunks: 3, method: contiguous}
model: {num_layers: 2, hidden_channels: 4}
training: {epochs: 2}
run: {dir: new/run, tensorboard: false, threads: 1}
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a graph, its partition ``cut`` and a finished run ``run``."""
    folder = tmp_path_factory.mktemp("sound")
    ring = both_ways((i, (i + 1) % NUM_NODES) for i in range(NUM_NODES))
    graph = write_npz(folder / "graph.npz", ring, num_nodes=NUM_NODES)
    save_partition(graph, folder / "cut", num_chunks=3, num_ways=1, method="contiguous")
    (folder / "c.yaml").write_text(CONFIG)
    before = Path.cwd()
    os.chdir(folder)
    try:
        Trainer(load_config("c.yaml", ["run.dir=run"])).fit()
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sound folder as working directory, and no launcher."""
    copy = tmp_path / "folder"
    shutil.copytree(sound, copy)
    monkeypatch.chdir(copy)
    for name in THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return copy


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


PROGRAMS: dict[str, Callable[[list[str]], int]] = {"launch": launch, "partition": partition}


def status_of(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a command in this process; ``NAME=value`` before it is its environment."""
    words = line.split()
    while words[0].isupper() or "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    program = PROGRAMS.get(words[0])
    try:
        return main(words) if program is None else program(words[1:])
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_at_least_sixty_mistakes_are_tried() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_a_mistake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN.split(), "device=cuda"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: `device` \(=cuda\) must offer a GPU to each local rank", line)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_mistake_is_one_error_line_and_leaves_nothing(
    case: Case,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case.change(folder)
    before = contents(folder)
    assert status_of(case.line, monkeypatch) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert not line.endswith(".")
    assert re.search(case.message, line), line
    assert captured.out == ""
    assert contents(folder) == before


@pytest.mark.parametrize("line", [TRAIN, CUT, "evaluate run", "reference c.yaml"])
def test_sound_folder_is_no_mistake(line: str, folder: Path) -> None:
    assert main(line.split()) == 0


def test_relative_data_path_starts_from_the_root(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "graph.npz").rename(folder / "data/graph.npz")
    assert main([*TRAIN.split(), "data.root=data"]) == 0


def test_what_a_killed_run_left_of_its_partition_is_replaced(folder: Path) -> None:
    shutil.copytree(folder / "cut", folder / "new/run/partition")
    (folder / "new/run/.partition.0123.tmp").mkdir()
    rewritten("new/run/partition/labels.npy", flipped)(folder)
    assert main(TRAIN.split()) == 0
    assert chunk.load(folder / "new/run/partition", verify=True).num_chunks == 3


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


PROCESSES = [case for case in CASES if case.name in ("nan-features", "flipped-weights")]


@pytest.mark.parametrize("case", PROCESSES, ids=[case.name for case in PROCESSES])
def test_real_command_does_the_same(case: Case, folder: Path) -> None:
    case.change(folder)
    before = contents(folder)
    done = python("-m", "gnnpipe", *case.line.split())
    assert (done.returncode, done.stdout) == (2, "")
    # What the run was about to do may stand above it.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("loading ")]
    (line,) = lines
    assert line.startswith("error: ")
    assert re.search(case.message, line), line
    assert contents(folder) == before


def test_under_torchrun_rank_0_alone_prints_the_line(folder: Path) -> None:
    arrays(x=at((3, 1), np.nan))(folder)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = python(*torchrun, "-m", "gnnpipe", *TRAIN.split(), "parallel.num_stages=2")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "[rank" not in done.stderr
    assert not (folder / "new").exists()
