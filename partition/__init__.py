"""Which node goes into which (chunk, way): adjacency arrays in, part ids and figures out.

The library part knows numpy arrays only; the program ``python -m partition`` reads data sets and
writes the on-disk format with gnnpipe.
"""

from partition.assignment import METHODS, assign
from partition.errors import PartitionError
from partition.methods import Assignment
from partition.quality import Quality, quality
from partition.report import table, verdict

__all__ = [
    "METHODS",
    "Assignment",
    "PartitionError",
    "Quality",
    "assign",
    "quality",
    "table",
    "verdict",
]
