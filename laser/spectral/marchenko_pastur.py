"""The Marchenko-Pastur law for singular values. Notation, fixed here for the whole package:

    W       real matrix of shape (m, n) = (out_features, in_features)
    p, q    min(m, n) and max(m, n);  beta = p / q in (0, 1]
    s       singular values s_1 >= ... >= s_p >= 0
    sigma   standard deviation of the noise's independent, zero-mean entries, in the unit of the weights

As p and q grow with beta fixed, the singular values of pure noise divided by `sigma * sqrt(q)` spread over
[1 - sqrt(beta), 1 + sqrt(beta)] with the density of Marchenko and Pastur (1967), written for singular values:

    f(x) = sqrt((x^2 - (1 - sqrt(beta))^2) * ((1 + sqrt(beta))^2 - x^2)) / (pi * beta * x)

Every function below works in that unit (x = s / (sigma * sqrt(q))), except `edges`, which returns weight units.
The substitution x^2 = 1 + beta - 2 sqrt(beta) cos(t), t in [0, pi], turns the density into a smooth one, whose
integral is elementary (sum the series sum_k beta^(k/2) sin((k+1) t), the generating function of the sines):

    F(t) = (t + sin(t) / sqrt(beta) - (1 - beta) / beta * atan2(sqrt(beta) sin t, 1 - sqrt(beta) cos t)) / pi

so neither quadrature nor tables are needed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Chiani (2014), "Distribution of the largest eigenvalue for real Wishart and Gaussian random matrices", table 1:
# the Tracy-Widom law of order 1 is matched in its first three moments by a shifted gamma law.
_TW1_SHAPE, _TW1_SCALE, _TW1_SHIFT = 46.446, 0.186054, 9.84801


def aspect(shape: tuple[int, int]) -> tuple[int, int, float]:
    """(p, q, beta) of a matrix shape: the smaller side, the larger side, and their ratio."""
    p, q = min(shape), max(shape)
    return p, q, p / q


def edges(sigma: float, shape: tuple[int, int]) -> tuple[float, float]:
    """Lower and upper edge of the noise's singular values, in the unit of sigma.

    sigma * (sqrt(q) - sqrt(p)) and sigma * (sqrt(q) + sqrt(p)); Marchenko and Pastur 1967.
    """
    p, q, _ = aspect(shape)
    return sigma * (q**0.5 - p**0.5), sigma * (q**0.5 + p**0.5)


def density(x: ArrayLike, beta: float) -> NDArray[np.float64]:
    """f(x) as above; 0 outside the support. At beta = 1 the density at 0 is its limit, 1 / pi * 2.

    For notebooks and tests: laser itself works with the distribution function.
    """
    x = np.asarray(x, dtype=np.float64)
    low, high = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2
    inside = np.clip((x**2 - low) * (high - x**2), 0.0, None)
    if beta == 1.0:  # x cancels: sqrt(x^2 (4 - x^2)) / x, which would be 0/0 at the origin
        return np.where(x >= 0, np.sqrt(np.clip(4 - x**2, 0.0, None)) / np.pi, 0.0)
    return np.where(x > 0, np.sqrt(inside) / (np.pi * beta * np.where(x > 0, x, 1.0)), 0.0)


def _cdf_of_angle(t: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    c = beta**0.5
    return (t + np.sin(t) / c - (1 - beta) / beta * np.arctan2(c * np.sin(t), 1 - c * np.cos(t))) / np.pi


def cdf(x: ArrayLike, beta: float) -> NDArray[np.float64]:
    """Share of the noise's singular values at or below x, x in units of sigma * sqrt(q)."""
    x = np.asarray(x, dtype=np.float64)
    cosine = (1 + beta - np.square(np.maximum(x, 0.0))) / (2 * beta**0.5)
    return np.clip(_cdf_of_angle(np.arccos(np.clip(cosine, -1.0, 1.0)), beta), 0.0, 1.0)


def quantile(u: ArrayLike, beta: float) -> NDArray[np.float64]:
    """Inverse of `cdf`: the x with a share u of the noise's singular values at or below it.

    Bisection in the angle t, where F is increasing and smooth: 60 halvings of pi leave 3e-18.
    """
    u = np.asarray(u, dtype=np.float64)
    low, high = np.zeros_like(u), np.full_like(u, np.pi)
    for _ in range(60):
        middle = (low + high) / 2
        below = _cdf_of_angle(middle, beta) < u
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.sqrt(np.maximum(1 + beta - 2 * beta**0.5 * np.cos((low + high) / 2), 0.0))


@lru_cache(maxsize=4096)
def median(beta: float) -> float:
    """m_b: the median singular value of unit noise, in units of sqrt(q). 0.8079 at beta = 1, towards 1 at 0."""
    return float(quantile(0.5, beta))


@lru_cache(maxsize=4096)
def interquartile_range(beta: float) -> float:
    """q_b(0.75) - q_b(0.25), in units of sigma * sqrt(q): the law's own constant for IQR matching."""
    return float(quantile(0.75, beta) - quantile(0.25, beta))


def tracy_widom_quantile(u: float) -> float:
    """u-quantile of the Tracy-Widom law of order 1, by Chiani's gamma approximation.

    Against the law itself (a Fredholm determinant, tests/spectral/test_marchenko_pastur.py) it is off by +0.100 at
    0.0001, +0.015 at 0.01, -0.004 at 0.1, less than 0.001 at 0.5, +0.003 at 0.9, -0.010 at 0.99 and -0.038 at 0.9999.
    One unit is 0.8 standard deviations.
    """
    from scipy import stats  # most of a second, and of use to few

    return float(stats.gamma.ppf(u, _TW1_SHAPE) * _TW1_SCALE - _TW1_SHIFT)


def tracy_widom_upper(alpha: float) -> float:
    """What the Tracy-Widom law exceeds with probability alpha. Not the quantile of 1 - alpha, which is 1 and infinite
    for an alpha under 1e-16. Its error is that of `tracy_widom_quantile`, and under 1e-4 not known."""
    from scipy import stats

    return float(stats.gamma.isf(alpha, _TW1_SHAPE) * _TW1_SCALE - _TW1_SHIFT)


def tracy_widom_scale(shape: tuple[int, int]) -> tuple[float, float]:
    """(mu, c) of unit noise: s_1^2 / sigma^2 is near mu + c * TW1 (Johnstone 2001, theorem 1.1).

    mu = (sqrt(q-1) + sqrt(p))^2 and c = sqrt(mu) * (1/sqrt(q-1) + 1/sqrt(p))^(1/3). A 1 x 1 matrix has no q - 1 to
    speak of; it is treated as q = 2.
    """
    p, q, _ = aspect(shape)
    q = max(q, 2)
    mu = ((q - 1) ** 0.5 + p**0.5) ** 2
    return mu, mu**0.5 * ((q - 1) ** -0.5 + p**-0.5) ** (1 / 3)


def tracy_widom_edge(sigma: float, shape: tuple[int, int], alpha: float) -> float:
    """The level that the largest singular value of pure noise exceeds with probability alpha, in sigma's unit.

    Centre and scale as in `tracy_widom_scale`; the quantile of TW1 is Chiani's (2014) gamma approximation.
    """
    mu, c = tracy_widom_scale(shape)
    return sigma * max(mu + c * tracy_widom_upper(alpha), 0.0) ** 0.5
