"""``python -m gnnpipe``: see :mod:`gnnpipe.cli`."""

import sys

from gnnpipe import environment
from gnnpipe.cli import main

if __name__ == "__main__":  # A spawned child imports this file again.
    status = main()
    if status and environment.world_size() > 1:
        environment.leave(status)
    sys.exit(status)
