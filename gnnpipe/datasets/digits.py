"""The 1,797 handwritten digits that scikit-learn carries, as a nearest-neighbour graph.

The default data set: real, quick, and nothing is downloaded.
"""

import numpy as np
from numpy.typing import NDArray

from gnnpipe.graph import Graph

NUM_NEIGHBOURS = 8
LARGEST_PIXEL = 16
TRAIN_FRACTION = 0.1
VAL_FRACTION = 0.2


def digits(*, seed: int = 0) -> Graph:
    """Each digit is joined with the 8 digits that look most like it, and with those it is for.

    Args:
        seed: of the split: of every class 10% train, 20% validation, 70% test.

    Returns:
        An undirected graph of 1,797 nodes, 64 features (pixels in [0, 1]) and 10 classes.
    """
    from sklearn.datasets import load_digits  # slow to import

    pixels, labels = load_digits(return_X_y=True)  # [N, 64] whole numbers 0 to 16; [N]
    train_mask, val_mask, test_mask = _stratified_split(labels, seed)
    graph = Graph.from_edge_index(
        _nearest_neighbours(pixels),
        name="digits",
        features=pixels / LARGEST_PIXEL,
        labels=labels,
        train_mask=train_mask,
        val_mask=val_mask,
        test_mask=test_mask,
    )
    return graph.symmetrised()


def _nearest_neighbours(pixels: NDArray[np.float64]) -> NDArray[np.int64]:
    """Edges ``[2, 8 N]`` from each node's nearest neighbours to it.

    Squared distances of whole numbers are exact, and ties go to the lower node: the graph is the
    same on every machine and thread count, which scikit-learn's search does not promise.
    """
    squares = (pixels**2).sum(axis=1)
    distance = squares[:, None] + squares[None, :] - 2 * pixels @ pixels.T  # [N, N]
    np.fill_diagonal(distance, np.inf)
    sources = np.argsort(distance, axis=1, kind="stable")[:, :NUM_NEIGHBOURS]  # [N, 8]
    targets = np.repeat(np.arange(len(pixels)), NUM_NEIGHBOURS)
    return np.stack([sources.ravel(), targets])


def _stratified_split(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Train, validation and test masks, ``[3, N]``."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((3, len(labels)), np.bool_)
    for label in np.unique(labels):
        nodes = rng.permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum([TRAIN_FRACTION, VAL_FRACTION]) * len(nodes)).astype(int)
        for mask, part in zip(masks, np.split(nodes, ends), strict=True):
            mask[part] = True
    return masks
