"""Scaling by powers of two: nothing underflows or overflows, and ordinary matrices do not notice."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from laser.errors import NumericalError
from laser.spectral import factorise, unit
from laser.spectral.data_metric import ByData, data_values, relative_error, truncate_in_metric
from laser.spectral.devices import choose_device
from laser.spectral.factorise import METHODS, measure, singular_values, truncate
from laser.spectral.noise import fit_noise
from laser.spectral.permutation import null_largest
from laser.spectral.rules import RULES, apply_rule, energy_share, signal_to_noise
from laser.spectral.shrinkage import Gains
from laser.spectral.spectrum import at_threshold, describe_spectrum, excess_kurtosis

HOST, SINGLE = choose_device("cpu"), choose_device("cpu", "float32")
EDGES = (2.0**-80, 2.0**-400, 2.0**-560, 2.0**80, 2.0**560)  # squares of the last ones leave float64


def weights(m: int = 60, n: int = 40, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(m, 4, generator=g, dtype=torch.float64) @ torch.randn(4, n, generator=g, dtype=torch.float64)
    return torch.randn(m, n, generator=g, dtype=torch.float64) + low


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (1.0, 1.0),
        (2.0**20, 1.0),
        (2.0**-20, 1.0),
        (2.0**21, 2.0**21),
        (3 * 2.0**-30, 2.0**-29),
        (5e-324, 2.0**-1022),
        (1.7e308, 2.0**1023),
        (0.0, 1.0),
        (math.inf, 1.0),
        (math.nan, 1.0),
    ],
)
def test_units(largest: float, expected: float) -> None:
    assert unit.unit(largest) == expected


def test_the_largest_entry_is_found_whatever_its_sign_and_type() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert unit.largest_entry(torch.tensor([[1, -3], [2, 0]], dtype=dtype)) == 3
    assert unit.largest_entry(torch.empty(0, 4)) == 0
    assert math.isnan(unit.largest_entry(torch.tensor([1.0, math.nan, math.inf])))


@pytest.mark.slow
def test_ordinary_matrices_are_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any scaling, and with all matrices scaled: values, results and certificates do not change by a bit."""
    cases = [
        (weights(m, n, seed).to(dtype) * size, device)
        for seed, (m, n) in enumerate(((60, 40), (40, 90), (64, 64)))
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
        for size in (0.02, 3.0)
        for device in (HOST, SINGLE)
    ]

    def everything() -> list[bytes]:
        found = []
        for W, device in cases:
            for method in METHODS:
                cut = truncate(W, 7, device, method)
                found += [measure(W, device, method).singular_values.tobytes(), repr(cut.certificate).encode()]
                found += [cut.matrix.view(torch.uint8).numpy().tobytes(), cut.singular_values.tobytes()]
            shrunk = truncate(W, Gains(9, 2, "frobenius", 0.01 * float(W.abs().max())), device)
            found += [shrunk.matrix.view(torch.uint8).numpy().tobytes()]
        return found

    as_it_is = everything()
    # Without the step that is tested, and with one that is never taken.
    monkeypatch.setattr(factorise, "in_unit", lambda W: (W, 1.0))
    assert everything() == as_it_is
    # As above.
    monkeypatch.setattr(factorise, "in_unit", lambda W: (W.double() / 2.0**-7, 2.0**-7))
    assert everything() == as_it_is


