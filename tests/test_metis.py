"""METIS in its child process: every way it can fail is one clear error."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import path, star

from partition import PartitionError, assign, metis
from partition.adjacency import symmetrised


def test_empty_parts_of_metis_are_an_error() -> None:
    with pytest.raises(PartitionError, match="leaves 1 of 6 parts empty on 6 nodes; cut into few"):
        assign(*star(6), num_chunks=6)


def test_more_parts_than_nodes_of_a_way_are_an_error() -> None:
    adjacency = symmetrised(*path(3))
    with pytest.raises(PartitionError, match="leaves 2 of 5 parts empty on 3 nodes"):
        metis.cut(adjacency, np.ones(3, dtype=np.int64), num_parts=5, seed=0)


WRITE = "import sys, numpy as np; np.save(sys.argv[1] + '/part.npy', np.array({}))"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.abort()", "METIS was ended by SIGABRT; use method bfs"),
        ("import os; os.kill(os.getpid(), 35)", "METIS was ended by signal 35"),
        ("raise MemoryError('out of space.')", r"exit status 1 \(MemoryError: out of space\);"),
        ("import sys; sys.exit(3)", r"exit status 3 \(no message\)"),
        ("pass", "METIS left no readable result"),
        ("import sys; open(sys.argv[1] + '/part.npy', 'w').write('x')", "no readable result"),
        (WRITE.format("[0, 1]"), r"METIS answered int64 \[2\] where 8 part ids in \[0, 2\)"),
        (WRITE.format("[0.5] * 8"), r"METIS answered float64 \[8\]"),
        (WRITE.format("[2, 1] * 4"), r"METIS answered int64 \[8\] where 8 part ids"),
        (WRITE.format("[0] * 8"), "METIS leaves 1 of 2 parts empty on 8 nodes"),
    ],
)
def test_failure_of_the_child_is_one_clear_error(
    program: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        metis, "child_command", lambda directory, *_: [sys.executable, "-c", program, directory]
    )
    with pytest.raises(PartitionError, match=message) as caught:
        assign(*path(8), num_chunks=2)
    assert "\n" not in str(caught.value)


def test_grouped_parts_may_be_empty_as_long_as_no_chunk_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(part_id: str) -> None:
        program = WRITE.format(part_id)
        monkeypatch.setattr(
            metis, "child_command", lambda folder, *_: [sys.executable, "-c", program, folder]
        )

    kind: dict[str, Any] = {"num_chunks": 2, "method": "metis-grouped", "parts_per_chunk": 3}
    answer("[5, 5, 1, 1, 2, 2, 0, 0]")
    chunk_id = assign(*path(8), **kind).chunk_id.reshape(4, 2)
    assert (chunk_id[:, 0] == chunk_id[:, 1]).all()
    assert np.bincount(chunk_id[:, 0]).tolist() == [2, 2]
    answer("[5] * 8")
    with pytest.raises(PartitionError, match="METIS leaves 5 of 6 parts empty on 8 nodes"):
        assign(*path(8), **kind)


def test_stuck_child_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(metis, "child_command", lambda *_: command)
    monkeypatch.setattr(metis, "timeout_s", lambda _: 0.2)
    with pytest.raises(PartitionError, match="METIS did not finish within 0 s; use method bfs"):
        assign(*path(8), num_chunks=2)


def test_timeout_grows_with_the_graph() -> None:
    assert metis.timeout_s(0) == 300
    assert metis.timeout_s(10**8) == pytest.approx(2300)


def test_too_little_memory_is_found_before_metis_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metis, "available_bytes", lambda: 1399)  # 14 directed edges need 1400
    message = "needs about .* GiB for 14 directed edges but .* are available; use method bfs or"
    with pytest.raises(PartitionError, match=message):
        assign(*path(8), num_chunks=2)
    assign(*path(8), num_chunks=2, method="bfs")
    monkeypatch.setattr(metis, "available_bytes", lambda: None)
    assign(*path(8), num_chunks=2)


def test_available_memory_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "MemTotal: 9 kB\nMemAvailable: 3 kB\n")
    assert metis.available_bytes() == 3072

    def fail(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    assert metis.available_bytes() is None


def test_child_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assign(*path(8), num_chunks=2)
