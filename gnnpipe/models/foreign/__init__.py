"""Modules that others wrote, as layers of the pipeline: torch's row-wise ones, PyG's convolutions.

``adapt`` finds the adapter that fits, or says why none does; ``from_pyg`` opens whole models.
"""

from gnnpipe.models.foreign.adapt import adapt
from gnnpipe.models.foreign.facts import EdgeFacts
from gnnpipe.models.foreign.from_pyg import from_pyg

__all__ = ["EdgeFacts", "adapt", "from_pyg"]
