"""``python -m gnnpipe``: see :mod:`gnnpipe.cli`."""

import sys

from gnnpipe.cli import main

if __name__ == "__main__":  # A spawned child imports this file again.
    sys.exit(main())
