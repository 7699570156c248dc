"""The wheel, the weight of an import, and what may not be in a tracked file."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gnnpipe", "launch", "partition")
# Homes and work folders of whoever wrote the file: a stranger has none of them.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/")


def project_files() -> list[Path]:
    """Files that git tracks, or would: paths relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to know which files belong to the project")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    names = sorted(set(listed.stdout.split("\0")) - {""})
    return [Path(name) for name in names if (ROOT / name).is_file()]


def source_files() -> list[str]:
    return [path.as_posix() for path in project_files() if is_source(path)]


def is_source(path: Path) -> bool:
    return path.suffix == ".py" and path.parts[0] in PACKAGES


def run_python(*args: str, cwd: Path, path: Path | None = None) -> str:
    env = dict(os.environ) | ({} if path is None else {"PYTHONPATH": str(path)})
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the project's files, so that no old build/ can leak in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in project_files():
        (source / path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    run_python(
        "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source), cwd=out
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run_python("-m", "pip", "install", *options, "--target", str(target), str(wheel), cwd=target)
    return target


def test_wheel_holds_exactly_the_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert len(tops) == len(PACKAGES) + 1


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = [name for name in archive.namelist() if name.endswith(".py")]
    assert sorted(packed) == source_files()


def test_wheel_declares_the_command_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(n.split("/")[0] for n in archive.namelist() if n.endswith("/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    assert "gnnpipe = gnnpipe.__main__:main" in entry_points
    assert "Apache License" in licence


def test_installed_wheel_runs_from_elsewhere(installed: Path, tmp_path: Path) -> None:
    for package in PACKAGES:
        code = f"import {package}; print({package}.__file__)"
        file = run_python("-c", code, cwd=tmp_path, path=installed).strip()
        assert Path(file).is_relative_to(installed)
    assert "train" in run_python("-m", "gnnpipe", "--help", cwd=tmp_path, path=installed)


@pytest.mark.parametrize(
    "module",
    ["", ".cli", ".config", ".counter", ".errors", ".mesh", ".schedule"],
    ids=lambda module: f"gnnpipe{module}",
)
def test_import_is_light(module: str, tmp_path: Path) -> None:
    code = f"""
import sys, gnnpipe{module}
print(*({{"numpy", "ray", "torch"}} & sys.modules.keys()))
"""
    assert run_python("-c", code, cwd=tmp_path, path=ROOT).strip() == ""


def test_no_file_contains_a_machine_path() -> None:
    found = [
        f"{path}: {line.strip()}"
        for path in project_files()
        for line in (ROOT / path).read_text(encoding="utf-8", errors="replace").splitlines()
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("text", ["cd /" + "home/ann/x", "'/" + "root/.cache'"])
def test_machine_paths_are_recognised(text: str) -> None:
    assert MACHINE_PATH.search(text)


def test_architecture_describes_exactly_the_source_files() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    described = re.findall(
        r"^\| `((?:gnnpipe|launch|partition)/[\w/]+\.py)` \|", text, re.MULTILINE
    )
    assert sorted(described) == source_files()
