"""Every estimator of the noise level against a slow, obvious reference, and the laws that all of them obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate, optimize

from laser.errors import UsageError
from laser.spectral import gamma_law, noise
from laser.spectral import marchenko_pastur as mp
from laser.spectral.noise import ESTIMATORS, Noise, estimate_noise

Array = NDArray[np.float64]


def spectrum(W: Array) -> Array:
    return np.asarray(np.linalg.svd(W, compute_uv=False), dtype=np.float64)


def gaussian(m: int, n: int, seed: int = 0, sigma: float = 1.0) -> Array:
    return sigma * np.random.default_rng(seed).standard_normal((m, n))


def slow_quantile(u: float, beta: float) -> float:
    """By adaptive quadrature of the density, and a root finder."""
    low, high = 1 - beta**0.5, 1 + beta**0.5

    def excess(x: float) -> float:
        return integrate.quad(lambda t: float(mp.density(t, beta)), low, x, epsabs=1e-12)[0] - u

    return optimize.brentq(excess, low, high, xtol=1e-13)  # pyright: ignore[reportReturnType]


def slow_median(s: Array, shape: tuple[int, int]) -> float:
    p, q = min(shape), max(shape)
    return sorted(s)[p // 2] / (slow_quantile(0.5, p / q) * math.sqrt(q))  # odd p only


@pytest.mark.parametrize("shape", [(9, 9), (9, 30), (30, 9)])
def test_median_is_quadrature_of_the_law(shape: tuple[int, int]) -> None:
    s = spectrum(gaussian(*shape))
    assert noise.sigma_median(s, shape) == pytest.approx(slow_median(s, shape), rel=1e-8)


@pytest.mark.parametrize("shape", [(9, 9), (9, 30)])
def test_iqr_is_quadrature_of_the_law(shape: tuple[int, int]) -> None:
    s, beta = spectrum(gaussian(*shape)), min(shape) / max(shape)
    rising = sorted(s)  # at p = 9 the quartiles are the third and the seventh value
    spread = slow_quantile(0.75, beta) - slow_quantile(0.25, beta)
    reference = (rising[6] - rising[2]) / (spread * math.sqrt(max(shape)))
    assert noise.sigma_iqr(s, shape) == pytest.approx(reference, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("low", "high"), [(0.05, 0.6), (0.0, 1.0), (0.3, 0.4)])
def test_least_squares_is_lstsq_on_quadrature_quantiles(low: float, high: float) -> None:
    shape = (20, 50)
    rising = sorted(spectrum(gaussian(*shape, seed=3)))
    columns, values = [], []
    for k in range(1, 21):
        u = (k - 0.5) / 20
        if low <= u <= high:
            columns.append([slow_quantile(u, 0.4) * math.sqrt(50)])
            values.append(rising[k - 1])
    reference = np.linalg.lstsq(np.array(columns), np.array(values), rcond=None)[0][0]
    found = noise.sigma_least_squares(np.array(rising[::-1]), shape, (low, high))
    assert found == pytest.approx(reference, rel=1e-8)


def test_trimming_is_done_by_hand() -> None:
    p, q, k = 45, 90, 6
    W = gaussian(p, q, seed=5)
    W[:k, :k] += 60 * np.eye(k)  # six strong spikes: 39 values of noise of shape 39 x 84 are left
    s = spectrum(W)
    found = noise.trimmed(s, (p, q))
    left = [float(x) for x in s]
    while True:
        gone = p - len(left)
        median = sorted(left)[len(left) // 2] if len(left) % 2 else sum(sorted(left)[len(left) // 2 - 1 :][:2]) / 2
        sigma = median / (mp.median((p - gone) / (q - gone)) * math.sqrt(q - gone))
        edge = mp.tracy_widom_edge(sigma, (p - gone, q - gone), noise.TRIM_LEVEL)
        under = [x for x in left if x <= edge]
        if len(under) == len(left):
            break
        left = under
    assert found.signals == p - len(left) == k
    assert found.sigma == pytest.approx(sigma, rel=1e-9)


@pytest.mark.slow
def test_bema_is_a_search_over_all_laws() -> None:
    shape = (60, 150)
    tau = np.random.default_rng(1).gamma(3.0, 1 / 3.0, size=60)
    s = spectrum(np.sqrt(tau)[:, None] * gaussian(*shape, seed=2))
    rising, best = sorted(x * x for x in s), (math.inf, 0.0, 0.0, "")
    for along, P, Q in (("p", 60, 150), ("q", 150, 60)):
        for theta in noise.THETAS:
            squares = [Q * float(gamma_law.law(P / Q, theta).quantile((k + 0.5) / 60)) ** 2 for k in range(60)]
            middle = [k for k in range(60) if 0.2 <= (k + 0.5) / 60 <= 0.8]
            x, y = np.array([[squares[k]] for k in middle]), np.array([rising[k] for k in middle])
            slope, residual, _, _ = np.linalg.lstsq(x, y)
            best = min(best, (float(residual[0]), math.sqrt(slope[0]), theta, along))
    found = noise.bema(s, shape)
    assert (found.theta, found.along) == (best[2], best[3])
    assert found.sigma == pytest.approx(best[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("theta", [1.0, 4.0, math.inf])
@pytest.mark.parametrize(("m", "n"), [(200, 500), (500, 200)])
def test_bema_finds_sigma_and_the_spread(theta: float, m: int, n: int) -> None:
    random = np.random.default_rng(7)
    tau = np.ones(m) if math.isinf(theta) else random.gamma(theta, 1 / theta, size=m)
    found = noise.bema(spectrum(np.sqrt(tau)[:, None] * gaussian(m, n, seed=8, sigma=0.3)), (m, n))
    assert found.sigma == pytest.approx(0.3 * math.sqrt(tau.mean()), rel=0.04)
    # Spread along the longer side looks in the middle of the spectrum like a smaller one along the shorter side; both
    # then have about the same upper end, which is what the rule goes by.
    assert found.theta >= 30 if math.isinf(theta) else theta / 2 <= found.theta <= theta * 3


# --- the law of unequal variances -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.02, 0.3, 1.0])
def test_equal_variances_give_the_marchenko_pastur_law(beta: float) -> None:
    u = np.linspace(0.01, 0.99, 99)
    assert gamma_law.law(beta, math.inf).quantile(u) == pytest.approx(mp.quantile(u, beta), abs=1e-4)
    # The same matrix lying on its side: the unit is the square root of the other side.
    assert gamma_law.law(1 / beta, math.inf).quantile(u) * beta**0.5 == pytest.approx(mp.quantile(u, beta), abs=1e-4)


@pytest.mark.parametrize(("P", "Q", "theta"), [(150, 400, 2.0), (400, 150, 2.0), (200, 200, 0.7)])
def test_law_is_what_simulated_matrices_have(P: int, Q: int, theta: float) -> None:
    random, draws = np.random.default_rng(3), 12
    pooled = np.concatenate(
        [
            spectrum(np.sqrt(random.gamma(theta, 1 / theta, size=P))[:, None] * random.standard_normal((P, Q)))
            for _ in range(draws)
        ]
    )
    rising = np.sort(pooled) / Q**0.5
    steps = (np.arange(len(rising)) + 0.5) / len(rising)
    # The variances are drawn anew, P times 12 of them: their own spread is 1 / sqrt(12 P), about 0.02.
    assert np.max(np.abs(gamma_law.law(P / Q, theta).cdf(rising) - steps)) < 0.03


def test_population_has_mean_one_and_the_variance_of_the_gamma_law() -> None:
    tau = gamma_law.population(4.0, 4000)
    assert tau.mean() == pytest.approx(1.0)
    assert tau.var() == pytest.approx(1 / 4.0, rel=0.01)


@pytest.mark.parametrize(("P", "Q", "theta"), [(80, 200, 3.0), (200, 80, 3.0), (100, 100, math.inf)])
def test_largest_value_exceeds_its_level_as_often_as_it_should(P: int, Q: int, theta: float) -> None:
    random, draws, level = np.random.default_rng(4), 150, 0.2
    top, over = gamma_law.noise_top(P, Q, theta, level) * Q**0.5, 0
    for _ in range(draws):
        tau = np.ones(P) if math.isinf(theta) else random.gamma(theta, 1 / theta, size=P)
        W = np.sqrt(tau)[:, None] * random.standard_normal((P, Q))
        over += bool(np.linalg.norm(W, 2) > top)
    assert 0.08 < over / draws < 0.32  # 0.2 within four binomial errors of 0.033


# --- laws over all estimators -----------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(2, 24), st.integers(2, 24))


@pytest.mark.parametrize("name", ESTIMATORS)
@given(shape=shapes, seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 0.5, 3.0, 1e5]), spikes=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_scaling_scales_and_transposing_or_permuting_changes_nothing(
    name: str, shape: tuple[int, int], seed: int, scale: float, spikes: int
) -> None:
    random = np.random.default_rng(seed)
    W = random.standard_normal(shape)
    W[:, :spikes] *= 10
    found = estimate_noise(spectrum(W), shape, name)
    scaled = estimate_noise(spectrum(scale * W), shape, name)
    assert scaled.sigma == pytest.approx(scale * found.sigma, rel=1e-6)
    assert (scaled.signals, scaled.theta, scaled.along) == (found.signals, found.theta, found.along)
    assert estimate_noise(spectrum(W.T), (shape[1], shape[0]), name).sigma == pytest.approx(found.sigma, rel=1e-6)
    shuffled = W[random.permutation(shape[0])][:, random.permutation(shape[1])]
    assert estimate_noise(spectrum(shuffled), shape, name).sigma == pytest.approx(found.sigma, rel=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
@given(shape=st.tuples(st.integers(1, 20), st.integers(1, 20)), rank=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_low_rank_and_zero_matrices_have_finite_levels(name: str, shape: tuple[int, int], rank: int) -> None:
    random = np.random.default_rng(rank)
    W = random.standard_normal((shape[0], rank)) @ random.standard_normal((rank, shape[1]))
    s = spectrum(W)
    s[rank:] = 0.0
    found = estimate_noise(s, shape, name)
    assert found.sigma >= 0 and math.isfinite(found.sigma)
    assert 0 <= found.lower_edge(shape) <= found.upper_edge(shape) < math.inf
    if rank == 0:
        assert found == Noise(0.0)
    elif name in ("median", "trimmed") and 2 * rank < min(shape):
        assert found.sigma == 0


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n != "iqr"])  # one value has no interquartile range
def test_a_single_row_gives_the_deviation_of_its_entries(name: str) -> None:
    row = gaussian(1, 4000, sigma=0.7)
    assert estimate_noise(spectrum(row), (1, 4000), name).sigma == pytest.approx(0.7, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("shape", [(128, 128), (128, 448), (448, 128)])
def test_sigma_is_recovered_on_pure_noise(name: str, shape: tuple[int, int]) -> None:
    errors = [abs(estimate_noise(spectrum(gaussian(*shape, seed=s)), shape, name).sigma - 1) for s in range(10)]
    # Five standard errors or so at p = 128; quartiles are four times as noisy as medians (noise.py).
    assert max(errors) < (0.09 if name == "iqr" else 0.05)


def test_trimming_stays_right_where_the_median_is_led_astray() -> None:
    p, q, k = 160, 400, 32  # a fifth of the values is signal
    W = gaussian(p, q)
    W[:k, :k] += 100 * np.eye(k)
    s = spectrum(W)
    assert abs(noise.trimmed(s, (p, q)).sigma - 1) < 0.02
    assert noise.sigma_median(s, (p, q)) > 1.04


def test_unknown_estimator_is_answered_with_the_list() -> None:
    with pytest.raises(UsageError, match="least-squares"):
        estimate_noise(np.ones(3), (3, 3), "mean")
