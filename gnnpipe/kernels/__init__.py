"""The arithmetic that touches edges: one signature, a backend per device.

numba on CPU; torch.sparse elsewhere and as the oracle of the tests.
"""

from gnnpipe.kernels.attention import EdgeDrop, EdgeOrder, attend
from gnnpipe.kernels.dropout import dropout_edges, dropout_rows, dropped_rows, prepare_drop
from gnnpipe.kernels.largest import largest
from gnnpipe.kernels.late import prepare_show
from gnnpipe.kernels.product import HalfProducts, half_products_gain, multiply
from gnnpipe.kernels.rectify import keep_where, rectify, relu
from gnnpipe.kernels.sparse import RowBlock, SparseRows, aggregate, linear, prepare
from gnnpipe.kernels.strata import (
    indicator,
    prepare_collect,
    prepare_move,
    prepare_pay,
    prepare_sum,
    stale_shares,
)

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
    "indicator",
    "keep_where",
    "largest",
    "linear",
    "multiply",
    "prepare",
    "prepare_collect",
    "prepare_drop",
    "prepare_move",
    "prepare_pay",
    "prepare_show",
    "prepare_sum",
    "rectify",
    "relu",
    "stale_shares",
]