@pytest.mark.parametrize("c", EDGES)
@pytest.mark.parametrize("device", [HOST, SINGLE], ids=["float64", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_results_scale_with_the_matrix(c: float, device: factorise.Device, method: str) -> None:
    """Against the same matrix in the middle of the range; with gains too, whose noise scales as well."""
    W = weights()
    one, other = truncate(W, 6, device, method), truncate(W * c, 6, device, method)
    assert np.allclose(other.singular_values / c, one.singular_values, rtol=1e-9, atol=1e-3)
    assert torch.allclose(other.matrix / c, one.matrix, rtol=0, atol=1e-5)
    assert other.certificate.energy_kept == pytest.approx(one.certificate.energy_kept, abs=1e-6)
    assert 0 < other.certificate.tolerance < 1e-2
    assert np.allclose(measure(W * c, device, method).singular_values / c, one.singular_values, rtol=1e-5, atol=1e-3)
    if method == "gram":
        gains = Gains(8, 2, "operator", 0.9)
        shrunk = truncate(W * c, replace(gains, sigma=0.9 * c), device)
        assert torch.allclose(shrunk.matrix / c, truncate(W, gains, device).matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-24, 1e-30, 1e-36, 1e-39, 1e30])
def test_float32_arithmetic_cuts_small_and_large_weights_rightly(dtype: torch.dtype, scale: float) -> None:
    W = (weights() * scale).to(dtype)
    found = truncate(W, 6, SINGLE)
    wide = W.double() / scale
    U, s, Vh = torch.linalg.svd(wide, full_matrices=False)
    best = (U[:, :6] * s[:6]) @ Vh[:6]
    rounding = wide.norm() * (torch.finfo(dtype).eps + 2e-6) + len(W) ** 2 * torch.finfo(dtype).smallest_normal / scale
    assert (found.matrix.double() / scale - best).norm() <= rounding
    assert found.certificate.energy_kept == pytest.approx(float((s[:6] ** 2).sum() / (s**2).sum()), abs=1e-5)


@pytest.mark.parametrize("c", EDGES)
def test_nulls_and_tails_scale(c: float) -> None:
    W = weights()
    assert np.allclose(null_largest(W * c, 3, HOST) / c, null_largest(W, 3, HOST), rtol=1e-5)
    assert excess_kurtosis(W * c) == pytest.approx(excess_kurtosis(W), rel=1e-12)


@pytest.mark.parametrize("c", EDGES)
@pytest.mark.parametrize("device", [HOST, SINGLE], ids=["float64", "float32"])
def test_the_metric_of_the_data_scales(c: float, device: factorise.Device) -> None:
    x = torch.randn(200, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for W in (weights(), weights(30, 40)):
        for metric in (ByData("full", x.T @ x / 200, 200), ByData("diagonal", (x * x).mean(0), 200)):
            s = data_values(W, metric, device)
            assert np.allclose(data_values(W * c, metric, device) / c, s, rtol=1e-6)
            one, other = (truncate_in_metric(W * k, 5, metric, device) for k in (1.0, c))
            assert torch.allclose(other.matrix / c, one.matrix, atol=1e-5)
            lost = 1 - energy_share(s, np.arange(len(s)) < 5)
            assert relative_error(W * c, other.matrix, 5, metric) == pytest.approx(lost, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("c", EDGES)
def test_rules_fits_and_numbers_scale(c: float) -> None:
    s, shape = singular_values(weights(), HOST)[0], (60, 40)
    null = s[0] * np.linspace(0.3, 0.5, 19)
    for name, rule in RULES.items():
        spec = rule.sample or name
        one, other = (apply_rule(spec, s * k, shape, null * k, 0.1 * k) for k in (1.0, c))
        assert other.rank == one.rank and other.reason == one.reason
        assert (other.threshold is None) == (one.threshold is None)
        if one.threshold is not None and other.threshold is not None:
            assert other.threshold / c == one.threshold
        assert (at_threshold(spec, s * c, other, 1e-16) == "") == (at_threshold(spec, s, one, 1e-16) == "")
    for estimator in ("trimmed", "bema", "iqr"):
        one, other = (fit_noise(s * k, shape, estimator) for k in (1.0, c))
        assert replace(other, sigma=one.sigma, standard_error=one.standard_error) == one
        assert other.sigma / c == pytest.approx(one.sigma, rel=1e-14)
    one, other = describe_spectrum(s), describe_spectrum(s * c)
    assert other.energy_ranks == one.energy_ranks and other.norm / c == pytest.approx(one.norm)
    assert (other.stable_rank, other.effective_rank) == pytest.approx((one.stable_rank, one.effective_rank))
    assert one.tail and other.tail and other.tail.alpha == pytest.approx(one.tail.alpha)
    assert signal_to_noise(s * c, 5) == pytest.approx(signal_to_noise(s, 5))


def test_one_huge_entry_is_measured_and_what_leaves_the_range_is_refused() -> None:
    W = weights(32, 32)
    W[0, 0] = 1e80
    assert singular_values(W, HOST)[0][0] == pytest.approx(1e80)
    assert math.isfinite(excess_kurtosis(W)) and null_largest(W, 1, HOST) == pytest.approx(1e80)
    with pytest.raises(NumericalError, match="leaves the range of float64"):
        singular_values(torch.full((9, 9), 1.7e308, dtype=torch.float64), HOST)
    rows = torch.full((8, 8), 65504.0)
    rows[:, 4:] *= -1
    rows[0] *= -1
    rows[1, 1] = 0
    with pytest.raises(NumericalError, match=r"leaves the range of torch\.float16"):
        truncate(rows.half(), 1, HOST)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_inf_are_named(bad: float, method: str) -> None:
    W = weights()
    W[3, 5] = bad
    for action in (lambda: measure(W, SINGLE, method), lambda: truncate(W, 3, SINGLE, method)):
        with pytest.raises(NumericalError, match="NaN or Inf"):
            action()
