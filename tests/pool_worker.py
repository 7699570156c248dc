"""One worker of the process pool: ``pool_worker.py DIRECTORY INDEX``."""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from process_pool import POLL_S, rank_variables

from gnnpipe.environment import end_with_parent


def main(directory: Path, index: int) -> None:
    """Runs the jobs that this worker has a part in, until it is killed."""
    end_with_parent()
    number = 0
    while True:
        path = directory / f"job-{number}"
        while not path.exists():
            time.sleep(POLL_S)
        job = json.loads(path.read_text())
        rank = index - job["first"]
        if 0 <= rank < job["num_ranks"]:
            rendezvous = path.with_suffix(".rendezvous")
            os.environ.update(rank_variables(rank, job["num_ranks"], rendezvous))
            module, name = job["function"].split(":")
            getattr(importlib.import_module(module), name)(**job["arguments"])
            (directory / f"{path.name}.done-{index}").touch()
        number += 1


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except Exception:
        traceback.print_exc()  # Not left to torch, which adds a prefix for each job before.
        sys.exit(1)
