"""What a truncation has to show before it is believed, and the records of it.

A method (in gram.py, projector.py or factorise.py) factorises a matrix into `Factors`; their `cut` gives a `Raw` result
with what was measured on the way; `certified` compares that with what the spectrum says should have been, and gives a
Truncation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from laser.errors import NumericalError
from laser.spectral.shrinkage import Gains

SAFETY = 8  # covers the modest constants of LAPACK's and BLAS's own error bounds


@dataclass(frozen=True)
class Certificate:
    """What was measured of a truncation W_r of W; all dimensionless. g_i is 1 for a value kept and 0 for one removed.

    energy_kept: sum (g_i s_i)^2 / sum s_i^2
    residual: | ||W - W_r||_F - sqrt(sum ((1 - g_i) s_i)^2) | / ||W||_F, before W_r is rounded to its storage dtype
    orthogonality: max |V_r^T V_r - I| over the basis that was used; for the projector P a bound on max |P^2 - P|
    tolerance: the largest residual that passes; derived from p and the dtype's eps
    method: the step of the ladder that gave the result
    note: the steps that failed before it and why; empty if none did
    """

    energy_kept: float
    residual: float
    orthogonality: float
    tolerance: float
    method: str
    note: str = ""


@dataclass(frozen=True)
class Truncation:
    """A matrix cut to its rank, with what shows that it is the best one."""

    matrix: torch.Tensor  # (m, n), in the dtype of the source matrix, and where that is or on the host
    singular_values: NDArray[np.float64]  # (p,), of the source matrix
    certificate: Certificate


@dataclass(frozen=True)
class Raw:
    """A truncation before it is believed."""

    matrix: torch.Tensor  # (m, n), storage dtype of W
    singular_values: NDArray[np.float64]
    gains: NDArray[np.float64]  # (p,), in the order of the singular values
    distance: float  # ||W - W_r||_F before rounding
    orthogonality: float
    dtype: torch.dtype
    limit: float | None = None  # on `orthogonality`, where it is not that of a basis of eigenvectors


@dataclass(frozen=True)
class Factors:
    """One factorisation of W: its singular values (p,), float64, descending, and what cuts it."""

    singular_values: NDArray[np.float64]
    cut: Callable[[Gains], Raw]


def certified(raw: Raw, method: str) -> Truncation:
    """Compare what was removed with what the spectrum says should have been.

    By Weyl's inequality each computed eigenvalue of G is off by about eps * s_1^2, so the tail's sum of squares is off
    by at most delta = 8 * p * eps of ||W||_F^2, and its root by min(sqrt(delta), delta / (2 * tail)). Gains between 0
    and 1 only make the sum's terms smaller. Raises NumericalError with the residual.
    """
    s, gains = raw.singular_values, raw.gains
    delta = SAFETY * len(s) * torch.finfo(raw.dtype).eps
    total = float(np.sum(s**2))
    if total == 0.0:
        return Truncation(raw.matrix, s, Certificate(1.0, 0.0, raw.orthogonality, 0.0, method))
    tail = math.sqrt(float(np.sum(((1 - gains) * s) ** 2)) / total)
    residual = abs(raw.distance / math.sqrt(total) - tail)
    tolerance = min(math.sqrt(delta), delta / (2 * tail) if tail > 0 else math.inf)
    limit = delta if raw.limit is None else raw.limit
    if not (residual <= tolerance and raw.orthogonality <= limit):  # not the other way round: NaN must fail
        raise NumericalError(
            f"certificate missed: residual {residual:.2e} (allowed {tolerance:.2e}), "
            f"orthogonality {raw.orthogonality:.2e} (allowed {limit:.2e})",
            residual,
        )
    energy = float(np.sum((gains * s) ** 2)) / total
    return Truncation(raw.matrix, s, Certificate(energy, residual, raw.orthogonality, tolerance, method))
