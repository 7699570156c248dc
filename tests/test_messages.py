"""Formats of messages: what they cost, what they lose, what they never change."""

from pathlib import Path

import pytest
import torch
from combinations import differing, train_all
from process_pool import Job, ProcessPool

from gnnpipe.comm import Comm, Groups
from gnnpipe.kernels import quantize
from gnnpipe.mesh import Mesh
from gnnpipe.messages import Format, Formats, buffer_for, pack, payload_bytes, unpack
from gnnpipe.weight_sums import WeightSums
from gnnpipe.world import join

FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8")


def rows(
    num_rows: int = 50, channels: int = 7, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((num_rows, channels), dtype=dtype, generator=generator)


def received(x: torch.Tensor, form: Format, key: int = 1) -> torch.Tensor:
    target = torch.full_like(x, torch.nan)
    payload = buffer_for(target, form)
    sent = pack(x, form, key=key)
    assert sent.nbytes == payload.nbytes == payload_bytes(x, form)
    payload.copy_(sent)
    unpack(payload, form, target=target)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uncompressed_rows_arrive_as_they_are(dtype: torch.dtype) -> None:
    assert torch.equal(received(rows(dtype=dtype), "fp32"), rows(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bf16_rounds_to_nearest(dtype: torch.dtype) -> None:
    x = rows(dtype=dtype)
    assert torch.equal(received(x, "bf16"), x.to(torch.bfloat16).to(dtype))
    assert payload_bytes(x, "bf16") == 50 * 7 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_int8_is_off_by_less_than_one_level(dtype: torch.dtype) -> None:
    x = rows(dtype=dtype)
    level = x.abs().amax(1, keepdim=True) / 127
    assert ((received(x, "int8") - x).abs() < 1.001 * level).all()
    assert payload_bytes(x, "int8") == 50 * (7 + 4)


def test_int8_roundings_average_to_the_value() -> None:
    x = rows(4, 5)
    mean = torch.stack([received(x, "int8", key) for key in range(4000)]).mean(0)
    level = x.abs().amax(1, keepdim=True) / 127
    assert ((mean - x).abs() < 0.04 * level).all()  # 5 standard deviations of the mean


def test_int8_rounding_is_a_function_of_the_key() -> None:
    assert torch.equal(received(rows(), "int8", 5), received(rows(), "int8", 5))
    assert not torch.equal(received(rows(), "int8", 5), received(rows(), "int8", 6))


def test_rows_that_are_zero_empty_or_not_finite() -> None:
    x = rows(4, 3)
    x[1] = 0.0
    x[2, 0] = torch.inf
    x[3, 1] = torch.nan
    result = received(x, "int8")
    assert torch.equal(result[1], x[1])
    assert result[2:].isnan().all()
    for form in FORMATS:
        assert received(rows(0, 3), form).shape == (0, 3)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_kernel_equals_plain_torch(scale: float) -> None:
    x = rows(40, 9) * scale
    x[5] = 0.0
    x[6, 3] = torch.nan
    found, expected = ((torch.empty(40, 9, dtype=torch.int8), torch.empty(40)) for _ in range(2))
    quantize.quantize_rows(x, key=2**63 + 5, levels=found[0], scale=found[1])
    quantize._in_torch(x, 2**63 + 5, *expected)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, equal_nan=True)


def test_evaluations_are_never_compressed() -> None:
    formats = Formats(*["int8"] * 4)  # type: ignore[arg-type]
    assert formats.of("evaluation") == "fp32"
    assert formats.of("halo") == "int8"


# --- weight sums


def sum_weights(form: Format) -> None:
    """A job: two ways sum the same small gradients for some steps."""
    with join(device="cpu", timeout_s=30.0) as world:
        like = torch.empty(0)
        groups = Groups(ways=torch.distributed.group.WORLD)
        formats = Formats(gradient=form)
        comm = Comm(
            Mesh(1, 2), world.rank, groups=groups, like=like, timeout_s=30.0, formats=formats
        )
        sums = WeightSums(comm)
        exact = rows(3, 50) + rows(3, 50).flip(0)
        total, num_steps = torch.zeros_like(exact), 40
        for step in range(num_steps):
            own = rows(3, 50) if world.rank == 0 else rows(3, 50).flip(0)
            parts = [own[0].clone(), own[1:].clone()]
            sums.start(7, parts, step=step)
            sums.finish()
            total += torch.cat([parts[0].unsqueeze(0), parts[1]])
        assert bool(sums.state_dict()) == (form != "fp32")
        other = WeightSums(comm)
        other.load_state_dict(sums.state_dict(), range(9))
        assert all(torch.equal(v, sums.state_dict()[k]) for k, v in other.state_dict().items())
        # Without error feedback the error of bf16 would grow with the steps.
        error = float((total - num_steps * exact).abs().max())
        assert error < {"fp32": 1e-3, "bf16": 0.05, "int8": 0.2}[form], error
        both = [torch.empty_like(total) for _ in range(2)]
        torch.distributed.all_gather(both, total)
        assert torch.equal(both[0], both[1])
        size = {"fp32": 150 * 4, "bf16": 2 * 64 * 2 * 2, "int8": 2 * 2 * 68}[form]
        assert comm.sent_bytes["gradient"] == num_steps * size


@pytest.mark.parametrize("form", FORMATS)
def test_compressed_weight_sums_owe_no_more_than_one_rounding(
    form: Format, pool: ProcessPool
) -> None:
    pool.run([Job("test_messages:sum_weights", 2, {"form": form})], timeout_s=100)


# --- whole runs

RUN = ["model.num_layers=4", "model.hidden_channels=12", "training.epochs=3"]
RUN += ["partition.num_chunks=4", "parallel.layers_per_stage=[2,1,1,2]"]


def compressed(form: Format) -> list[str]:
    return [f"comm.{kind}={form}" for kind in ("boundary", "carried", "halo", "gradient")]


def test_compressed_runs_do_not_depend_on_the_schedule(pool: ProcessPool, tmp_path: Path) -> None:
    table = {}
    for form in FORMATS:
        for stages, virtual in ((4, 1), (2, 2)):
            mesh = [f"parallel.num_stages={stages}", f"parallel.virtual_stages={virtual}"]
            table[f"{form}-{stages}"] = [*RUN, *mesh, *compressed(form)]
    results = train_all(pool, tmp_path, table)
    for form in FORMATS:
        assert differing(results[f"{form}-4"], results[f"{form}-2"]) == []
    fp32, bf16, int8 = (results[f"{form}-4"].comm_bytes[0] for form in FORMATS)
    for kind in ("boundary", "carried"):
        assert bf16[kind] * 2 == fp32[kind]
        assert int8[kind] * 48 == fp32[kind] * 16  # 12 channels: 48 bytes, or 12 and a scale
    assert differing(results["fp32-4"], results["int8-4"])
    losses = [results[f"{form}-4"].losses[-1] for form in FORMATS]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.02)


def test_halos_and_weight_sums_compress_too(pool: ProcessPool, tmp_path: Path) -> None:
    ways = [*RUN[:4], "parallel.num_ways=2", "history.strata=0"]
    table: dict[str, list[str]] = {form: [*ways, *compressed(form)] for form in FORMATS}
    results = train_all(pool, tmp_path, table)
    fp32, bf16, int8 = (results[form].comm_bytes[0] for form in FORMATS)
    assert bf16["halo"] * 2 == fp32["halo"]
    assert int8["halo"] * 48 == fp32["halo"] * 16
    assert int8["gradient"] < bf16["gradient"] < fp32["gradient"]
    assert bf16["evaluation"] == fp32["evaluation"]
    losses = [results[form].losses[-1] for form in FORMATS]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.02)


def test_a_resumed_run_still_owes_what_rounding_lost(pool: ProcessPool, tmp_path: Path) -> None:
    run = [*RUN[:2], "partition.num_chunks=2", "parallel.num_ways=2", "comm.gradient=int8"]
    run += ["checkpoint.every=2", "training.eval_every=2"]
    whole = train_all(pool, tmp_path / "whole", {"run": [*run, "training.epochs=4"]})["run"]
    train_all(pool, tmp_path / "parts", {"run": [*run, "training.epochs=2"]})
    parts = train_all(pool, tmp_path / "parts", {"run": [*run, "training.epochs=4"]})["run"]
    assert len(parts.losses) == 4
    assert differing(whole, parts) == []
