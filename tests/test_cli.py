"""The commands: what they call, what they refuse before heavy imports, and how they exit."""

import errno
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from gnnpipe.cli import guarded, main
from gnnpipe.config import Config, load_config, to_yaml
from gnnpipe.errors import PeerError
from gnnpipe.preflight import THREAD_VARIABLES


class FakeTrainer(types.ModuleType):
    """Stands in for trainer and inference: notes its calls, or raises what it is told to."""

    def __init__(self) -> None:
        super().__init__("gnnpipe.trainer")
        self.calls: list[tuple[Any, ...]] = []
        self.threads = ""
        self.is_quiet: bool | None = None
        self.error: BaseException | None = None

    def train(self, config: Config, *, is_quiet: bool) -> None:
        self.note("train", config)
        self.is_quiet = is_quiet

    def run_reference(self, config: Config, *, is_quiet: bool) -> None:
        self.note("run_reference", config)
        self.is_quiet = is_quiet

    def evaluate_run(self, run_dir: str, *, weights: str, graph: None) -> dict[str, Any]:
        self.note("evaluate_run", run_dir, weights)
        return {"epoch": 7, "accuracy": {"val": 0.75, "test": 0.5}}

    def predict_run(self, run_dir: str, *, weights: str, out: str | None, **_: Any) -> Path:
        self.note("predict_run", run_dir, weights, out)
        return Path(out or "scores.npy")

    def note(self, *call: Any) -> None:
        self.calls.append(call)
        self.threads = os.environ["OMP_NUM_THREADS"]
        if self.error is not None:
            raise self.error


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTrainer:
    """A fake trainer in a process without launcher, in an empty working directory."""
    fake = FakeTrainer()
    for module in ("gnnpipe.trainer", "gnnpipe.inference"):
        monkeypatch.setitem(sys.modules, module, fake)
    for name in THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")  # Restored afterwards, whatever main() writes.
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text(to_yaml(load_config(None, ["run.threads=3"])))
    return str(directory)


def test_train_gets_the_resolved_configuration(trainer: FakeTrainer) -> None:
    Path("c.yaml").write_text("seed: 3\n")
    assert main(["train", "c.yaml", "model.dropout=0.3"]) == 0
    assert trainer.calls == [("train", load_config("c.yaml", ["model.dropout=0.3"]))]
    assert not Path("runs").exists()  # The check of the run directory leaves nothing.


def test_reference_ignores_the_number_of_stages(trainer: FakeTrainer) -> None:
    assert main(["reference", "parallel.num_stages=4"]) == 0
    assert trainer.calls[0][0] == "run_reference"


def test_train_accepts_the_world_size_that_fits(
    trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "parallel.num_stages=2", "parallel.num_ways=2"]) == 0


