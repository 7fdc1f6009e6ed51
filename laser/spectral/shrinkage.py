"""Gains: what becomes of each singular value. A truncation is V diag(g) V^T applied to W, g_i in [0, 1].

Cutting gives 0 and 1. Shrinking (Gavish and Donoho 2017) gives the kept values less than they measure, because noise
has inflated them: a signal of size x shows, in units of sigma * sqrt(q), as y with y^2 = (x + 1/x)(x + beta/x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from laser.errors import UsageError
from laser.spectral import marchenko_pastur as mp
from laser.spectral.noise import Shape
from laser.spectral.unit import Array, Spectrum


def frobenius(y: Array, beta: float) -> Array:
    """Gavish and Donoho (2017), equation 7: sqrt((y^2 - beta - 1)^2 - 4 beta) / y above the edge 1 + sqrt(beta)."""
    inside, over = _discriminant(y, beta)
    return np.where(over, np.sqrt(inside) / np.where(over, y, 1.0), 0.0)


def operator(y: Array, beta: float) -> Array:
    """Equation 8: x(y), the size of the signal itself."""
    inside, over = _discriminant(y, beta)
    return np.where(over, np.sqrt(np.maximum(y**2 - beta - 1 + np.sqrt(inside), 0.0) / 2), 0.0)


def nuclear(y: Array, beta: float) -> Array:
    """Equation 9: (x^4 - beta - sqrt(beta) x y) / (x^2 y), and 0 where that is negative."""
    x = operator(y, beta)
    over = x > 0
    x, y = np.where(over, x, 1.0), np.where(over, y, 1.0)
    return np.where(over, np.maximum(x**4 - beta - beta**0.5 * x * y, 0.0) / (x**2 * y), 0.0)


def _discriminant(y: Array, beta: float) -> tuple[Array, NDArray[np.bool_]]:
    """(y^2 - beta - 1)^2 - 4 beta, at least 0, and whether y is over the edge, where alone it has a meaning."""
    over = y > 1 + beta**0.5
    return np.maximum(np.where(over, (y**2 - beta - 1) ** 2 - 4 * beta, 0.0), 0.0), over


SHRINKERS: dict[str, Callable[[Array, float], Array]] = {
    "frobenius": frobenius,
    "operator": operator,
    "nuclear": nuclear,
}


@dataclass(frozen=True)
class Gains:
    """Which singular values stay: the `above` largest (shrunk, if a shrinker is named) and the `below` smallest.

    sigma: the noise level that the shrinker assumes, in the unit of the weights; None without one
    """

    above: int
    below: int = 0
    shrink: str | None = None
    sigma: float | None = None

    @property
    def plain(self) -> bool:
        return self.below == 0 and self.shrink is None

    def in_unit(self, u: float) -> Gains:
        """The same gains for the matrix divided by u."""
        return replace(self, sigma=None if self.sigma is None else self.sigma / u)

    def of(self, s: Spectrum, shape: Shape) -> Array:
        """(p,) gains for singular values `s` (p,), descending. Raises UsageError for an unknown shrinker."""
        p, q, beta = mp.aspect(shape)
        gains = np.zeros(p)
        gains[: self.above] = 1.0
        if self.shrink is not None:
            check_shrinker(self.shrink)
            unit = (self.sigma or 0.0) * q**0.5
            # With noise under 1e-8 of the largest value nothing was inflated: the gain is 1 - 1e-16, and fourth powers
            # of s / unit would overflow.
            if unit > 1e-8 * s[0]:
                y = np.maximum(s[: self.above] / unit, 1e-8)  # below that the gain is 0 anyway
                gains[: self.above] = np.minimum(SHRINKERS[self.shrink](y, beta) / y, 1.0)
        gains[p - self.below :] = 1.0
        return gains


def check_shrinker(name: str) -> None:
    """Raises UsageError with the list unless `name` is a row of SHRINKERS."""
    if name not in SHRINKERS:
        raise UsageError(f"no shrinker is called {name!r}; try --shrink {'|'.join(SHRINKERS)}")
