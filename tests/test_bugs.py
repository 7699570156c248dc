"""One test for each fixed bug; its docstring is the story: symptom, cause, since when."""

import numba
import pytest
import torch

from gnnpipe.config import load_config
from gnnpipe.trainer import set_threads
from gnnpipe.world import join


def test_a_kernel_compiles_after_the_threads_are_set_in_a_process_that_has_numba(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``gnnpipe.cli.main`` in a notebook failed: Cannot set NUMBA_NUM_THREADS to a different ...

    Commands put the threads into the environment before numba loads. Where it was loaded before,
    with every core, numba found the other number when it first compiled a kernel and refused; with
    kernels in numba's cache nobody noticed. Since the first version.
    """
    monkeypatch.setenv("NUMBA_NUM_THREADS", "77")
    before = numba.get_num_threads()
    try:
        set_threads(load_config(None, ["run.threads=1"]), 1)
        assert numba.njit(lambda x: x + 1)(1) == 2
    finally:
        numba.set_num_threads(before)


def test_vanishing_gradients_do_not_slow_an_epoch_down() -> None:
    """A 32-layer GCNII on squirrel took three times as long with one seed as with another.

    Its gradients vanished into numbers below float32's normal range, which a CPU computes with
    ten to a hundred times as slowly. Since the first version.
    """
    tiny = torch.full((4, 4), 1e-39)
    assert (tiny * 0.5).any()
    with join(device="cpu", timeout_s=1.0):
        assert not (tiny * 0.5).any()
    assert (tiny * 0.5).any()  # A script that goes on has its own arithmetic.
