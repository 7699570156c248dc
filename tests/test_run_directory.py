"""Which directories a run may use, and what it says about itself afterwards."""

import json
import os
from pathlib import Path

import pytest

from gnnpipe.errors import UserError
from gnnpipe.run_directory import Found, prepare_run_directory, summary_text, write_whole

CONFIG = "seed: 0\nmodel: {name: gcnii, num_layers: 32}\nrun: {dir: runs/a}\n"
SUMMARY = {
    "best_epoch": 1,
    "val_at_best": 0.7,
    "test_at_best": 0.69,
    "median_epoch_s": 0.182,
    "comm_bytes_per_epoch": {"boundary": 1_250_000_000, "carried": 500_000, "halo": 0},
    "peak_memory_bytes": {"max": 200_000_000, "per_rank": [100_000_000, 200_000_000]},
    "wall_s": 41.23,
    "num_parameters": 1234,
    "world_size": 2,
}

NEW = Found("new", None)


def finished_run(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(CONFIG)
    (directory / "metrics.jsonl").write_text("")
    (directory / "summary.json").write_text(json.dumps(SUMMARY))


def test_a_new_directory_may_be_used_and_is_left_to_the_run_to_make(tmp_path: Path) -> None:
    assert prepare_run_directory(tmp_path / "runs" / "demo", CONFIG) == NEW
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_other_things_than_a_run_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "partition").mkdir()
    assert prepare_run_directory(tmp_path, CONFIG) == NEW


def test_a_finished_run_of_the_same_configuration_gives_its_summary(tmp_path: Path) -> None:
    finished_run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert prepare_run_directory(str(tmp_path), CONFIG) == Found("finished", SUMMARY)
    moved = CONFIG.replace("runs/a", "runs/b")
    assert prepare_run_directory(tmp_path, moved) == Found("finished", SUMMARY)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    finished_run(tmp_path)
    other = "seed: 1\nmodel: {name: gcnii, dropout: null}\nrun: {dir: runs/b}\n"
    with pytest.raises(
        UserError,
        match=r"`run.dir` \(=.*\) holds a run of another configuration: "
        r"seed \(0 there, 1 here\), model.dropout \(not set there, null here\), "
        r"model.num_layers \(32 there, not set here\); choose another run.dir or delete it$",
    ):
        prepare_run_directory(tmp_path, other)


def test_an_unfinished_run_goes_on_unless_it_must_not(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "metrics.jsonl").write_text("")
    assert prepare_run_directory(tmp_path, CONFIG) == Found("unfinished", None)
    with pytest.raises(
        UserError, match=r"unfinished run; set checkpoint.resume=auto to go on with it, or choose"
    ):
        prepare_run_directory(tmp_path, CONFIG, is_resumable=False)


def test_where_a_run_computes_may_change(tmp_path: Path) -> None:
    finished_run(tmp_path)
    moved = CONFIG + "parallel: {num_stages: 4}\ncheckpoint: {every: 7}\ndevice: cpu\n"
    assert prepare_run_directory(tmp_path, moved).state == "finished"


def test_more_epochs_continue_a_finished_run_and_fewer_are_refused(tmp_path: Path) -> None:
    finished_run(tmp_path)
    done = CONFIG + "training: {epochs: 8}\n"
    (tmp_path / "config.yaml").write_text(done)
    more = done.replace("8", "9")
    assert prepare_run_directory(tmp_path, more) == Found("unfinished", SUMMARY)
    with pytest.raises(
        UserError, match=r"`training.epochs` \(=7\) must be at least the 8 that .* has done"
    ):
        prepare_run_directory(tmp_path, done.replace("8", "7"))


@pytest.mark.parametrize("there", ["graphs/a.npz", "./graphs/a.npz", "{cwd}/graphs/a.npz"])
def test_one_file_has_several_paths(there: str, tmp_path: Path) -> None:
    finished_run(tmp_path)
    data = f"data: {{name: '{there.format(cwd=Path.cwd())}'}}\n"
    (tmp_path / "config.yaml").write_text(CONFIG + data)
    here = CONFIG + "data: {name: graphs/a.npz}\n"
    assert prepare_run_directory(tmp_path, here).state == "finished"


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
@pytest.mark.parametrize("content", [b"{", b"", b"7", b"\xff\xfe"])
def test_a_damaged_run_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    finished_run(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"must hold a readable config.yaml and summary.json, one"):
        prepare_run_directory(tmp_path, CONFIG)


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            UserError, match=r"must be a directory that can be written \(.*\); cho"
        ):
            prepare_run_directory(path, CONFIG)


def test_an_unwritable_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(dir: Path) -> None:
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    with pytest.raises(
        UserError, match=r"can be written \(Read-only file system\); choose another"
    ):
        prepare_run_directory(tmp_path, CONFIG)


def test_the_summary_text_says_where_everything_is(tmp_path: Path) -> None:
    directory = tmp_path / "my run"
    finished_run(directory)
    (directory / "tensorboard").mkdir()
    waiting = {**SUMMARY, "median_bubble_fraction": 0.4}
    assert summary_text(waiting, directory).splitlines() == [
        "best   epoch 1: val 0.7000, test 0.6900",
        "time   41.2 s, 182 ms/epoch (median)",
        "size   1,234 parameters on 2 rank(s), 200.0 MB at most on one",
        "sent   boundary 1,250.0 MB, carried 0.5 MB per epoch",
        f"files  {directory}: config.yaml, metrics.jsonl, summary.json, tensorboard/",
        f"next   python -m gnnpipe plan '{directory}'/config.yaml --ranks 2"
        "   (ranks wait 40% of the time)",
        f"next   tensorboard --logdir '{directory}'",
        f"next   python -m gnnpipe report '{directory}'",
        f"next   python -m gnnpipe evaluate '{directory}'",
    ]


def test_the_summary_text_of_a_run_without_evaluations_or_messages(tmp_path: Path) -> None:
    unknown = {"best_epoch": None, "median_epoch_s": None, "comm_bytes_per_epoch": {"halo": 0}}
    lines = summary_text({**SUMMARY, **unknown}, tmp_path).splitlines()
    assert lines[0] == "best   unknown: no epoch has a validation figure"
    assert lines[1].endswith("s, - ms/epoch (median)")
    assert lines[3] == "sent   nothing: one rank"
    assert not any("tensorboard" in line or "plan" in line for line in lines)


def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, "old")

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
