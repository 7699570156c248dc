"""Arrays from outside: converted where that loses nothing, refused with the reason otherwise."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy import sparse

from gnnpipe.errors import UserError


def numbers(value: Any, name: str) -> NDArray[Any]:
    """``value`` as an array of booleans, whole or real numbers, of whatever dtype it has.

    Raises:
        UserError: it is something else.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UserError(f"`{name}` must be an array; make its rows equally long") from error
    if array.dtype.kind not in "biuf":
        raise UserError(f"`{name}` (={array.dtype}) must hold real numbers; convert it first")
    return array


def exact(value: Any, name: str, dtype: DTypeLike) -> NDArray[Any]:
    """``value`` as an array of ``dtype``.

    Raises:
        UserError: it holds no numbers, or converting would change some.
    """
    array = numbers(value, name)
    with np.errstate(invalid="ignore"):
        converted = np.asarray(array, dtype, order="C")
    if converted.dtype != array.dtype and not np.array_equal(converted, array):
        raise UserError(
            f"`{name}` (={array.dtype}) must hold {np.dtype(dtype)} values; "
            "converting these would change them"
        )
    return converted


def rounded(value: Any, name: str) -> NDArray[np.float32]:
    """``value`` rounded to float32; what is too large becomes infinite.

    Raises:
        UserError: it holds no numbers.
    """
    with np.errstate(over="ignore"):
        return np.asarray(numbers(value, name), np.float32, order="C")


def canonical_csr(matrix: Any, name: str) -> "sparse.csr_array":
    """A float32 CSR matrix with ascending columns, each once, from any scipy sparse matrix.

    Raises:
        UserError: its index arrays do not describe a matrix.
    """
    numbers(np.empty(0, matrix.dtype), name)
    try:
        with np.errstate(over="ignore"):
            csr = sparse.csr_array(matrix, dtype=np.float32)
        csr.check_format(full_check=True)
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"`{name}` must be a sound sparse matrix; scipy: {error}") from error
    if not csr.has_canonical_format:
        csr = csr.copy()  # the caller's matrix stays as it is
        csr.sum_duplicates()
    return csr


def require(array: Any, name: str, dtype: DTypeLike, shape: tuple[int | None, ...]) -> None:
    """Checks dtype and shape; None in ``shape`` is any length.

    Raises:
        UserError: either differs.
    """
    if array.dtype != dtype:
        raise UserError(f"`{name}` (={array.dtype}) must be {np.dtype(dtype)}; convert it first")
    lengths = zip(array.shape, shape, strict=False)
    if array.ndim != len(shape) or any(want not in (None, have) for have, want in lengths):
        wanted = ", ".join("*" if length is None else str(length) for length in shape)
        raise UserError(f"`{name}` (={list(array.shape)}) must have the shape [{wanted}]")


def check_features(x: Any, name: str, num_rows: int) -> None:
    """Checks a float32 table ``[num_rows, F]``, dense or CSR: canonical, finite.

    Raises:
        UserError: it is not, with the row of the first bad value.
    """
    require(x, name, np.float32, (num_rows, None))
    is_sparse = sparse.issparse(x)
    if is_sparse:
        canonical_csr(x, name)  # before the flag is read: scipy trusts unsound index arrays
        if not x.has_canonical_format:
            raise UserError(f"`{name}` must have ascending columns; call its sum_duplicates()")
    values: NDArray[np.float32] = x.data if is_sparse else x
    if all_finite(values):
        return
    bad = int(np.flatnonzero(~np.isfinite(values))[0])
    row = np.searchsorted(x.indptr, bad, "right") - 1 if is_sparse else bad // x.shape[1]
    raise UserError(
        f"`{name}` (={values.flat[bad]} in row {row}) must be finite; "
        "replace NaN and infinite values"
    )


def all_finite(values: NDArray[Any]) -> bool:
    """Like ``np.isfinite(values).all()``, without an array of that size."""
    with np.errstate(invalid="ignore"):
        return values.size == 0 or bool(np.isfinite(values.min()) and np.isfinite(values.max()))
