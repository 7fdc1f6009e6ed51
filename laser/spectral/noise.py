"""The noise level from a spectrum, one estimator per published method, and how far it can be trusted.

Each estimator takes singular values `s` (descending, float64, shape (p,)) and the matrix's shape (m, n), and matches a
statistic of the spectrum's bulk to the same statistic of the Marchenko-Pastur law. All are homogeneous (scaling W
scales sigma), blind to transposition, and 0 for a zero matrix. `estimate_noise` gives the level alone; `fit_noise` adds
its standard error and the fit of the bulk.

The fit is the Kolmogorov-Smirnov distance between the bulk and the estimated law. Its level under the null cannot come
from Kolmogorov's table: singular values repel each other, so that the distance of pure noise is near log(p) / p and not
1 / sqrt(p). Both numbers therefore come from simulated noise, which is cheap. The singular values of a Gaussian p x q
matrix have the law of those of a p x p bidiagonal matrix of chi variables (Dumitriu and Edelman 2002, section III.B).
That costs p^2 whatever q is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from laser.errors import UsageError
from laser.spectral import gamma_law
from laser.spectral import marchenko_pastur as mp
from laser.spectral.unit import Spectrum, unit_of

Shape = tuple[int, int]

# Shapes of the gamma law that BEMA tries; the first wins ties, so that plain noise is the answer where nothing
# speaks against it. 0.5 is a spread of variances of 140 %, 128 one of 9 %.
DEFAULT_ESTIMATOR = "trimmed"  # for rules that rest on no noise: the one that signal biases least (docs/log)
THETAS = (math.inf, 128.0, 64.0, 32.0, 16.0, 11.0, 8.0, 5.6, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5)
BEMA_RANGE = 0.2  # Ke, Ma and Lin 2021, section 2.3: alpha
BEMA_FEWEST = 32  # with fewer values any spread of variances fits as well as none, and plain noise is assumed
LEAST_SQUARES_RANGE = (0.05, 0.6)  # from power tables in docs/log: signal sits on top and does not reach it below 40 %
TRIM_LEVEL = 0.01  # Kritchman and Nadler 2009 choose 0.005 for their simulations; the power tables hardly move


@dataclass(frozen=True)
class Noise:
    """What an estimator says of a spectrum: its bulk is that of noise with these parameters.

    sigma: standard deviation of the entries, in the unit of the weights (over all rows, where rows differ)
    signals: how many values were set aside before; the bulk is that of noise of shape (p - signals, q - signals)
    theta: shape of the gamma law of the variances, infinite for equal ones; `along` says which side has them
    """

    sigma: float
    signals: int = 0
    theta: float = math.inf
    along: str = "p"

    def sides(self, shape: Shape) -> tuple[int, int]:
        """(P, Q) of gamma_law.py after the signals are set aside: P is the side whose variances differ."""
        p, q, _ = mp.aspect(shape)
        p, q = p - self.signals, q - self.signals
        return (p, q) if self.along == "p" else (q, p)

    def upper_edge(self, shape: Shape) -> float:
        P, Q = self.sides(shape)
        if math.isinf(self.theta):
            return mp.edges(self.sigma, (P, Q))[1]
        return self.sigma * Q**0.5 * float(gamma_law.law(P / Q, self.theta).x[-1])

    def lower_edge(self, shape: Shape) -> float:
        P, Q = self.sides(shape)
        if math.isinf(self.theta):
            return mp.edges(self.sigma, (P, Q))[0]
        return self.sigma * Q**0.5 * float(gamma_law.law(P / Q, self.theta).x[0])

    def cdf(self, s: Spectrum, shape: Shape) -> NDArray[np.float64]:
        """Share of the bulk at or below each s."""
        P, Q = self.sides(shape)
        if math.isinf(self.theta):
            _, q, beta = mp.aspect((P, Q))
            return mp.cdf(s / (self.sigma * q**0.5), beta)
        return gamma_law.law(P / Q, self.theta).cdf(s / (self.sigma * Q**0.5))


def sigma_median(s: Spectrum, shape: Shape) -> float:
    """median(s) / (m_b * sqrt(q)): Gavish and Donoho (2014), section III.E; breaks down at half signal."""
    _, q, beta = mp.aspect(shape)
    return float(np.median(s)) / (mp.median(beta) * q**0.5)


def sigma_iqr(s: Spectrum, shape: Shape) -> float:
    """IQR(s) / ((q_b(.75) - q_b(.25)) * sqrt(q)): LaserRMT's estimator with the law's own constant."""
    _, q, beta = mp.aspect(shape)
    return _iqr(s) / (mp.interquartile_range(beta) * q**0.5)


def sigma_normal_iqr(s: Spectrum) -> float:
    """IQR(s) / 1.349: LaserRMT's own estimate (rmt_laser.py), kept so that its models can be made again.

    1.349 is the interquartile range of a *normal* law, and no sqrt(q) appears, so this is no estimate of the
    entries' deviation: it is in the unit of singular values and biased by an amount that depends on the shape.
    """
    return _iqr(s) / 1.349


def _iqr(s: Spectrum) -> float:
    low, high = np.quantile(s, [0.25, 0.75])  # linear interpolation, as in LaserRMT
    return float(high - low)


def sigma_least_squares(s: Spectrum, shape: Shape, bulk: tuple[float, float] = LEAST_SQUARES_RANGE) -> float:
    """The sigma that brings the order statistics of a range of the bulk closest to the law's quantiles.

    s_(k), k-th from below, is near sigma * sqrt(q) * q_b((k - 1/2) / p); over the k with `bulk` [low, high] around
    (k - 1/2) / p the least squares solution is sum(x s) / sum(x^2). Ke, Ma and Lin (2021), algorithm 1, do the same
    with eigenvalues. A range that holds no value of a small matrix is taken to be the value nearest to its middle.
    """
    p, q, _ = mp.aspect(shape)
    rising, u = s[::-1], (np.arange(p) + 0.5) / p
    chosen = np.flatnonzero((u >= bulk[0]) & (u <= bulk[1]))
    if not len(chosen):
        chosen = np.array([np.argmin(abs(u - sum(bulk) / 2))])
    x = _law_quantiles(p, q)[chosen]
    return float(np.sum(x * rising[chosen]) / np.sum(x * x)) / q**0.5


@lru_cache(maxsize=64)
def _law_quantiles(p: int, q: int) -> NDArray[np.float64]:
    """(p,) quantiles at (k - 1/2) / p, in units of sigma * sqrt(q)."""
    return mp.quantile((np.arange(p) + 0.5) / p, p / q)


def trimmed(s: Spectrum, shape: Shape) -> Noise:
    """Median matching after the signal is set aside: estimate, drop what is over the edge, again until stable.

    k strong signals span k directions on each side, and what is left of the noise is noise of shape (p - k, q - k).
    So the k upper values are dropped and the law of the smaller shape is fitted. This is the scheme of Kritchman and
    Nadler (2009), section III, with the median in the place of the mean.

    A value counts as signal when it passes the Tracy-Widom level TRIM_LEVEL, as there, and not the bare edge. Noise
    passes the edge one time in five, and each pass lowers the next edge: up to 4 values were dropped from pure noise,
    against 1. k never falls, so the loop ends. It stops short of p / 2, where most of the spectrum would be signal and
    no bulk is left to speak of.
    """
    p, q, _ = mp.aspect(shape)
    k = 0
    while True:
        rest = (p - k, q - k)
        sigma = sigma_median(s[k:], rest)
        over = int(np.count_nonzero(s > mp.tracy_widom_edge(sigma, rest, TRIM_LEVEL)))
        if over <= k or over > p // 2:
            return Noise(sigma, k)
        k = over


def bema(s: Spectrum, shape: Shape) -> Noise:
    """Bulk eigenvalue matching: Ke, Ma and Lin (2021), algorithm 2, step 1, noise with gamma-distributed variances.

    For each theta the sigma^2 that brings the middle eigenvalues (order statistics from alpha to 1 - alpha) closest to
    the law's quantiles is sum(x l) / sum(x^2); the theta with the smallest sum of squares is taken. The quantiles come
    from the Silverstein equation instead of simulation. The paper lets the features vary; a weight matrix may vary
    along either side, so both are tried, which also makes the result blind to transposition.
    """
    p, q, _ = mp.aspect(shape)
    if p < BEMA_FEWEST:
        return Noise(sigma_least_squares(s, shape))
    rising = s[::-1] ** 2
    chosen, laws = _gamma_quantiles(p, q)
    level = rising[chosen]
    best, answer = math.inf, Noise(0.0)
    for (along, theta), x in laws.items():
        variance = float(np.sum(x * level) / np.sum(x * x))
        misfit = float(np.sum((level - variance * x) ** 2))
        if misfit < best:
            best, answer = misfit, Noise(variance**0.5, 0, theta, along)
    return answer


@lru_cache(maxsize=64)
def _gamma_quantiles(p: int, q: int) -> tuple[NDArray[np.intp], dict[tuple[str, float], NDArray[np.float64]]]:
    """Indices of the middle order statistics, and for each law its quantiles there, of eigenvalues over sigma^2."""
    u = (np.arange(p) + 0.5) / p
    chosen = np.flatnonzero((u >= BEMA_RANGE) & (u <= 1 - BEMA_RANGE))
    laws = {("p", math.inf): q * mp.quantile(u[chosen], p / q) ** 2}
    for along, P, Q in (("p", p, q), ("q", q, p)):
        for theta in THETAS[1:]:
            laws[along, theta] = Q * gamma_law.law(P / Q, theta).quantile(u[chosen]) ** 2
    return chosen, laws


ESTIMATORS: dict[str, Callable[[Spectrum, Shape], Noise]] = {
    "median": lambda s, shape: Noise(sigma_median(s, shape)),
    "iqr": lambda s, shape: Noise(sigma_iqr(s, shape)),
    "least-squares": lambda s, shape: Noise(sigma_least_squares(s, shape)),
    "trimmed": trimmed,
    "bema": bema,
}


def estimate_noise(s: Spectrum, shape: Shape, estimator: str) -> Noise:
    """The noise in singular values `s` (p,), descending, by the named row of ESTIMATORS. Raises UsageError."""
    if estimator not in ESTIMATORS:
        raise UsageError(f"no estimator is called {estimator!r}; try one of {', '.join(ESTIMATORS)}")
    if len(s) == 0 or s[0] == 0:
        return Noise(0.0)
    u = unit_of(s)
    found = ESTIMATORS[estimator](s / u, shape)
    return replace(found, sigma=found.sigma * u)


# --- how far it can be trusted ----------------------------------------------------------------------------------------

DRAWS = 199  # so that levels are multiples of 1/200
LARGEST_SIMULATED = 256  # a larger p is simulated at this p and the same aspect, and rescaled: see `_null`
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


def fit_noise(s: Spectrum, shape: Shape, estimator: str = "trimmed", noise: Noise | None = None) -> NoiseFit:
    """Estimate the noise in singular values `s` (p,), descending, and measure the fit. See NoiseFit and ESTIMATORS.

    noise: what the estimator says of `s`, where that is known already.

    Where sigma is 0 (half of the values are: a matrix of low rank, or zero) there is no noise and nothing to fit:
    distance 1, level 0. Raises UsageError for an unknown estimator.
    """
    noise = estimate_noise(s, shape, estimator) if noise is None else noise
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
    from scipy.linalg import eigvalsh_tridiagonal

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
    distance with a logarithm on top. At p = 256, 1024, 4096, p times the distance was 2.98, 3.68, 4.04 (square, median
    matching), which 0.42 * (log p + 1.5) describes. With variances drawn at random both go as 1 / sqrt(p) instead.
    """
    equal = math.isinf(theta)
    small = min(p, LARGEST_SIMULATED if equal else LARGEST_GAMMA)
    shape = (small, max(round(q * small / p), small))
    random = np.random.default_rng(0)
    sigmas, distances = [], []
    for _ in range(DRAWS):
        if equal:
            s = gaussian_spectrum(*shape, random)
        else:
            P, Q = shape if along == "p" else (shape[1], shape[0])
            s = gamma_spectrum(P, Q, theta, random)
        noise = estimate_noise(s, shape, estimator)
        sigmas.append(noise.sigma)
        distances.append(bulk_distance(s, shape, noise)[0])
    shrink = small / p if equal else (small / p) ** 0.5
    growth = (math.log(p) + 1.5) / (math.log(small) + 1.5) if equal else 1.0
    return float(np.std(sigmas)) * shrink, np.array(distances) * shrink * growth
