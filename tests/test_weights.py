"""Weights come back bit for bit, or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

import gnnpipe.weights
from gnnpipe.errors import UserError
from gnnpipe.weights import check_weights, load_weights, save_weights


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layers.1.weight": torch.randn(3, 4, generator=generator),
        "layers.0.bias": torch.randn(4, generator=generator, dtype=torch.float64),
        "layers.0.eps": torch.tensor(0.5),
        "layers.2.empty": torch.empty(0, 3),
        "layers.2.half": torch.randn(5, generator=generator).bfloat16(),
    }


def test_weights_come_back_bit_for_bit(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_weights(tmp_path / "weights" / "best.safetensors", tensors, {"epoch": "12"})
    loaded, metadata = load_weights(tmp_path / "weights" / "best.safetensors")
    assert metadata == {"epoch": "12"}
    assert sorted(loaded) == sorted(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_parameters_views_and_shared_tensors_are_written_out(tmp_path: Path) -> None:
    whole = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    save_weights(tmp_path / "w", {"whole": whole, "again": whole, "turned": whole.T}, {})
    loaded, _ = load_weights(str(tmp_path / "w"))
    assert torch.equal(loaded["again"], whole)
    assert torch.equal(loaded["turned"], whole.T)
    assert not loaded["whole"].requires_grad


def test_saving_replaces_the_file_and_leaves_no_other(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    for epoch in ("1", "2"):
        save_weights(tmp_path / "last.safetensors", tensors, {"epoch": epoch})
    assert load_weights(tmp_path / "last.safetensors")[1] == {"epoch": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]


def test_interrupted_saving_keeps_the_old_file(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.safetensors"
    save_weights(path, tensors, {"epoch": "1"})

    def no_space(copies: object, temporary: Path, metadata: object) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gnnpipe.weights, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, tensors, {"epoch": "2"})
    assert load_weights(path)[1] == {"epoch": "1"}
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_key_is_reserved(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="metadata key 'sha256' is reserved"):
        save_weights(tmp_path / "w", {}, {"sha256": ""})


def test_a_file_of_another_program_loads_without_a_digest(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "w")
    loaded, metadata = load_weights(tmp_path / "w")
    assert loaded["weight"].tolist() == [1.0, 1.0]
    assert metadata == {}


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save_weights(path, {"weight": torch.ones(3)}, {})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"`weights` \(=.*w\) must be a whole .safetensors"):
            load_weights(path)


def test_every_flipped_bit_of_a_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save_weights(path, {"weight": torch.ones(2)}, {})
    content = path.read_bytes()
    for byte in range(len(content) - 8, len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[byte] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"`weights` \(=.*w\) must match its SHA-256"):
                load_weights(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a zip of pickles", b"\x00" * 64, b'{"json": 1}'],
    ids=["empty", "zip", "zeros", "json"],
)  # fmt: skip
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(UserError, match=r"`weights` \(=.*w\) must be a whole .safetensors file"):
        load_weights(tmp_path / "w")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`weights` \(=.*best\) must be readable \(No such file"):
        load_weights(tmp_path / "best")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`weights` \(=.*\) must be readable"):
        load_weights(tmp_path)


def test_fitting_weights_pass() -> None:
    check_weights({"a": torch.ones(2, 3), "b": torch.tensor(1.0)}, {"a": (2, 3), "b": []})


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"a": [2, 3], "b": [1], "c": [1]}, "weights must hold `b`; load"),
        ({"a": [3, 2]}, r"`a` \(of shape \[2, 3\]\) must have the model's shape \[3, 2\]; load"),
        ({}, "`a` must be one of the model's parameters; load"),
    ],
    ids=["missing", "shape", "extra"],
)
def test_weights_of_another_model_are_refused(
    expected: dict[str, list[int]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_weights({"a": torch.ones(2, 3)}, expected)


def test_the_format_is_plain_safetensors(tmp_path: Path) -> None:
    save_weights(tmp_path / "w", {"weight": torch.ones(2)}, {})
    plain = save({"weight": torch.ones(2)})
    assert (tmp_path / "w").read_bytes()[-8:] == plain[-8:]
