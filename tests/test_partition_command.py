"""``python -m partition`` end to end."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gnnpipe import chunk
from gnnpipe.datasets import load_graph
from partition.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    """A ring of 24 nodes as a data set file."""
    node = np.arange(24)
    edges = np.array([node, (node + 1) % 24])
    path = tmp_path / "ring.npz"
    np.savez(
        path,
        edge_index=np.concatenate((edges, edges[::-1]), axis=1).astype(np.int32),
        y=(node % 2).astype(np.int16),
        num_classes=2,
        train_mask=node % 3 == 0,
        val_mask=node % 3 == 1,
        test_mask=node % 3 == 2,
        is_directed=False,
        x=np.eye(24, dtype=np.float32),
    )
    return path


def test_command_cuts_a_file_and_prints_json(ring: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    options = ["--num-chunks", "3", "--num-ways", "2", "--out", str(out), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "partition", "--dataset", str(ring), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    report = json.loads(done.stdout)
    assert (report["num_chunks"], report["num_ways"], report["num_edges"]) == (3, 2, 48)
    assert sum(report["chunk_nodes"]) == 24
    assert report["verdict"].startswith("cut ")
    assert done.stderr == ""
    chunked = chunk.load(out, verify=True)
    chunk.check_belongs(chunked, load_graph(str(ring)))
    assert (chunked.num_chunks, chunked.num_ways) == (3, 2)
    assert (chunked.manifest["method"], chunked.manifest["seed"]) == ("metis", 0)
    assert np.diff(chunked.cell_ptr[::2]).tolist() == report["chunk_nodes"]


def test_embedded_data_set_is_cut_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parts"
    assert main(["--dataset", "digits", "--num-chunks", "8", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "nodes                 1797" in text
    assert "good for pipelining" in text
    assert chunk.load(out).num_chunks == 8


def test_data_options_reach_the_graph(ring: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    options = ["--method", "bfs", "--features", "degree", "--row-normalize", "--undirected"]
    root = ["--root", str(ring.parent), "--split", "public", "--data-seed", "3"]
    base = ["--dataset", "ring.npz", "--num-chunks", "2", "--out", str(out)]
    assert main([*base, *options, *root]) == 0
    graph = load_graph(str(ring), features="degree", row_normalize=True, undirected=True, seed=3)
    chunk.check_belongs(chunk.load(out), graph)


def test_given_assignment_is_written_as_it_is(ring: Path, tmp_path: Path) -> None:
    ids = np.arange(24) % 2
    np.savetxt(tmp_path / "ids.txt", ids, fmt="%d")
    base = ["--dataset", str(ring), "--num-chunks", "2", "--out", str(tmp_path / "parts")]
    assert main([*base, "--method", "file", "--file", str(tmp_path / "ids.txt")]) == 0
    chunked = chunk.load(tmp_path / "parts")
    assert chunked.node_id.tolist() == [*range(0, 24, 2), *range(1, 24, 2)]


def test_terminal_shows_the_steps(
    ring: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    base = ["--dataset", str(ring), "--num-chunks", "2", "--method", "bfs"]
    assert main([*base, "--out", str(tmp_path / "parts")]) == 0
    steps = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    assert steps == ["loading", "cutting", "measuring", "writing"]


def test_other_partition_is_replaced_only_when_asked(
    ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--dataset", str(ring), "--method", "random", "--out", str(tmp_path / "parts")]
    assert main([*base, "--num-chunks", "2"]) == 0
    assert main([*base, "--num-chunks", "2"]) == 0
    capsys.readouterr()
    assert main([*base, "--num-chunks", "3"]) == 2
    assert "overwrite it" in capsys.readouterr().err
    assert main([*base, "--num-chunks", "3", "--overwrite"]) == 0
    assert chunk.load(tmp_path / "parts").num_chunks == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-chunks", "25"], "error: `num_chunks` (=25) must be at most the number of nodes"),
        (["--num-chunks", "2", "--dataset", "no.npz"], "error: "),
        (["--num-chunks", "2", "--out", "{taken}"], "error: `directory` (=.*) must be new, empty"),
        (["--num-chunks", "2", "--out", "{file}/parts"], "error: `directory` (=.*) cannot be wr"),
    ],
)
def test_mistake_is_one_error_line(
    options: list[str],
    message: str,
    ring: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("dear")
    before = sorted(tmp_path.rglob("*"))
    places = {"taken": str(taken), "file": str(ring)}
    base = ["--dataset", str(ring), "--out", str(tmp_path / "parts")]
    assert main([*base, *(option.format(**places) for option in options)]) == 2
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert len(errors) == 1
    for part in message.split(".*"):
        assert part in errors[0]
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: the following arguments are required: --dataset, --num-chunks, --out; see"),
        (["--num-chunks", "two"], "error: argument --num-chunks: invalid int value: 'two'; see"),
        (["--method", "metris"], "error: argument --method: invalid choice: 'metris'"),
    ],
)
def test_usage_error_is_one_error_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "examples:\n  python -m partition --dataset digits" in capsys.readouterr().out
