"""The doctor: a sound machine, and each thing that may be wrong with one."""

import importlib
import json
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gnnpipe import doctor
from gnnpipe.cli import main
from gnnpipe.doctor import Finding, verdict
from partition import PartitionError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_this_machine_is_sound_and_sends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor.examine, "__kwdefaults__", {"send_s": 0.2})
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    states = {each["what"]: each["state"] for each in found["findings"]}
    assert set(states) >= {
        "versions", "threads", "memory", "writing", "backends", "METIS", "Ray", "sending"
    }  # fmt: skip
    assert "bad" not in states.values()
    (sent,) = [each["found"] for each in found["findings"] if each["what"] == "sending"]
    assert re.fullmatch(r"two ranks on this host: \d+ us, \d+\.\d\d GB/s", sent)
    assert list(tmp_path.iterdir()) == []


def test_what_is_bad_is_told_with_a_way_out_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("ok", "memory", "9 GB"), Finding("bad", "METIS", "gone", "pip install it")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok    memory      9 GB"
    assert lines[1] == "bad   METIS       gone"
    assert lines[2].strip() == "-> pip install it"
    assert lines[3] == "to mend before a run can work: METIS"


def test_the_last_line_sums_up() -> None:
    assert verdict([Finding("ok", "memory", "")]) == "all is well"
    warned = verdict([Finding("warn", "memory", ""), Finding("ok", "Ray", "")])
    assert warned == "runs will work; worth a look: memory"


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def lookup(name: str) -> str:
        if name == "pymetis":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", lookup)
    assert doctor.versions()[0::2] == ("bad", "missing: pymetis")
    assert doctor.versions().advice == "pip install pymetis"


def test_more_threads_than_cores_and_little_memory_are_worth_a_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert doctor.threads().state == "warn"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.threads().state == "ok"
    monkeypatch.setattr(doctor, "free_bytes", lambda: 10**9)
    assert doctor.memory()[:3] == ("warn", "memory", "1.0 GB free")


def test_a_place_that_cannot_be_written_or_is_full_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("")
    assert doctor.writing().state == "bad"
    assert "Not a directory" in doctor.writing().found
    (tmp_path / "runs").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    assert doctor.writing().state == "warn"


def test_gpus_are_listed_with_what_they_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(name="H100", total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: i == 0)
    found = {each.what: each for each in doctor.gpus()}
    assert found["GPU 0"].found == "H100, 80 GB, reaches [1] directly"
    assert found["GPU 1"].found == "H100, 80 GB"
    if "nccl" not in found["backends"].found:
        assert found["NCCL"].state == "bad"


def test_a_driver_that_does_not_answer_is_worth_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (_, found) = doctor.gpus()
    assert found.state == "warn"
    assert "nvidia-smi" in found.advice


def test_broken_metis_and_ray_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise PartitionError("METIS ended with signal 11")

    monkeypatch.setattr(doctor, "assign", fail)
    assert doctor.metis()[:3] == ("bad", "METIS", "METIS ended with signal 11")
    assert doctor.metis().advice == "pip install pymetis, or set partition.method=bfs"

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert doctor.ray()[:3] == ("warn", "Ray", "does not load: ray")


def test_ranks_that_cannot_meet_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    found = doctor.sending(0.1)
    assert found[:3] == ("bad", "sending", "a rank was ended")
    assert "loopback" in found.advice


def test_doctor_is_for_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 2
    assert "must be 1 for `doctor`" in capsys.readouterr().err
