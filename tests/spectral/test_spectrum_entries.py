"""Tails of the entries: kurtosis against a loop, and the edge's shift against drawn matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Accelerator

from laser.spectral import marchenko_pastur as mp
from laser.spectral import spectrum
from laser.spectral.devices import HOST
from laser.spectral.noise import gaussian_spectrum
from laser.spectral.spectrum import HEAVY, edge_shift, excess_kurtosis


def test_an_accelerator_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number as on the host, from sums that are asked for when all are queued."""
    device = Accelerator("cpu", torch.float32, False, "an accelerator on CPU tensors")
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    expected, waits = excess_kurtosis(W, HOST), []
    # A size: real blocks need millions of entries.
    monkeypatch.setattr(spectrum, "ENTRIES_AT_A_TIME", 100)
    for name in ("to_host", "scalar"):
        true = getattr(spectrum, name)
        # Where the host waits.
        monkeypatch.setattr(spectrum, name, lambda x, true=true: waits.append(1) or true(x))
    assert excess_kurtosis(W, device) == pytest.approx(expected, abs=1e-5) and len(waits) == 1
    for scale in (2.0**-20, 2.0**19, 1e-30, 1e30):
        assert excess_kurtosis(W * scale, device) == pytest.approx(expected, abs=1e-5)
    assert excess_kurtosis(torch.zeros(3, 4), device) == excess_kurtosis(torch.zeros(0, 4), device) == 0.0


def test_kurtosis_is_that_of_a_loop_over_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.from_numpy(np.random.default_rng(0).laplace(size=(7, 11)))
    x = [float(v) for v in W.reshape(-1)]
    expected = (sum(v**4 for v in x) / 77) / (sum(v**2 for v in x) / 77) ** 2 - 3
    assert excess_kurtosis(W) == pytest.approx(expected, rel=1e-12)
    # Limits: real blocks need matrices of thousands of rows.
    monkeypatch.setattr(spectrum, "CACHED", 10)
    monkeypatch.setattr(spectrum, "ROW", 4)
    assert excess_kurtosis(W) == pytest.approx(expected, rel=1e-12)
    assert excess_kurtosis(1e-30 * W) == pytest.approx(expected, rel=1e-12)  # nothing underflows
    assert excess_kurtosis((1e-30 * W).float().T) == pytest.approx(expected, rel=1e-5)
    assert excess_kurtosis(torch.zeros(3, 4)) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [2.0**-12, 0.02, 30.0])
def test_kurtosis_of_stored_weights_is_that_of_float64(dtype: torch.dtype, scale: float) -> None:
    """Rows in float32, sums in float64; one outlier; a length that no row divides."""
    W = (scale * torch.randn(301, 517, generator=torch.Generator().manual_seed(0))).to(dtype)
    W[5, 7] = 40 * scale
    assert excess_kurtosis(W) + 3 == pytest.approx(excess_kurtosis(W.double()) + 3, rel=3e-7)
    assert excess_kurtosis(W.T) + 3 == pytest.approx(excess_kurtosis(W) + 3, rel=3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("law", ["signs", "laplace"])
def test_the_edge_moves_by_the_fourth_cumulant(law: str) -> None:
    """Mean of s_1^2 over draws, against noise of the same variance and Gaussian entries."""
    p, q, draws, random = 96, 288, 250, np.random.default_rng(0)
    kurtosis = {"signs": -2.0, "laplace": 3.0}[law]
    _, scale = mp.tracy_widom_scale((p, q))
    gaussian = [gaussian_spectrum(p, q, random)[0] ** 2 / scale for _ in range(4 * draws)]
    found = []
    for _ in range(draws):
        signs, laplace = random.choice([-1.0, 1.0], size=(p, q)), random.laplace(scale=0.5**0.5, size=(p, q))
        W = signs if law == "signs" else laplace
        found.append(np.linalg.eigvalsh(W @ W.T)[-1] / scale)
    error = (np.var(found) / draws + np.var(gaussian) / len(gaussian)) ** 0.5
    shift, expected = np.mean(found) - np.mean(gaussian), edge_shift(kurtosis, (p, q))
    assert abs(expected) > 4 * error  # or the next line would pass without a shift
    assert abs(shift - expected) < 3 * error + 0.15 * abs(expected)  # first order in 1 / p


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(576, 192), (1536, 576), (8, 4096)])
def test_heavy_tails_are_flagged_and_gaussian_ones_are_not(shape: tuple[int, int]) -> None:
    for seed in range(5):
        random = np.random.default_rng(seed)
        heavy = [random.laplace(size=shape), random.standard_t(5, size=shape)]
        plain = torch.from_numpy(0.02 * random.standard_normal(shape))
        assert all(edge_shift(excess_kurtosis(torch.from_numpy(x)), shape) > HEAVY for x in heavy)
        assert edge_shift(excess_kurtosis(plain), shape) < HEAVY
        assert edge_shift(excess_kurtosis(plain.bfloat16()), shape) < HEAVY
