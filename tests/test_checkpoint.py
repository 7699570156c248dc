"""Checkpoints on disk: whole or not at all, and every kind of damage is noticed."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import ring_run, train_on, train_until, write_ring
from safetensors.torch import load_file, save_file

from gnnpipe import checkpoint
from gnnpipe.checkpoint import CheckpointError, FileFacts
from gnnpipe.config import load_config
from gnnpipe.errors import UserError
from gnnpipe.shards import NODE_ID, Shards
from gnnpipe.trainer import Trainer

RANK_0, RANK_1 = (checkpoint.shard_name(rank) for rank in range(2))


def write(folder: Path, epoch: int, *, val: float | None = None, fill: float = 1.0) -> Path:
    """A checkpoint of two ranks, each with a weight and two rows of a table."""
    draft = checkpoint.draft_path(folder, epoch)
    files = {}
    for rank in range(2):
        tensors = {
            f"layers.{rank}.weight": torch.full((2, 3), fill + rank),
            "history.0": torch.tensor([[1.0, rank], [2.0, rank]]),
            NODE_ID: torch.tensor([3 - rank, 1 - rank]),
        }
        name = checkpoint.shard_name(rank)
        files[name] = checkpoint.write_shard(draft / name, tensors)
    return checkpoint.publish(draft, epoch=epoch, files=files, state={"val": val})


def test_a_checkpoint_reads_back_and_leaves_no_draft(tmp_path: Path) -> None:
    path = write(tmp_path, 50, val=0.5)
    found, complaints = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.path, found.epoch, found.state, complaints) == (path, 50, {"val": 0.5}, [])
    assert sorted(os.listdir(tmp_path)) == ["epoch-000050"]
    with Shards(checkpoint.shard_paths(path)) as shards:
        assert torch.equal(shards.tensor("layers.1.weight"), torch.full((2, 3), 2.0))
        rows = shards.rows("history.0", torch.tensor([0, 1, 2, 3]))
        assert rows.tolist() == [[2.0, 1.0], [2.0, 0.0], [1.0, 1.0], [1.0, 0.0]]
        assert "layers.2.weight" not in shards
        with pytest.raises(
            UserError, match=r"must hold `layers.2.weight`; it is of another model"
        ):
            shards.tensor("layers.2.weight")
        with pytest.raises(UserError, match=r"\(of shape \[2, 3\]\) must have the shape \[3\]"):
            shards.tensor("layers.0.weight", (3,))
        with pytest.raises(
            UserError, match=r"must hold every row of `history.0`; it is of anothe"
        ):
            shards.rows("history.0", torch.tensor([0, 4]))


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    files = [path for path in write(tmp_path, 1).iterdir() if path.name != "manifest.json"]
    assert {path.suffix for path in files} == {".safetensors"}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for epoch, val in ((1, 0.5), (2, 0.9), (3, 0.9), (4, None), (5, 0.1), (6, 0.2)):
        write(tmp_path, epoch, val=val)
        checkpoint.prune(tmp_path, 2)
    assert checkpoint.names(tmp_path) == ["epoch-000006", "epoch-000005", "epoch-000002"]


def test_what_a_killed_run_was_writing_is_deleted(tmp_path: Path) -> None:
    write(tmp_path, 1)
    draft = checkpoint.draft_path(tmp_path, 2)
    checkpoint.write_shard(draft / RANK_0, {"x": torch.ones(1)})
    assert checkpoint.names(tmp_path) == ["epoch-000001"]
    checkpoint.clean(tmp_path)
    assert os.listdir(tmp_path) == ["epoch-000001"]
    checkpoint.clean(tmp_path / "nowhere")


def test_a_checkpoint_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    damaged = write(tmp_path, 1)
    (damaged / RANK_1).unlink()
    write(tmp_path, 1, fill=7.0)
    assert checkpoint.newest(tmp_path)[1] == []
    assert os.listdir(tmp_path) == ["epoch-000001"]


# --- damage


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object], *, sign: bool) -> None:
    """Changes the manifest; ``sign`` gives it a valid hash again."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    if sign:
        manifest["manifest_sha256"] = checkpoint._manifest_hash(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


def swapped(path: Path) -> None:
    one, other = (path / RANK_0).read_bytes(), (path / RANK_1).read_bytes()
    (path / RANK_0).write_bytes(other)
    (path / RANK_1).write_bytes(one)


def retyped(path: Path) -> None:
    tensors = load_file(path / RANK_0)
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path / RANK_0)


