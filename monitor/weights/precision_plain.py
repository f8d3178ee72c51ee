"""What the compiled loops of the precision report do, in numpy; and how schemes are told to both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import FORMATS, SCHEMES, Scheme, quantised

#: How a scheme is told to the loops: an integer format, a float format, or bfloat16 unscaled.
INTEGER, FLOAT, BFLOAT = 0, 1, 2
#: Columns of `plan`: which of these; mantissa bits; the smallest normal's exponent bits; what shares a scale;
#: the scheme's place in `SCHEMES`.
KIND, MANTISSA, EXPONENT, SCALE, PLACE = range(5)
CAST, TENSOR, CHANNEL, IN_GROUPS = range(4)
_SCALES = {"cast": CAST, "tensor": TENSOR, "channel": CHANNEL, "group": IN_GROUPS}
#: Columns of `counts`.
ZEROED, SUBNORMAL, OVERFLOW = range(3)


def plan_of(schemes: Sequence[Scheme], dtype: Any) -> tuple[NDArray[np.int32], NDArray]:
    """Schemes as the loops take them: plan, int32 (schemes, 5), and largest values (schemes,)."""
    plan = np.zeros((len(schemes), 5), np.int32)
    for row, scheme in zip(plan, schemes, strict=True):
        form = FORMATS[scheme.format]
        row[SCALE], row[PLACE] = _SCALES[scheme.scale], SCHEMES.index(scheme)
        if form.mantissa is not None:
            row[KIND] = BFLOAT if scheme.format == "bf16" else FLOAT
            row[MANTISSA], row[EXPONENT] = form.mantissa, (form.exponent + 127) << 23
    return plan, np.array([FORMATS[s.format].largest for s in schemes], dtype)


def moments(
    x: NDArray, shift: float, tops: NDArray, squares: NDArray, input_tops: NDArray, input_squares: NDArray
) -> Any:
    """See `precision_loops.moments`."""
    size = np.abs(x)
    tops[:] = size.max(axis=1, initial=0)
    both = np.square(x, dtype=np.float64)
    squares[:] = both.sum(axis=1)
    if input_tops.size:
        np.maximum(input_tops, size.max(axis=0, initial=0), out=input_tops)
        input_squares += (both * _shares(squares)).sum(axis=0)
    v = x.astype(np.float64) - shift
    return tuple(float((v**k).sum()) for k in (1, 2, 3, 4))


def round_rows(
    x: NDArray,
    tops: NDArray,
    squares: NDArray,
    top: Any,
    plan: NDArray,
    limits: NDArray,
    errors: NDArray,
    input_errors: NDArray,
    counts: NDArray,
    worst: NDArray,
) -> None:
    """See `precision_loops.round_rows`."""
    size = np.abs(x)
    for s, row in enumerate(plan):
        scheme = SCHEMES[row[PLACE]]
        found, beyond = quantised(x, scheme, top)
        normal = FORMATS[scheme.format].smallest_normal
        if row[SCALE] != CAST:
            normal = normal * (tops[:, None] if row[SCALE] == CHANNEL else top) / limits[s]
        zero = found == 0
        counts[s, ZEROED] += np.count_nonzero(zero & (x != 0))
        counts[s, SUBNORMAL] += np.count_nonzero((size < normal) & ~zero)
        counts[s, OVERFLOW] += np.count_nonzero(beyond)
        error = np.where(beyond, 0, found - x)
        both = np.square(error, dtype=np.float64)
        errors[s] += both.sum(axis=1)
        if input_errors.shape[1]:
            input_errors[s] += (both * _shares(squares)).sum(axis=0)
        worst[s] = max(worst[s], np.abs(error).max(initial=0))


def _shares(squares: NDArray) -> NDArray[np.float64]:
    """What squares of each row are multiplied by."""
    return np.where(squares > 0, 1 / np.where(squares > 0, squares, 1), 0.0)[:, None]
