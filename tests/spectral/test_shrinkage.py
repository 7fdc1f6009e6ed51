"""Optimal shrinkage against the paper's definition, and truncation with gains against a plain SVD."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import Methods
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from laser.errors import NumericalError, UsageError
from laser.spectral.certificate import Factors
from laser.spectral.devices import choose_device
from laser.spectral.factorise import truncate
from laser.spectral.shrinkage import SHRINKERS, Gains

CPU = choose_device("cpu")


def by_definition(name: str, y: float, beta: float) -> float:
    """Gavish and Donoho (2017), section II: find the signal x that shows as y, then combine x with the cosines between
    its singular vectors and the measured ones. The paper's closed forms are not used."""
    if y <= 1 + beta**0.5:
        return 0.0
    shown = lambda x: ((x + 1 / x) * (x + beta / x)) ** 0.5 - y  # noqa: E731
    x = float(optimize.brentq(shown, beta**0.25, y + 1, xtol=1e-14))  # pyright: ignore[reportArgumentType]
    c = ((x**4 - beta) / (x**4 + beta * x**2)) ** 0.5
    d = ((x**4 - beta) / (x**4 + x**2)) ** 0.5
    if name == "operator":
        return x
    if name == "frobenius":
        return x * c * d
    return max(x * (c * d - ((1 - c**2) * (1 - d**2)) ** 0.5), 0.0)


@pytest.mark.parametrize("name", SHRINKERS)
@given(beta=st.floats(0.01, 1.0), over=st.floats(1.01, 20.0))
@settings(max_examples=60, deadline=None)
def test_closed_forms_are_the_definition(name: str, beta: float, over: float) -> None:
    y = over * (1 + beta**0.5)
    found = float(SHRINKERS[name](np.array([y]), beta)[0])
    assert found == pytest.approx(by_definition(name, y, beta), rel=1e-5, abs=1e-7)
    assert 0 <= found <= y
    assert float(SHRINKERS[name](np.array([(1 + beta**0.5) * 0.999]), beta)[0]) == 0.0


@pytest.mark.parametrize("name", SHRINKERS)
def test_shrinking_comes_closer_to_the_signal_than_cutting(name: str) -> None:
    random = np.random.default_rng(4)
    left, _ = np.linalg.qr(random.standard_normal((120, 6)))
    right, _ = np.linalg.qr(random.standard_normal((200, 6)))
    signal = left @ np.diag([30.0, 24.0, 20.0, 18.0, 16.0, 15.5]) @ right.T
    noisy = torch.from_numpy(signal + random.standard_normal((120, 200)))
    order = {"frobenius": "fro", "operator": 2, "nuclear": "nuc"}[name]
    cut = truncate(noisy, 6, CPU).matrix.numpy() - signal
    shrunk = truncate(noisy, Gains(6, shrink=name, sigma=1.0), CPU).matrix.numpy() - signal
    assert np.linalg.norm(shrunk, order) < np.linalg.norm(cut, order)


gains = st.builds(
    Gains,
    above=st.integers(0, 6),
    below=st.integers(0, 4),
    shrink=st.sampled_from([None, *SHRINKERS]),
    sigma=st.floats(0.0, 2.0),
)


@pytest.mark.parametrize("method", ["gram", "svd"])
@given(wanted=gains, shape=st.tuples(st.integers(10, 24), st.integers(10, 24)), seed=st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_gains_multiply_the_singular_values(method: str, wanted: Gains, shape: tuple[int, int], seed: int) -> None:
    W = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))
    W[:, :2] *= 9
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    g = torch.from_numpy(wanted.of(s.numpy(), shape))
    found = truncate(W, wanted, CPU, method)
    assert found.certificate.method == method
    assert torch.allclose(found.matrix, (U * (s * g)) @ Vh, atol=1e-9)
    assert found.certificate.energy_kept == pytest.approx(float(torch.sum((g * s) ** 2) / torch.sum(s**2)), abs=1e-12)
    assert g.min() >= 0 and g.max() <= 1
    if wanted.shrink is None:
        assert int(g.sum()) == wanted.above + wanted.below


def test_certificate_notices_gains_that_were_not_applied(methods: Methods) -> None:
    honest = methods.factors["gram"]

    def forged(W: torch.Tensor, device: object, values: object) -> Factors:
        cut = honest(W, CPU, None).cut
        return Factors(s, lambda g: dataclasses.replace(cut(Gains(g.above)), gains=g.of(s, (20, 30))))

    W = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 30)))
    s = torch.linalg.svdvals(W).numpy()
    methods.factors["gram"] = methods.factors["svd"] = forged
    with pytest.raises(NumericalError, match="certificate missed"):
        truncate(W, Gains(5, below=3), CPU)


def test_gains_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="rank 9 does not fit"):
        truncate(torch.ones(4, 8), Gains(5, 4), CPU)
    with pytest.raises(UsageError, match=r"--shrink frobenius\|operator\|nuclear"):
        Gains(1, shrink="soft", sigma=1.0).of(np.ones(2), (2, 2))


@pytest.mark.parametrize("sigma", [0.0, 2.2250738585072014e-308, 1e-12])
def test_noise_too_small_to_matter_shrinks_nothing(sigma: float) -> None:
    s = np.array([3.0, 2.0, 1e-3])
    for shrink in SHRINKERS:
        assert Gains(3, 0, shrink, sigma).of(s, (3, 5)).tolist() == [1.0, 1.0, 1.0]
