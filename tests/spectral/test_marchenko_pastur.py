"""The law against adaptive quadrature, sampled noise and the shared reference vectors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, special

from laser.spectral import marchenko_pastur as mp

BETAS = [1.0, 0.75, 0.5, 0.25, 0.1, 0.01]
betas = st.floats(1e-3, 1.0)


@pytest.mark.parametrize("beta", BETAS)
def test_cdf_is_the_integral_of_the_density(beta: float) -> None:
    low, high = 1 - beta**0.5, 1 + beta**0.5
    for x in np.linspace(low, high, 7)[1:]:
        area, _ = integrate.quad(lambda t: float(mp.density(t, beta)), low, x, epsabs=1e-11, limit=200)
        assert mp.cdf(x, beta) == pytest.approx(area, abs=1e-8)


@given(betas, st.floats(0.0, 1.0))
def test_quantile_inverts_cdf(beta: float, u: float) -> None:
    assert mp.cdf(mp.quantile(u, beta), beta) == pytest.approx(u, abs=1e-7)


@given(betas)
def test_support_holds_everything(beta: float) -> None:
    low, high = mp.edges(1.0, (1000, 1000))
    assert (low, high) == pytest.approx((0.0, 2 * 1000**0.5))
    assert mp.cdf(1 - beta**0.5 - 1e-9, beta) == pytest.approx(0.0, abs=1e-6)
    assert mp.cdf(1 + beta**0.5, beta) == 1.0
    assert mp.density(1 + beta**0.5 + 1e-6, beta) == 0.0


def test_shared_vectors(shared: Path) -> None:
    for row in json.loads((shared / "vectors" / "marchenko_pastur.json").read_text())["law"]:
        beta = row["beta"]
        found = [*mp.quantile([0.1, 0.25, 0.75, 0.9], beta), mp.median(beta), float(mp.cdf(1.0, beta))]
        wanted = [row[k] for k in ("q10", "q25", "q75", "q90", "median", "cdf_at_1")]
        assert found == pytest.approx(wanted, abs=1e-9)
        assert (1 - beta**0.5, 1 + beta**0.5) == pytest.approx((row["lower"], row["upper"]), abs=1e-12)


def test_median_of_square_noise_as_published() -> None:
    # Gavish and Donoho (2014), table IV: omega(1) = 4/sqrt(3) / m_1 = 2.8582
    assert 4 / 3**0.5 / mp.median(1.0) == pytest.approx(
        2.8582, abs=2e-4
    )  # printed with four digits; the exact value is 2.85836


def test_tracy_widom_quantiles_as_tabulated() -> None:
    """Invert the edge to the quantile of TW1; Johnstone (2001), table 1, and Chiani's stated accuracy."""
    p, q = 400, 900
    mu = ((q - 1) ** 0.5 + p**0.5) ** 2
    c = mu**0.5 * ((q - 1) ** -0.5 + p**-0.5) ** (1 / 3)
    for alpha, w in {0.10: 0.4501, 0.05: 0.9793, 0.01: 2.0234}.items():
        assert (mp.tracy_widom_edge(1.0, (q, p), alpha) ** 2 - mu) / c == pytest.approx(w, abs=0.012)


def test_noise_follows_the_law() -> None:
    rng = np.random.default_rng(7)
    for m, n in ((200, 200), (150, 600), (40, 800)):
        s = np.linalg.svd(rng.standard_normal((m, n)), compute_uv=False) / n**0.5
        u = mp.cdf(s, m / n)
        # Eigenvalues of noise repel each other, so the distance is of order 1/p, far under that of independent draws.
        assert np.abs(np.sort(u) - (np.arange(m) + 0.5) / m).max() < 4 / m


def tracy_widom(s: float, nodes: int = 80) -> float:
    """F_1(s) = det(1 - K) on (s, infinity), K(x, y) = Ai((x + y) / 2) / 2: Ferrari and Spohn (2005)."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    x, w = s + (x + 1) * 12, np.sqrt(w * 12)
    K = special.airy((x[:, None] + x) / 2)[0] / 2
    return float(np.linalg.det(np.eye(nodes) - w[:, None] * K * w))


STATED = {1e-4: 0.100, 0.01: 0.015, 0.1: -0.004, 0.5: 0.0, 0.9: 0.003, 0.99: -0.010, 0.9999: -0.038}


@pytest.mark.slow
def test_tracy_widom_is_off_by_what_its_docstring_states() -> None:
    told = " ".join((mp.tracy_widom_quantile.__doc__ or "").split())
    for u, error in STATED.items():
        exact: Any = optimize.brentq(lambda s, u=u: tracy_widom(s) - u, -9, 12, xtol=1e-10)
        assert mp.tracy_widom_quantile(u) - exact == pytest.approx(error, abs=6e-4)
        assert abs(error) < 1e-3 or f"{error:+.3f} at {u:.4f}".rstrip("0") in told
        assert mp.tracy_widom_upper(1 - u) == pytest.approx(mp.tracy_widom_quantile(u), abs=1e-9)


def test_small_levels_have_their_own_edges() -> None:
    """1 - alpha is 1 for each of these, and its quantile was infinite."""
    edges = [mp.tracy_widom_edge(1.0, (300, 200), alpha) for alpha in (1e-3, 1e-15, 1e-17, 1e-30, 1e-300, 5e-324)]
    assert np.all(np.diff(edges) > 0) and np.isfinite(edges).all()
