"""Silverstein's equation: the plain law for white inputs, and Gaussian noise on any others."""

import numpy as np
import pytest
import torch
from conftest import sampled
from silverstein import cdf, distance, stieltjes

from laser.spectral import marchenko_pastur as mp
from laser.spectral.data_metric import ByData, data_values
from laser.spectral.devices import choose_device
from laser.spectral.permutation import permuted

SHAPES = ((60, 120), (120, 60), (80, 80))
POPULATIONS = {
    "white": lambda n: np.ones(n),
    "two decades": lambda n: np.geomspace(1, 100, n),
    "massive": lambda n: np.concatenate([np.ones(n - 3), [1e2, 1e4, 1e6]]),
    "power": lambda n: 1e3 * np.arange(1, n + 1) ** -1.5,
}


@pytest.mark.parametrize("shape", sampled(SHAPES, 3))
def test_white_inputs_give_the_marchenko_pastur_law(shape: tuple[int, int]) -> None:
    m, n = shape
    x = np.sqrt(max(shape) / n) * mp.quantile(np.linspace(0.02, 0.98, 49), min(shape) / max(shape))
    assert cdf(x, np.ones(n), m / n) == pytest.approx(np.linspace(0.02, 0.98, 49), abs=2e-3)


@pytest.mark.parametrize("kind", POPULATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_solution_solves_and_has_a_positive_density(shape: tuple[int, int], kind: str) -> None:
    m, n = shape
    t = POPULATIONS[kind](n)
    z = np.geomspace(0.01, 10 * t.max(), 50) * (1 + 1e-6j)
    v = stieltjes(z, t, m / n)
    back = -1 / v + np.mean(t[None, :] / (1 + m / n * t[None, :] * v[:, None]), axis=1)
    assert (v.imag > 0).all() and np.abs(back - z).max() <= 1e-5 * np.abs(z).max()


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "kind"), [*zip(SHAPES, [*POPULATIONS][1:], strict=True)])
def test_gaussian_noise_permuted_or_not_has_the_law_s_spectrum(shape: tuple[int, int], kind: str) -> None:
    m, n = shape
    t = POPULATIONS[kind](n)
    W = 0.02 * torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    metric = ByData("full", torch.from_numpy((Q * t) @ Q.T), 10 * n)
    for noise in (W, permuted(W, 1)):
        s = data_values(noise, metric, choose_device("cpu")) / (0.02 * n**0.5)
        assert distance(s, t, m / n) < 3.5 / min(shape)  # eigenvalues are rigid: off by a few of p, not by sqrt(p)
        assert distance(1.2 * s, t, m / n) > 0.05  # and the distance sees a fifth more of noise