def test_print_config_stands_anywhere_and_trains_nothing(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text("seed: 3\n")
    assert main(["train", "c.yaml", "--print-config", "parallel.num_stages=2"]) == 0
    expected = load_config("c.yaml", ["parallel.num_stages=2"])
    assert capsys.readouterr().out == to_yaml(expected)
    assert main(["reference", "--print-config"]) == 0
    assert capsys.readouterr().out == to_yaml(Config())
    assert trainer.calls == []


@pytest.mark.parametrize("command", ["train", "reference"])
def test_quiet_is_passed_on(command: str, trainer: FakeTrainer) -> None:
    assert main([command, "seed=1"]) == 0
    assert trainer.is_quiet is False
    assert main([command, "seed=1", "--quiet"]) == 0
    assert trainer.is_quiet is True


def test_path_with_an_equals_sign_is_a_path(trainer: FakeTrainer) -> None:
    Path("lr=1.yaml").write_text("seed: 3\n")
    assert main(["train", "./lr=1.yaml"]) == 0
    assert trainer.calls[0][1].seed == 3


def test_evaluate_prints_figures_or_json(
    trainer: FakeTrainer, run_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", run_dir, "--weights", "last", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == {"epoch": 7, "accuracy": {"val": 0.75, "test": 0.5}}
    assert main(["evaluate", run_dir]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["epoch", "7"], ["accuracy.val", "0.7500"], ["accuracy.test", "0.5000"]]
    assert [call[2] for call in trainer.calls] == ["last", "best"]
    assert trainer.threads == "3"  # The run's own run.threads.


def test_predict_prints_the_path(
    trainer: FakeTrainer, run_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", run_dir, "--out", "new.npy"]) == 0
    assert capsys.readouterr().out == "new.npy\n"
    assert trainer.calls == [("predict_run", run_dir, "best", "new.npy")]


@pytest.mark.parametrize("command", [[], ["train"], ["reference"], ["evaluate"], ["predict"]])
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "example" in capsys.readouterr().out


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("gnnpipe ")


MISTAKES = [
    ("", "arguments are required: COMMAND; see `python -m gnnpipe --help`"),
    ("trian c.yaml", "invalid choice: 'trian'"),
    ("train", "CONFIG.yaml is missing; give a file or key=value"),
    ("train --print-conf", "unrecognized arguments: --print-conf"),
    ("train c.yaml --epochs 3", "unrecognized arguments: --epochs; see `python -m gnnpipe train "),
    ("train nope.yaml", "cannot read the configuration file `nope.yaml`"),
    ("train c.yaml d.yaml", "`d.yaml` is not an override; write it as key.sub=value"),
    ("train c.yaml model.dropot=1", "the nearest is `model.dropout`"),
    ("train c.yaml model.dropout=high", "must be a finite number"),
    ("train c.yaml parallel.num_stages=99", "must be at most `model.num_layers` + 2"),
    ("train c.yaml parallel.num_stages=4", "torchrun --nproc_per_node 4 -m gnnpipe train"),
    ("train c.yaml parallel.num_ways=2", "(=2); start `torchrun --nproc_per_node 2"),
    ("train c.yaml data.name=nope.npz", "`data.name` (=nope.npz) must be a file that exists"),
    ("train c.yaml data.name=nope.pt", "`data.name` (=nope.pt) must be a file that exists"),
    ("train c.yaml data.root=nope", "`data.root` (=nope) must be a directory that exists"),
    ("train c.yaml partition.path=nope", "`partition.path` (=nope) must be a directory"),
    ("train c.yaml partition.method=file partition.file=nope", "`partition.file` (=nope)"),
    ("train c.yaml run.dir=c.yaml", "`run.dir` (=c.yaml) must be a directory"),
    ("train c.yaml run.dir=c.yaml/below", "can be written: Not a directory; choose another"),
    ("train c.yaml run.dir=/proc/gnnpipe/run", "must be a directory that can be written"),
    ("train c.yaml run.dir=" + "x" * 300, "File name too long"),
    ("reference", "CONFIG.yaml is missing"),
    ("evaluate", "arguments are required: RUN_DIR; see `python -m gnnpipe evaluate --help`"),
    ("evaluate nope", "RUN_DIR (=nope) must hold a config.yaml"),
    ("evaluate run extra", "unrecognized arguments: extra"),
    ("evaluate run --weights newest", "invalid choice: 'newest'"),
    ("evaluate foreign", "`layers` is not a known key"),
    ("predict run --out scores.txt", "`--out` (=scores.txt) must be the name of a .npy or"),
    ("predict run --out c.yaml/x.npy", "`--out` (=c.yaml) must be a directory"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line[:60] for line, _ in MISTAKES])
def test_mistake_is_one_error_line_and_status_2(
    line: str,
    message: str,
    trainer: FakeTrainer,
    run_dir: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("c.yaml").write_text("seed: 3\n")
    Path("foreign").mkdir()
    Path("foreign/config.yaml").write_text("layers: 3\n")
    before = sorted(Path().rglob("*"))
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
    assert trainer.calls == []
    assert sorted(Path().rglob("*")) == before  # Nothing half-made stays.


@pytest.mark.parametrize("command", ["reference", "evaluate", "predict"])
def test_command_for_one_process_refuses_a_launcher(
    command: str,
    trainer: FakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, "seed=1"]) == 2
    assert f"`WORLD_SIZE` (=2) must be 1 for `{command}`" in capsys.readouterr().err


def test_too_many_processes_name_the_way_out(
    trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "seed=1"]) == 2
    error = capsys.readouterr().err
    assert "`WORLD_SIZE` (=2) must equal `parallel.num_stages` x `parallel.num_ways` (=1)" in error
    assert "set parallel.num_stages=2" in error


def test_only_rank_0_prints_a_mistake(
    trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "sed=1"]) == 2
    assert capsys.readouterr().err == ""


def test_failure_shows_the_ranks_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise RuntimeError("first\nsecond")

    monkeypatch.setenv("RANK", "2")
    assert guarded(fail) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[rank 2] Traceback (most recent call last):"
    assert lines[-2:] == ["[rank 2] RuntimeError: first", "[rank 2] second"]
    assert all(line.startswith("[rank 2] ") for line in lines)


def test_failure_of_another_rank_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise PeerError("rank 2 failed: RuntimeError: first")

    monkeypatch.setenv("RANK", "1")
    assert guarded(fail) == 1
    assert capsys.readouterr().err == "[rank 1] stopped: rank 2 failed: RuntimeError: first\n"


def test_plain_value_error_is_no_mistake_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ValueError("broken")

    assert guarded(fail) == 1
    assert "Traceback" in capsys.readouterr().err


def test_partition_error_is_a_mistake_of_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class PartitionError(ValueError):
        pass

    def fail() -> int:
        raise PartitionError("too\nmany")

    errors = types.SimpleNamespace(PartitionError=PartitionError)
    monkeypatch.setitem(sys.modules, "partition.errors", errors)
    assert guarded(fail) == 2
    assert capsys.readouterr().err == "error: too many\n"


def test_interrupt_is_one_line_and_status_130(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.error = KeyboardInterrupt()
    assert main(["train", "seed=1"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("code", "name", "status"),
    [
        (errno.ENOSPC, None, 2),  # write(2) does not name the file
        (errno.ENOSPC, "runs/default/metrics.jsonl", 2),
        (errno.EACCES, "runs/default/weights/best.safetensors", 2),
        (errno.EACCES, "runs/default", 2),
        (errno.EACCES, "runs/default2", 1),
        (errno.EACCES, "/etc/shadow", 1),
        (errno.EACCES, None, 1),
        (errno.ENOENT, "runs/default/config.yaml", 1),
    ],
)
def test_refused_write_in_the_run_directory_is_the_users_to_mend(
    code: int,
    name: str | None,
    status: int,
    trainer: FakeTrainer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer.error = OSError(code, os.strerror(code), name)
    assert main(["train", "seed=1"]) == status
    error = capsys.readouterr().err
    if status == 2:
        assert error.startswith("error: `run.dir` (=runs/default) must be a directory that can")
        assert os.strerror(code) in error


def test_threads_are_in_the_environment_before_the_trainer_loads(trainer: FakeTrainer) -> None:
    assert main(["train", "run.threads=3"]) == 0
    assert trainer.threads == "3"
    assert [os.environ[name] for name in THREAD_VARIABLES] == ["3", "3", "3"]
