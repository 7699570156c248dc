"""The arithmetic that touches edges: one signature, a backend per device.

numba on CPU; torch.sparse elsewhere and as the oracle of the tests.
"""

from gnnpipe.kernels.attention import EdgeDrop, EdgeOrder, attend
from gnnpipe.kernels.dropout import dropout_edges, dropout_rows, dropped_rows
from gnnpipe.kernels.product import HalfProducts, half_products_gain
from gnnpipe.kernels.rectify import relu
from gnnpipe.kernels.sparse import RowBlock, SparseRows, aggregate, linear

__all__ = [
    "EdgeDrop",
    "EdgeOrder",
    "HalfProducts",
    "RowBlock",
    "SparseRows",
    "aggregate",
    "attend",
    "dropout_edges",
    "dropout_rows",
    "dropped_rows",
    "half_products_gain",
    "linear",
    "relu",
]
