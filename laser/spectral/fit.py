"""How far an estimate can be trusted: its standard error and the fit of the bulk, judged by simulated noise.

The fit is the Kolmogorov-Smirnov distance between the bulk and the estimated law. Its level under the null cannot come
from Kolmogorov's table: singular values repel each other, so that the distance of pure noise is near log(p) / p and not
1 / sqrt(p). Both numbers therefore come from simulated noise, which is cheap: the singular values of a Gaussian p x q
matrix have the law of those of a p x p bidiagonal matrix of chi variables (Dumitriu and Edelman 2002, section III.B),
at a cost of p^2 whatever q is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigvalsh_tridiagonal

from laser.spectral import marchenko_pastur as mp
from laser.spectral.noise import Noise, Shape, Spectrum, estimate

DRAWS = 199  # so that levels are multiples of 1/200
LARGEST = 256  # a larger p is simulated at this p and the same aspect, and rescaled: see `_null`
LARGEST_GAMMA = 96  # noise of unequal variances has no bidiagonal form, and each draw is a dense matrix


@dataclass(frozen=True)
class NoiseFit:
    """An estimate and what it is worth.

    sigma, standard_error: in the unit of the weights; the error is that of noise of this shape, without signal
    distance: Kolmogorov-Smirnov distance of the bulk (the values up to the upper edge) from the estimated law
    level: share of simulated noise matrices whose bulk lies at least that far off; small means "this is not such noise"
    bulk: how many values the bulk has;  theta, along: see Noise, theta None for equal variances
    """

    estimator: str
    sigma: float
    standard_error: float
    distance: float
    level: float
    bulk: int
    theta: float | None
    along: str

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def fit_noise(s: Spectrum, shape: Shape, estimator: str = "trimmed") -> NoiseFit:
    """Estimate the noise in singular values `s` (p,), descending, and measure the fit. See NoiseFit and ESTIMATORS.

    Where sigma is 0 (half of the values are: a matrix of low rank, or zero) there is no noise and nothing to fit:
    distance 1, level 0. Raises UsageError for an unknown estimator.
    """
    noise = estimate(s, shape, estimator)
    theta = None if math.isinf(noise.theta) else noise.theta
    distance, bulk = bulk_distance(s, shape, noise)
    if noise.sigma == 0:
        return NoiseFit(estimator, 0.0, 0.0, 1.0, 0.0, bulk, theta, noise.along)
    p, q, _ = mp.aspect(shape)
    spread, distances = _null(p, q, estimator, noise.theta, noise.along)
    level = float(1 + np.count_nonzero(distances >= distance)) / (1 + len(distances))
    return NoiseFit(estimator, noise.sigma, noise.sigma * spread, distance, level, bulk, theta, noise.along)


def standard_error(shape: Shape, estimator: str) -> float:
    """Relative standard error of the estimated sigma on pure noise of this shape and equal variances."""
    p, q, _ = mp.aspect(shape)
    return _null(p, q, estimator, math.inf, "p")[0]


def bulk_distance(s: Spectrum, shape: Shape, noise: Noise) -> tuple[float, int]:
    """Kolmogorov-Smirnov distance of the values up to the upper edge from the law of `noise`, and their number.

    1 where there is no bulk at all.
    """
    if noise.sigma == 0:
        return 1.0, 0
    over = int(np.count_nonzero(s > noise.upper_edge(shape)))
    bulk = s[over:][::-1]  # rising
    n = len(bulk)
    if n == 0:
        return 1.0, 0
    # The bulk of a matrix with `over` signals is noise of a smaller shape, whatever the estimator assumed.
    expected = Noise(noise.sigma, over, noise.theta, noise.along).cdf(bulk, shape)
    steps = np.arange(n + 1) / n
    return float(max(np.max(steps[1:] - expected), np.max(expected - steps[:-1]))), n


def gaussian_spectrum(p: int, q: int, random: np.random.Generator) -> Spectrum:
    """Singular values (p,), descending, of a p x q matrix of independent standard normal entries, p <= q."""
    diagonal = random.chisquare(np.arange(q, q - p, -1))  # squares of the bidiagonal's entries
    below = random.chisquare(np.arange(p - 1, 0, -1))
    centre = diagonal.copy()
    centre[1:] += below
    beside = np.sqrt(diagonal[:-1] * below)
    values = eigvalsh_tridiagonal(centre, beside, lapack_driver="sterf", check_finite=False)
    return np.sqrt(np.maximum(values[::-1], 0.0))


def gamma_spectrum(P: int, Q: int, theta: float, random: np.random.Generator) -> Spectrum:
    """Singular values, descending, of a P x Q Gaussian matrix with gamma(theta, mean 1) variances along P."""
    tau = random.gamma(theta, 1 / theta, size=P)
    s = np.linalg.svd(np.sqrt(tau)[:, None] * random.standard_normal((P, Q)), compute_uv=False)
    return np.asarray(s, dtype=np.float64)


@lru_cache(maxsize=512)
def _null(p: int, q: int, estimator: str, theta: float, along: str) -> tuple[float, NDArray[np.float64]]:
    """Relative standard error of sigma, and the (DRAWS,) distances, of pure noise of shape p x q; seeded.

    A large p is simulated at a smaller one. The errors of both follow the rigidity of the spectrum, 1 / p, the
    distance with a logarithm on top: p times the distance was 2.98, 3.68, 4.04 at p = 256, 1024, 4096 (square, median
    matching), which 0.42 * (log p + 1.5) describes. With variances drawn at random both go as 1 / sqrt(p) instead.
    """
    equal = math.isinf(theta)
    small = min(p, LARGEST if equal else LARGEST_GAMMA)
    shape = (small, max(round(q * small / p), small))
    random = np.random.default_rng(0)
    sigmas, distances = [], []
    for _ in range(DRAWS):
        if equal:
            s = gaussian_spectrum(*shape, random)
        else:
            P, Q = shape if along == "p" else (shape[1], shape[0])
            s = gamma_spectrum(P, Q, theta, random)
        noise = estimate(s, shape, estimator)
        sigmas.append(noise.sigma)
        distances.append(bulk_distance(s, shape, noise)[0])
    shrink = small / p if equal else (small / p) ** 0.5
    growth = (math.log(p) + 1.5) / (math.log(small) + 1.5) if equal else 1.0
    return float(np.std(sigmas)) * shrink, np.array(distances) * shrink * growth
