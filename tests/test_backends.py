"""`kernels.backend`: another library sums over neighbours, and the numbers agree to rounding."""

from typing import Any

import pytest
import torch
from drawn import woven
from one_process import losses, pipeline, settings, striped

from gnnpipe.config import load_config
from gnnpipe.errors import UserError
from gnnpipe.kernels import RowBlock, attention, cpu
from gnnpipe.kernels.sparse import backend_for


@pytest.mark.parametrize("name", ["gcn", "sage", "gat"])
def test_torch_computes_what_numba_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = woven(is_directed=True)
    chunks = striped(graph, 4)
    expected = losses(pipeline(graph, settings(name), chunks), 3)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("numba was asked")

    monkeypatch.setattr(cpu, "aggregate", refuse)
    monkeypatch.setattr(attention._Attend, "apply", refuse)
    found = losses(pipeline(graph, settings(name, backend="torch"), chunks), 3)
    assert found == pytest.approx(expected, rel=1e-12)


def test_half_tables_are_read_by_torch_too() -> None:
    graph = woven()
    changes: dict[str, Any] = {"history_dtype": "bfloat16", "dtype": "float32"}
    one, other = (
        losses(pipeline(graph, settings("sage", backend=each, **changes), striped(graph, 3)), 3)
        for each in ("numba", "torch")
    )
    assert one == pytest.approx(other, rel=1e-2)


def test_the_device_decides_unless_somebody_does() -> None:
    host, other = torch.device("cpu"), torch.device("meta")
    assert [backend_for(each, None) for each in (host, other)] == ["numba", "torch"]
    assert backend_for(host, "torch") == "torch"
    block = RowBlock(torch.tensor([0, 1, 2]), torch.tensor([0, 1]).int(), backend="torch")
    assert block.rows(0, 1).backend == "torch"


def test_a_gpu_has_no_numba_kernels() -> None:
    with pytest.raises(UserError, match=r"`kernels.backend` \(=numba\) must be auto, torch or"):
        load_config(None, ["device=cuda", "kernels.backend=numba"])


def test_a_cpu_has_no_triton() -> None:
    with pytest.raises(UserError, match=r"`kernels.backend` \(=triton\) must be auto, numba or"):
        load_config(None, ["device=cpu", "kernels.backend=triton"])
    with pytest.raises(UserError, match="for which Triton makes no code"):
        pipeline(woven(), settings("gcn", backend="triton"))
