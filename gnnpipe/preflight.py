"""What is checked and settled from the configuration before numpy, numba and torch load."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gnnpipe.config import Config, from_dict, to_dict
from gnnpipe.errors import UserError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
PATH_SUFFIXES = (".npz", ".pt")

NO_ROOM = ("ENOSPC", "EDQUOT")
NOT_ALLOWED = ("EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "ENAMETOOLONG", *NO_ROOM)


def resolve_threads(config: Config, world_size: int) -> int:
    """CPU threads of each rank.

    ``run.threads`` if it is a number, else ``OMP_NUM_THREADS`` if set, else 1 beside other
    ranks, else every core that this process may use.

    Args:
        config: the run's configuration.
        world_size: number of ranks.
    """
    if config.run.threads != "auto":
        return config.run.threads
    # OpenMP allows a list, one number for each level of nesting; the first is ours.
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise UserError(
                f"`OMP_NUM_THREADS` (={text}) must be a whole number of at least 1; "
                "unset it or set run.threads"
            )
        return int(text)
    if world_size > 1:
        return 1
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def thread_variables(num_threads: int) -> dict[str, str]:
    """Environment variables that give each library this number of threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(num_threads))


def check_world_size(config: Config, world_size: int) -> None:
    """Checks that as many processes were started as the configuration needs."""
    if config.parallel.plan == "auto":
        return
    needed = config.world_size
    if world_size != needed:
        settings = f"parallel.num_stages={world_size}"
        if config.parallel.num_ways > 1:
            settings += " parallel.num_ways=1"
        start = "run `python -m gnnpipe train ...` without a launcher"
        if needed > 1:
            start = f"start `torchrun --nproc_per_node {needed} -m gnnpipe train ...`"
        raise UserError(
            f"`WORLD_SIZE` (={world_size}) must equal `parallel.num_stages` x "
            f"`parallel.num_ways` (={needed}); {start} or set {settings}"
        )


def replanned(config: Config, world_size: int) -> Config:
    """The same run on another number of ranks, for elastic launchers that lost or found hosts.

    The ways stay if they divide the ranks, because other ways change the last bits of sums.

    Args:
        config: the run as it was planned.
        world_size: number of ranks now.
    """
    if world_size == config.world_size:
        return config
    values = to_dict(config)
    ways = config.parallel.num_ways
    ways = ways if world_size % ways == 0 else 1
    values["parallel"] |= {
        "num_stages": world_size // ways,
        "num_ways": ways,
        "virtual_stages": 1,
        "layers_per_stage": None,
    }
    return from_dict(values)


def check_single_process(command: str, world_size: int) -> None:
    """Checks that a command for one process was not started by a launcher."""
    if world_size != 1:
        raise UserError(
            f"`WORLD_SIZE` (={world_size}) must be 1 for `{command}`; run it without a launcher"
        )


def check_inputs(config: Config) -> None:
    """Checks that the files and directories that the configuration names are there."""
    paths = {"data.root": config.data.root, "partition.path": config.partition.path}
    for key, path in paths.items():
        if path is not None and not os.path.isdir(path):
            raise UserError(f"`{key}` (={path}) must be a directory that exists; check the path")
    files = {"partition.file": config.partition.file}
    if config.data.name.endswith(PATH_SUFFIXES):
        # As the reader finds it: a relative path starts from the root.
        path = os.path.join(config.data.root or "", config.data.name)
        files["data.name"] = os.path.expanduser(path)
    for key, path in files.items():
        if path is not None and not os.path.isfile(path):
            raise UserError(f"`{key}` (={path}) must be a file that exists; check the path")


def check_writable(directory: str, key: str) -> None:
    """Checks that a directory exists or can be made, and takes files; leaves nothing behind.

    Args:
        directory: path of the directory.
        key: what the user calls it.
    """
    try:
        nearest = Path(directory).absolute()
        while not nearest.exists() and not nearest.is_symlink():
            nearest = nearest.parent
        # Tried, not asked: to root, os.access says yes to what then fails.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise _not_writable(key, directory, error) from error


@contextmanager
def user_directory(directory: str, key: str) -> Iterator[None]:
    """Turns a write that the user's own directory refuses into a UserError."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        place = os.path.abspath(str(error.filename)) if error.filename is not None else None
        root = os.path.abspath(directory)
        # A failed write(2), unlike open(2), does not say on which file.
        is_inside = (
            name in NO_ROOM if place is None else (place + os.sep).startswith(root + os.sep)
        )
        if name not in NOT_ALLOWED or not is_inside:
            raise
        raise _not_writable(key, directory, error) from error


def _not_writable(key: str, directory: str, error: OSError) -> UserError:
    return UserError(
        f"`{key}` (={directory}) must be a directory that can be written: "
        f"{error.strerror or error}; choose another or make room for it"
    )
