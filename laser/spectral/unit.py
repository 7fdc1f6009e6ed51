"""Scale by a power of two, so that no square or fourth power leaves float32's or float64's range.

Gram matrices, energies and certificates square what they are given, and float32 ends at 1e-38: of entries of 1e-24 the
squares are 0. Every function of this package that squares entries or singular values first asks here for a unit. It is
1 where the largest entry lies within 2^-20 and 2^20, as in all ordinary weights: their results stay the same to the
bit. Otherwise it is the power of two under that entry. The matrix is divided by it, which is exact, and what comes out
is multiplied by it. Factorisations, truncations, noise, rules and fits are homogeneous, so nothing else changes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from laser.errors import NumericalError

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]
Spectrum = Array  # (p,) singular values, descending
ORDINARY = 20  # exponents up to this are left alone: fourth powers stay within 2^-80 and 2^80


def unit(largest: float) -> float:
    """1.0 for a `largest` within 2^-20 and 2^20, and for 0, NaN and Inf; else the power of two at or under it."""
    if not 0 < largest < math.inf:
        return 1.0
    exponent = math.frexp(largest)[1] - 1
    # Not under 2^-1022: the reciprocal has to be a number as well.
    return 1.0 if abs(exponent) <= ORDINARY else math.ldexp(1.0, max(exponent, -1022))


def unit_of(s: NDArray[np.float64]) -> float:
    """The unit of singular values `s` (p,), descending."""
    return unit(float(s[0])) if len(s) else 1.0


def largest_entry(W: torch.Tensor) -> float:
    """The largest absolute value in W; NaN where one is in it. One pass and no copy: 3 ms for 4096 x 4096."""
    import torch  # here, as help and plans need no matrix

    if not W.numel():
        return 0.0
    low, high = (float(x) for x in torch.aminmax(W.detach()))
    return math.nan if math.isnan(low) else max(abs(low), abs(high))


def in_unit(W: torch.Tensor) -> tuple[torch.Tensor, float]:
    """W / u and its unit u: W itself where u is 1, else a float64 copy. Raises NumericalError for NaN or Inf in W."""
    largest = largest_entry(W)
    if not math.isfinite(largest):
        raise NumericalError("the matrix holds NaN or Inf; nothing can be said of its spectrum")
    u = unit(largest)
    return (W, u) if u == 1.0 else (W.double() / u, u)
