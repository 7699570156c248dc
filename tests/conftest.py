"""What every test file may use: the shared real graphs, and one thread per process."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from process_pool import ProcessPool
from two_hosts import Link, joined

ROOT = Path(__file__).resolve().parents[1]

# Before torch and MKL load: tests compare bits, and several processes share few cores. numba's
# threads are left alone, so that a test can ask for more than one.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# Background jobs of shells ignore signals, and so would the processes that tests send signals to.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        _wanted = signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, _wanted)

settings.register_profile("any machine", deadline=None)  # A busy one is no reason to fail.
settings.load_profile("any machine")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """numba on two threads."""
    import numba  # After the settings above.

    before = numba.get_num_threads()
    if numba.config.NUMBA_NUM_THREADS < 2:  # type: ignore[attr-defined]
        pytest.skip("numba was started with one thread; set NUMBA_NUM_THREADS=2")
    numba.set_num_threads(2)
    yield
    numba.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """A function from a name (``cora.npz``, ``raw/planetoid``) to its path; skips when absent.

    The real graphs lie beside the checkout, or where ``GNNPIPE_DATA`` says.
    """
    folder = Path(os.environ.get("GNNPIPE_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"{name} is not in {folder}; set GNNPIPE_DATA to the folder that has it")
        return path

    return find


@pytest.fixture
def link() -> Iterator[Link]:
    """Two network namespaces that are joined."""
    with joined() as made:
        yield made


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPool]:
    """Eight processes that run distributed jobs, started when a test first asks for them."""
    with ProcessPool(8, tmp_path_factory.mktemp("pool")) as started:
        yield started
