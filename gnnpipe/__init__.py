"""Pipelined training of deep graph neural networks on one large graph.

Importing this package loads neither torch nor ray; start from :mod:`gnnpipe.trainer`.
"""

__version__ = "0.1.0"