def replaced_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def replaced_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def from_another(path: Path) -> None:
    shutil.copy(write(path.parent / "other", 2, fill=5.0) / RANK_1, path / RANK_1)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest missing": (lambda p: (p / "manifest.json").unlink(), "cannot be read"),
    "manifest empty": (lambda p: edit(p / "manifest.json", lambda d: b""), "is no JSON"),
    "manifest torn": (lambda p: edit(p / "manifest.json", lambda d: d[:99]), "is no JSON"),
    "manifest zeroed": (lambda p: edit(p / "manifest.json", lambda d: bytes(len(d))), "no JSON"),
    "manifest not UTF-8": (lambda p: edit(p / "manifest.json", lambda d: b"\xff\xfe"), "no JSON"),
    "manifest a list": (lambda p: edit(p / "manifest.json", lambda d: b"[1]"), "not of the form"),
    "manifest foreign": (
        lambda p: edit_manifest(p, lambda m: m.update(format="zip"), sign=True),
        "not of the format",
    ),
    "manifest of a later version": (
        lambda p: edit_manifest(p, lambda m: m.update(version=2), sign=True),
        "version 2 is not 1",
    ),
    "manifest edited": (
        lambda p: edit_manifest(p, lambda m: m.update(epoch=9), sign=False),
        "does not match its SHA-256",
    ),
    "manifest without a hash": (
        lambda p: edit_manifest(p, lambda m: m.pop("manifest_sha256"), sign=False),
        "does not match its SHA-256",
    ),
    "manifest without files": (
        lambda p: edit_manifest(p, lambda m: m.update(files={}), sign=True),
        "lists no file of rank 0",
    ),
    "manifest points outside": (
        lambda p: edit_manifest(
            p,
            lambda m: m["files"].update({"../x": {}}),
            sign=True,
        ),
        "lists a foreign file",
    ),
    "directory renamed": (lambda p: p.rename(p.with_name("epoch-000007")), "holds epoch 2"),
    "directory emptied": (emptied, "cannot be read"),
    "directory a file": (replaced_by_file, "cannot be read"),
    "shard missing": (lambda p: (p / RANK_1).unlink(), "cannot be read"),
    "shard empty": (lambda p: edit(p / RANK_0, lambda d: b""), "has 0 of"),
    "shard torn": (lambda p: edit(p / RANK_0, lambda d: d[:-1]), "bytes"),
    "shard too long": (lambda p: edit(p / RANK_0, lambda d: d + b"\0"), "bytes"),
    "bit of the header": (lambda p: edit(p / RANK_0, lambda d: flipped(d, 9)), "SHA-256"),
    "bit of a tensor": (lambda p: edit(p / RANK_1, lambda d: flipped(d, -1)), "SHA-256"),
    "shard zeroed": (lambda p: edit(p / RANK_1, lambda d: bytes(len(d))), "SHA-256"),
    "shards swapped": (swapped, "SHA-256"),
    "shard of another type": (retyped, "bytes"),
    "shard of another run": (from_another, "SHA-256"),
    "shard a directory": (lambda p: replaced_by_directory(p / RANK_0), "cannot be read"),
    "shard a dead link": (lambda p: replaced_by_link(p / RANK_0), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_detected_told_and_skipped(kind: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[kind]
    good = write(tmp_path, 1)
    damage(write(tmp_path, 2))
    found, complaints = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.path == good
    assert len(complaints) == 1
    assert message in complaints[0]
    (name,) = [name for name in checkpoint.names(tmp_path) if name != good.name]
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(tmp_path / name)


def test_every_single_byte_counts(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    for file in path.iterdir():
        whole = file.read_bytes()
        for position in range(0, len(whole), 7):
            file.write_bytes(flipped(whole, position))
            assert checkpoint.newest(tmp_path)[0] is None, (file.name, position)
        file.write_bytes(whole)
    assert checkpoint.newest(tmp_path)[0] is not None


# --- in a run


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ring")
    write_ring(folder)
    return folder


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    ring: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = ring_run(ring, tmp_path)
    train_until(run, 5)
    checkpoints = tmp_path / "checkpoints"
    edit(checkpoints / "epoch-000005" / RANK_0, lambda data: flipped(data, -1))
    caplog.set_level("INFO", logger="gnnpipe")
    train_until(run, 7)
    assert "skipping a damaged checkpoint: " in caplog.text
    assert "going on after epoch 3 with" in caplog.text
    for path in checkpoints.glob("*/" + RANK_0):
        edit(path, lambda data: data[:-1])
    message = r"no sound checkpoint \(.*epoch-000007: rank-00000.safetensors has .* bytes; .*"
    with pytest.raises(UserError, match=message):
        train_on(run)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", ["write_shard", "publish"])
def test_a_disk_that_refuses_ends_the_run_and_keeps_the_last_checkpoint(
    call: str, number: int, ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> FileFacts:
        raise OSError(number, os.strerror(number))

    run = ring_run(ring, tmp_path)
    train_until(run, 4)
    before = {path: path.read_bytes() for path in tmp_path.glob("checkpoints/*/*")}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, call, refuses)
        with pytest.raises(UserError, match=rf"epoch 6: {os.strerror(number)}; epoch-000004 is i"):
            train_on(run)
    assert {path: path.read_bytes() for path in tmp_path.glob("checkpoints/*/*")} == before
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["epoch-000003", "epoch-000004"]
    train_on(run)


def test_a_full_disk_at_the_first_checkpoint_says_so(
    ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path) -> None:
        from safetensors import SafetensorError

        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device; there is none before it; make"):
        train_on(ring_run(ring, tmp_path))


def test_only_a_sound_best_file_comes_back(ring: Path, tmp_path: Path) -> None:
    run = ring_run(ring, tmp_path)
    train_until(run, 3)
    best = tmp_path / "weights" / "best.safetensors"
    wanted = best.read_bytes()
    best.write_bytes(b"of an epoch that no longer counts")
    train_until(run, 4)
    assert best.read_bytes() == wanted
    Trainer(load_config(None, [*run, "training.epochs=4"])).fit()
