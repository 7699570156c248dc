"""What is settled before heavy imports: threads, paths, and the environment of children."""

import os
from pathlib import Path

import pytest

from gnnpipe import environment, preflight
from gnnpipe.config import Config, load_config
from gnnpipe.errors import UserError
from gnnpipe.preflight import resolve_threads

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("threads", "variable", "world_size", "expected"),
    [
        ("5", "3", 1, 5),
        ("5", "3", 4, 5),
        ("auto", "3", 1, 3),
        ("auto", "3", 4, 3),
        ("auto", "3,2", 1, 3),
        ("auto", "", 4, 1),
        ("auto", "", 1, len(os.sched_getaffinity(0))),
    ],
)
def test_threads_are_set_or_inherited_or_by_number_of_ranks(
    threads: str,
    variable: str,
    world_size: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert resolve_threads(load_config(None, [f"run.threads={threads}"]), world_size) == expected


@pytest.mark.parametrize("value", ["many", "0", "-2"])
def test_unreadable_thread_count_is_a_mistake(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(UserError, match="`OMP_NUM_THREADS` .* must be a whole number"):
        resolve_threads(Config(), 1)


def test_dangling_link_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="No such file or directory; choose another"):
        preflight.check_writable(str(tmp_path / "link"), "run.dir")


def test_unreadable_world_size_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match=r"`WORLD_SIZE` \(=two\) must be a whole number"):
        environment.world_size()


def test_own_packages_come_first_and_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    env = environment.child_environment({"RANK": "3"})
    assert env["PYTHONPATH"] == f"{ROOT}{os.pathsep}/theirs"
    assert (env["RANK"], env[environment.PARENT_VARIABLE]) == ("3", str(os.getpid()))
