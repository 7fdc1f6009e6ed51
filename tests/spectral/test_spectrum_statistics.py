"""Numbers of a spectrum against their definitions, and the tail exponent against the package `powerlaw`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laser.spectral.spectrum import ENERGIES, describe_spectrum, fit_tail, log_alpha_norm

POWERLAW = {
    # python -c "
    # import numpy as np, powerlaw
    # for law, draw in {'gaussian': lambda r: r.standard_normal((64, 160)), 'student': lambda r: r.standard_t(2.5,
    #         (64, 160)), 'product': lambda r: r.standard_normal((64, 160)) * r.exponential(size=(64, 1))}.items():
    #     s = np.linalg.svd(draw(np.random.default_rng(12)), compute_uv=False)
    #     f = powerlaw.Fit(s**2, xmin_distance='D', verbose=False)
    #     print(law, f.alpha, f.D, f.xmin)"   # powerlaw 1.5
    "gaussian": (5.154665625479392, 0.11184128973450558, 238.27744068704718),
    "student": (3.5532835293751295, 0.12151946899498667, 913.240938180515),
    "product": (3.7739645102389194, 0.14281301317292727, 1028.3160230334538),
}


def draw(law: str) -> np.ndarray:
    random = np.random.default_rng(12)
    if law == "gaussian":
        W = random.standard_normal((64, 160))
    elif law == "student":
        W = random.standard_t(2.5, (64, 160))
    else:
        W = random.standard_normal((64, 160)) * random.exponential(size=(64, 1))
    return np.asarray(np.linalg.svd(W, compute_uv=False), dtype=np.float64)


@pytest.mark.parametrize("law", POWERLAW)
def test_tail_agrees_with_the_powerlaw_package(law: str) -> None:
    found, (alpha, distance, start) = fit_tail(draw(law)), POWERLAW[law]
    assert found is not None
    assert found.alpha == pytest.approx(alpha, rel=0.02)
    assert found.distance == pytest.approx(distance, rel=0.02)
    assert found.start == pytest.approx(start, rel=0.02)


def test_tail_is_a_search_over_every_start() -> None:
    x = sorted(float(v) ** 2 for v in draw("product"))
    best = (math.inf, 0.0, 0)
    for start in x[:-2]:
        tail = [v for v in x if v >= start]
        alpha = 1 + len(tail) / sum(math.log(v / start) for v in tail)
        gaps = [abs(1 - (v / start) ** (1 - alpha) - sum(w < v for w in tail) / len(tail)) for v in tail]
        best = min(best, (max(gaps), alpha, len(tail)))
    found = fit_tail(draw("product"))
    assert found is not None
    assert (found.distance, found.alpha, found.count) == pytest.approx(best, rel=1e-9)


def test_exponent_of_a_power_law_is_recovered() -> None:
    u = np.random.default_rng(0).random(4000)
    s = np.sort(np.sqrt(u ** (-1 / 1.5)))[::-1]  # s^2 has density x^-2.5 from 1 on
    found = fit_tail(s)
    assert found is not None and found.alpha == pytest.approx(2.5, abs=0.15) and found.distance < 0.03


@pytest.mark.slow
@given(p=st.integers(1, 30), scale=st.floats(1e-5, 1e5), seed=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_ranks_are_in_range_and_scaling_leaves_them(p: int, scale: float, seed: int) -> None:
    s = np.sort(np.random.default_rng(seed).random(p) + 1e-3)[::-1]
    one, many = describe_spectrum(s), describe_spectrum(scale * s)
    assert 1 <= one.stable_rank <= p + 1e-9 and 1 - 1e-9 <= one.effective_rank <= p + 1e-9
    assert list(one.energy_ranks) == sorted(one.energy_ranks) and 1 <= one.energy_ranks[0] <= one.energy_ranks[-1] <= p
    assert many.energy_ranks == one.energy_ranks
    assert many.stable_rank == pytest.approx(one.stable_rank)
    assert many.effective_rank == pytest.approx(one.effective_rank)
    assert many.largest == pytest.approx(scale * one.largest)
    assert (one.tail is None) == (p < 3)
    if one.tail and many.tail:
        assert many.tail.alpha == pytest.approx(one.tail.alpha, rel=1e-6)


def test_equal_values_and_one_value() -> None:
    flat, one = describe_spectrum(np.full(8, 3.0)), describe_spectrum(np.array([5.0, 0.0, 0.0, 0.0]))
    assert (flat.stable_rank, flat.effective_rank) == pytest.approx((8.0, 8.0))
    assert flat.energy_ranks == (4, 8, 8, 8) and flat.tail is None
    assert (one.stable_rank, one.effective_rank, one.norm) == pytest.approx((1.0, 1.0, 5.0))
    assert one.energy_ranks == (1,) * len(ENERGIES) and one.tail is None


def test_energy_ranks_are_counted_by_hand() -> None:
    s = np.sqrt([50.0, 40.0, 5.0, 4.0, 1.0])  # energies in percent
    assert describe_spectrum(s).energy_ranks == (1, 2, 3, 4)


def test_a_product_of_rank_five_loses_the_rest() -> None:
    """Equal values give entropy 1, whatever the rank; the log of a sum of powers is that sum's also past its range."""
    random = np.random.default_rng(1)
    s = np.linalg.svd(random.standard_normal((40, 5)) @ random.standard_normal((5, 60)), compute_uv=False)
    found = describe_spectrum(np.asarray(s, dtype=np.float64), (40, 60))
    assert found.rank_loss == 35 and found.entropy is not None and 0.5 < found.entropy < 1
    flat = describe_spectrum(np.array([3.0] * 5 + [0.0] * 3))
    assert flat.entropy == pytest.approx(1) and flat.rank_loss == 3
    assert describe_spectrum(np.array([2.0, 0.0])).entropy is None and found.alpha_weighted is not None
    assert log_alpha_norm(np.array([10.0, 10.0]), 3.0) == pytest.approx(6 + np.log10(2))
    assert log_alpha_norm(np.array([1e150, 1.0]), 4.0) == pytest.approx(1200)


def test_zero_matrix_has_no_tail() -> None:
    zero = describe_spectrum(np.zeros(4))
    assert (zero.entropy, zero.rank_loss, zero.alpha_weighted) == (None, 4, None)
    assert (zero.largest, zero.stable_rank, zero.effective_rank, zero.tail) == (0.0, 0.0, 0.0, None)
