"""When a result is right: its error against a float64 oracle, measured by the error of plain attention.

error = ||result - oracle|| / ||oracle|| per tensor. It passes if it is at most twice the error that plain attention
makes at the same dtype with the same accumulation type, plus 1e-7. Absolute tolerances would hide small wrong
gradients.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

# Plain float64 attention is the oracle itself; the floor still catches an accumulation in float32.
FLOOR = {"float64": 1e-12}
# The norm of a handful of numbers is no statistic: they may round luckily in one order of summation and unluckily in
# another. Small tensors may always be off by a rounding to their dtype and a few of the terms that they sum. So may
# tensors of few rows, however long: in a gradient a whole row inherits the rounding of the weight that multiplies it.
FEW, FEW_ROWS = 256, 64
# So may sums whose terms cancel: plain attention knows that the gradients of a window of one key cancel and is exact
# there, an implementation that stores no weights sums twice in different orders.
CANCELS = 4
# So may the gradients that sum over all queries of the grid: in single precision the order of so long a sum decides,
# and plain attention leaves it to a matrix product, whose order is another one in every library.
LONG_SUMS = ("d_additional_keys", "d_additional_values", "d_rpb")


def relative_error(result, oracle, magnitude: float = 0.0) -> float:
    """||result - oracle|| / ||oracle||. ``magnitude`` replaces the denominator of a result that cancels to nothing."""
    result, oracle = np.asarray(result, np.float64), np.asarray(oracle, np.float64)
    assert result.shape == oracle.shape, f"shape {result.shape}, expected {oracle.shape}"
    finite = np.isfinite(oracle)
    np.testing.assert_array_equal(result[~finite], oracle[~finite], err_msg="non-finite values differ")
    difference, norm = np.linalg.norm(result[finite] - oracle[finite]), np.linalg.norm(oracle[finite])
    if norm <= 1e-9 * magnitude:
        norm = magnitude
    if difference == 0:
        return 0.0
    return float(difference / norm) if norm else float("inf")


def allowed_error(plain: float, dtype, ill_conditioned: bool = False, cancellation: float = 1.0) -> float:
    """The largest error that passes.

    Args:
      plain: error of plain attention.
      dtype: of the result.
      ill_conditioned: whether the result may be off by the rounding of its terms, see above.
      cancellation: ratio of the size of the summed terms to that of their sum.
    """
    dtype = np.dtype(dtype)
    if ill_conditioned:
        rounding = float(ml_dtypes.finfo(dtype).eps) + 4 * _accumulation_eps(dtype)
        plain = max(plain, rounding * max(cancellation, 1.0))
    return 2 * plain + FLOOR.get(dtype.name, 1e-7)


def _accumulation_eps(dtype) -> float:
    return float(np.finfo(np.float64 if np.dtype(dtype) == np.float64 else np.float32).eps)


def assert_as_good_as_plain(
    result, oracle, plain, *, name: str, dtype, magnitude: float = 0.0, weights_off_by: float = 0.0
) -> None:
    """Raises AssertionError unless ``result`` is within the tolerance.

    Args:
      oracle: what it should be, float64.
      plain: the same from plain attention in the result's precision.
      dtype: dtype of the inputs; decides the floor.
      magnitude: size of the terms of a sum that may cancel to zero.
      weights_off_by: relative error that all weights may share, which plain attention does not make.
    """
    error = relative_error(result, oracle, magnitude)
    norm = np.linalg.norm(np.asarray(oracle)[np.isfinite(oracle)])
    cancels = norm <= 1e-9 * magnitude
    cancellation = 1.0 if cancels else magnitude / norm
    size, rows = np.size(oracle), np.prod(np.shape(oracle)[:-1])
    ill_conditioned = size < FEW or rows < FEW_ROWS or cancellation > CANCELS or name in LONG_SUMS
    plain_error = max(relative_error(plain, oracle, magnitude), weights_off_by)
    allowed = allowed_error(plain_error, dtype, ill_conditioned, cancellation)
    if cancels:
        # Exactly zero (a window of one key): what is left is how differently two long sums were rounded.
        allowed = max(allowed, 64 * _accumulation_eps(dtype))
    assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g} ({np.dtype(dtype).name})"
