"""Standard error, Kolmogorov-Smirnov distance and its level: against loops, dense matrices and repeated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from laser.spectral import noise
from laser.spectral.noise import ESTIMATORS, Noise, bulk_distance, fit_noise, gaussian_spectrum


def test_distance_is_the_largest_gap_between_two_step_functions() -> None:
    shape, random = (30, 70), np.random.default_rng(2)
    s = gaussian_spectrum(30, 70, random)
    s[0] *= 3  # one signal: the bulk is that of 29 x 69
    found = Noise(1.1)
    distance, count = bulk_distance(s, shape, found)
    bulk = [x for x in s if x <= found.upper_edge(shape)]
    assert count == len(bulk) == 29
    gap = 0.0
    for x in bulk:
        expected = float(Noise(1.1, signals=1).cdf(np.array([x]), shape)[0])
        at, before = sum(y <= x for y in bulk) / len(bulk), sum(y < x for y in bulk) / len(bulk)
        gap = max(gap, abs(at - expected), abs(before - expected))
    assert distance == pytest.approx(gap, abs=1e-12)


@pytest.mark.parametrize(("p", "q"), [(1, 5), (6, 6), (12, 30)])
def test_bidiagonal_matrices_have_the_law_of_dense_ones(p: int, q: int) -> None:
    random, draws = np.random.default_rng(0), 800
    quick = np.array([gaussian_spectrum(p, q, random) for _ in range(draws)])
    dense = np.linalg.svd(random.standard_normal((draws, p, q)), compute_uv=False)
    for i in (0, p // 2, p - 1):
        error = math.sqrt((quick[:, i].var() + dense[:, i].var()) / draws)
        assert abs(quick[:, i].mean() - dense[:, i].mean()) < 4 * error
        assert quick[:, i].std() == pytest.approx(dense[:, i].std(), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("p", "q"), [(96, 300), (8, 1000)])
def test_levels_and_standard_errors_are_those_of_repeated_draws(name: str, p: int, q: int) -> None:
    random = np.random.default_rng(1)
    fits = [fit_noise(gaussian_spectrum(p, q, random), (p, q), name) for _ in range(60 if name == "bema" else 120)]
    low = np.mean([f.level <= 0.2 for f in fits])
    assert low < 0.38  # 0.2 within four or five binomial errors of 0.037
    if (name, p) != ("iqr", 8):  # there the bulk is often empty, distance 1, and such ties count as "as far off"
        assert low > 0.03
    if name != "bema":  # its error depends on the theta that it found
        errors = np.std([f.sigma for f in fits])
        assert np.mean([f.standard_error for f in fits]) == pytest.approx(errors, rel=0.35)


@pytest.mark.slow
@pytest.mark.parametrize(("p", "q"), [(700, 700), (700, 2000)])
def test_large_shapes_borrow_from_smaller_ones(p: int, q: int) -> None:
    random = np.random.default_rng(3)
    fits = [fit_noise(gaussian_spectrum(p, q, random), (p, q), "median") for _ in range(60)]
    assert 0.02 < np.mean([f.level <= 0.2 for f in fits]) < 0.42
    error = np.std([f.sigma for f in fits])
    assert fits[0].standard_error == pytest.approx(error, rel=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["median", "trimmed", "least-squares"])
def test_unequal_rows_are_flagged_and_bema_fits_them(name: str) -> None:
    random = np.random.default_rng(5)
    rows = np.sqrt(random.gamma(2.0, 0.5, size=120))[:, None]
    s = np.asarray(np.linalg.svd(rows * random.standard_normal((120, 300)), compute_uv=False), dtype=np.float64)
    assert fit_noise(s, (120, 300), name).level == 1 / (1 + noise.DRAWS)  # as far off as no simulated noise
    assert fit_noise(s, (120, 300), "bema").level > 0.05


def test_no_noise_is_no_fit() -> None:
    s = np.array([3.0, 2.0, 0.0, 0.0, 0.0])
    found = fit_noise(s, (5, 9), "median")
    assert (found.sigma, found.standard_error, found.distance, found.level, found.theta) == (0.0, 0.0, 1.0, 0.0, None)


def test_the_bulk_of_an_all_signal_matrix_is_empty() -> None:
    assert bulk_distance(np.array([5.0, 4.0]), (2, 3), Noise(0.1)) == (1.0, 0)


def test_scaling_changes_sigma_alone() -> None:
    s = gaussian_spectrum(40, 100, np.random.default_rng(9))
    one, many = fit_noise(s, (40, 100)), fit_noise(1000 * s, (100, 40))
    assert many.sigma == pytest.approx(1000 * one.sigma)
    assert many.standard_error == pytest.approx(1000 * one.standard_error)
    assert (many.level, many.bulk) == (one.level, one.bulk)
    assert many.distance == pytest.approx(one.distance)
    assert noise.trimmed(s, (40, 100)).signals == 40 - one.bulk
