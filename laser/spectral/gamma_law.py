"""The Marchenko-Pastur law of noise whose rows (or columns) differ in variance.

Model of Ke, Ma and Lin (2021), section 2: W = D^(1/2) Z of shape (P, Q). Z has independent entries of mean 0 and
deviation sigma. D is diagonal with entries tau_i drawn from a gamma law of mean 1 and shape theta (variance 1 / theta;
theta = infinity is plain noise). With c = P / Q, x an eigenvalue of W W^T / (sigma^2 Q) and H the law of tau,
Silverstein and Choi (1995) describe the limit through a point w in the upper half plane (their -1 / m):

    x = w + c int tau w / (w - tau) dH(tau),   where Im x = 0, that is   c int tau^2 / |tau - w|^2 dH(tau) = 1,

so for each real part u of w the imaginary part is the root of a decreasing function, and x rises with u. The
distribution function needs no quadrature over x, because int -1/w dx is elementary:

    F(x) = 1 + (1 / (pi min(1, c))) * [ x Im w / |w|^2 - arg w - c int (arg(w - tau) - arg w) dH(tau) ].

At theta = infinity w runs over the circle |w - 1| = sqrt(c), and F is the law in marchenko_pastur.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from laser.spectral import marchenko_pastur as mp
from laser.spectral.unit import Array

ATOMS = 256  # points that stand for the gamma law
NODES = 400  # points of the distribution function that are computed; linear in between


@dataclass(frozen=True)
class Law:
    """Distribution of singular values in units of sigma * sqrt(Q): F(x[i]) = f[i], both rising, linear in between."""

    x: Array  # (NODES,)
    f: Array  # (NODES,)

    def cdf(self, x: ArrayLike) -> Array:
        return np.interp(np.asarray(x, dtype=np.float64), self.x, self.f, left=0.0, right=1.0)

    def quantile(self, u: ArrayLike) -> Array:
        return np.interp(np.asarray(u, dtype=np.float64), self.f, self.x)


def population(theta: float, count: int) -> Array:
    """(count,) variances that stand for gamma(theta, mean 1): its quantiles at the midpoints of equal shares."""
    if math.isinf(theta):
        return np.ones(1)
    from scipy import stats

    tau = stats.gamma.ppf((np.arange(count) + 0.5) / count, theta, scale=1 / theta)
    return tau / tau.mean()


@lru_cache(maxsize=1024)
def law(c: float, theta: float) -> Law:
    """Law of the nonzero singular values at aspect c = P / Q, any positive number, where the P sides vary."""
    tau = population(theta, ATOMS)
    low, high = _left(tau, c), _right(tau, c)
    # Nodes crowd at both ends, where F has the shape of a square root.
    u = (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * np.linspace(0, 1, NODES))
    gap = (tau[:, None] - u) ** 2  # (ATOMS, NODES)
    square = (tau**2)[:, None]
    below, above = np.zeros(NODES), np.full(NODES, c * float(np.mean(tau**2)))  # brackets of (Im w)^2
    for _ in range(45):
        middle = (below + above) / 2
        inside = c * np.mean(square / np.maximum(gap + middle, 1e-300), axis=0) > 1
        below, above = np.where(inside, middle, below), np.where(inside, above, middle)
    v = np.sqrt((below + above) / 2)
    w = u + 1j * v
    x = _image(w, tau, c).real
    turned = np.mean(np.arctan2(v, u - tau[:, None]), axis=0) - np.arctan2(v, u)
    f = 1 + (x * v / np.abs(w) ** 2 - np.arctan2(v, u) - c * turned) / (np.pi * min(1.0, c))
    x, f = np.maximum.accumulate(np.maximum(x, 0.0)), np.maximum.accumulate(np.clip(f, 0.0, 1.0))
    f[0], f[-1] = 0.0, 1.0
    return Law(np.sqrt(x), f)


def _image(w: NDArray[np.complex128], tau: Array, c: float) -> NDArray[np.complex128]:
    return w + c * np.mean(tau[:, None] * w / (w - tau[:, None]), axis=0)


def _slope(u: float, tau: Array, c: float) -> float:
    return c * float(np.mean((tau / (tau - u)) ** 2))


def _right(tau: Array, c: float) -> float:
    """The real w of the upper edge: right of every atom, where the slope falls through 1."""
    low, high = float(tau.max()), float(tau.max()) * (1 + c**0.5)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle <= tau.max() or _slope(middle, tau, c) > 1 else (low, middle)
    return high


def _left(tau: Array, c: float) -> float:
    """The real w of the lower edge: left of every atom; negative where c > 1."""
    low, high = float(tau.min() - tau.max() * c**0.5), float(tau.min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if middle >= tau.min() or _slope(middle, tau, c) > 1 else (middle, high)
    return low


@lru_cache(maxsize=1024)
def noise_top(P: int, Q: int, theta: float, level: float) -> float:
    """What the largest singular value of such noise, in units of sigma * sqrt(Q), exceeds with probability `level`.

    Ke, Ma and Lin (2021), algorithm 2, step 2: draw the variances, look at the largest eigenvalue, take its upper
    quantile. Given the variances the eigenvalue follows the Tracy-Widom law around the edge of their own spectrum
    (El Karoui 2007, theorem 1). That law stands here for drawing the P x Q matrix: 64 seeded draws of the variances,
    and 63 quantiles of the law for each. theta = infinity is Johnstone (2001).
    """
    if math.isinf(theta):
        return mp.tracy_widom_edge(1.0, (P, Q), level) / Q**0.5
    random, c = np.random.default_rng(0), P / Q
    steps = np.array([mp.tracy_widom_quantile(u) for u in (np.arange(63) + 0.5) / 63])
    tops = []
    for _ in range(64):
        tau = random.gamma(theta, 1 / theta, size=P)
        w = _right(tau, c)
        edge = w + c * float(np.mean(tau * w / (w - tau)))
        spread = w * (1 + c * float(np.mean((tau / (w - tau)) ** 3))) ** (1 / 3) * Q ** (-2 / 3)
        tops.append(edge + spread * steps)
    return float(np.sqrt(max(np.quantile(np.concatenate(tops), 1 - level), 0.0)))
