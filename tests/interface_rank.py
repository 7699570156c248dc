"""One rank behind a network interface: ``interface_rank.py INTERFACE RESULT SETTINGS``.

Trains each list of overrides in the JSON file SETTINGS. At the end of every epoch rank 0 notes
what the counters of the run and of the interface say, and at last writes the notes to RESULT.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from gnnpipe.config import load_config
from gnnpipe.environment import end_with_parent
from gnnpipe.metrics import EpochRecord
from gnnpipe.trainer import Trainer

COUNTERS = ("rx_bytes", "tx_bytes")


def main(interface: str, result: Path, settings: Path) -> None:
    """Trains every setting; both directions of the link count."""
    end_with_parent()
    statistics = Path("/sys/class/net") / interface / "statistics"
    first_port = int(os.environ["MASTER_PORT"])
    notes: list[list[dict[str, Any]]] = []

    def note(record: EpochRecord) -> None:
        on_link = sum(int((statistics / name).read_text()) for name in COUNTERS)
        notes[-1].append({"counted": dict(record.comm_bytes), "on_link": on_link})

    for index, overrides in enumerate(json.loads(settings.read_text())):
        os.environ["MASTER_PORT"] = str(first_port + index)
        notes.append([])
        Trainer(load_config(None, overrides), on_epoch_end=[note]).fit()
    if os.environ["RANK"] == "0":
        result.write_text(json.dumps(notes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
