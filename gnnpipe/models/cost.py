"""Rough work of one epoch, forward and backward, to balance stages: relative size matters."""


def dense_flops(num_rows: int, in_channels: float, out_channels: int) -> float:
    """A matrix product, the gradient of its input and the gradient of its weight."""
    return 6.0 * num_rows * in_channels * out_channels


def edge_flops(num_edges: int, channels: int) -> float:
    """A sum over the in-neighbours and its transpose in the backward."""
    return 4.0 * num_edges * channels
