"""The arithmetic that touches edges: one signature, a backend per device.

numba on CPU; torch.sparse elsewhere and as the oracle of the tests.
"""

from gnnpipe.kernels.dropout import dropout_edges, dropout_rows
from gnnpipe.kernels.sparse import RowBlock, SparseRows, aggregate, linear

__all__ = ["RowBlock", "SparseRows", "aggregate", "dropout_edges", "dropout_rows", "linear"]
