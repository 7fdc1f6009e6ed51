"""Other people's programs on the same matrices: WeightWatcher, scikit-rmt, optht and powerlaw, each if it is installed.

None is a dependency. What they say is computed here and compared here; no number of theirs is copied.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import laser
from laser.spectral import marchenko_pastur as mp
from laser.spectral.rules import apply_rule
from laser.spectral.spectrum import describe_spectrum, log_alpha_norm

DEMO = Path(__file__).parent.parent.parent / ".demo" / "mixtral"
Case = tuple[NDArray[np.float64], tuple[int, int]]  # singular values and shape


def synthetic(seed: int) -> Case:
    """Noise with spikes, then with heavy tails, then a product of two, in ten shapes."""
    random = np.random.default_rng(seed)
    m, n = int(random.integers(60, 160)), int(random.integers(60, 240))
    noise = random.standard_normal((m, n))
    spikes = random.standard_normal((m, 8)) @ random.standard_normal((8, n))
    W = (noise + 0.5 * spikes, random.standard_t(3, (m, n)), noise @ random.standard_normal((n, n)) / n**0.5)[seed % 3]
    return np.linalg.svd(W, compute_uv=False).astype(np.float64), (m, n)


def of_demo() -> list[Case]:
    checkpoint = laser.open_checkpoint(DEMO)
    wanted = [m for m in laser.list_matrices(checkpoint) if m.is_matrix and min(m.shape) > 32 and m.layer is not None]
    chosen = wanted[:: max(1, len(wanted) // 10)][:10]
    return [
        (np.linalg.svd(checkpoint.read(m.tensor, m.part).double().numpy(), compute_uv=False), m.shape[:2])  # pyright: ignore
        for m in chosen
    ]


@pytest.fixture(scope="module", params=["synthetic", "demo"])
def cases(request: pytest.FixtureRequest) -> list[Case]:
    if request.param == "synthetic":
        return [synthetic(seed) for seed in range(10)]
    if not DEMO.is_dir():
        pytest.skip("needs the demo model; scripts/demo.sh makes it")
    found = of_demo()
    assert len(found) == 10
    return found


def oracle(name: str) -> Any:
    """The package, or a skip that says which one is missing. They warn of what is none of our business."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed, or not with these versions ({error}); pip install --no-deps it")
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_the_tail_is_that_of_powerlaw(cases: list[Case]) -> None:
    powerlaw = oracle("powerlaw")
    for s, _ in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = powerlaw.Fit(s**2, parameter_ranges={"alpha": [1, 1000]}, verbose=False)
            alpha, distance = float(theirs.power_law.alpha), float(theirs.power_law.D)
        ours = describe_spectrum(s).tail
        assert ours is not None and ours.alpha == pytest.approx(alpha, rel=1e-6)
        assert ours.distance == pytest.approx(distance, abs=1e-8)


def test_the_columns_are_those_of_weightwatcher(cases: list[Case]) -> None:
    oracle("weightwatcher")
    watcher, numbers = oracle("weightwatcher.WW_powerlaw"), oracle("weightwatcher.RMT_Util")
    for s, shape in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = watcher.WWFit(s**2)
        ours = describe_spectrum(s, shape)
        single, longest = s.astype(np.float32), max(shape)
        assert ours.entropy == pytest.approx(numbers.matrix_entropy(single, longest), rel=1e-5)
        assert ours.rank_loss == numbers.calc_rank_loss(single, longest)
        assert ours.stable_rank == pytest.approx(numbers.stable_rank(s**2), rel=1e-12)
        assert ours.tail is not None and ours.tail.alpha == pytest.approx(theirs.alpha, rel=1e-10)
        assert ours.tail.alpha_error == pytest.approx(theirs.sigma, rel=1e-10)
        assert ours.tail.start == pytest.approx(theirs.xmin, rel=1e-12)
        assert ours.tail.count == np.count_nonzero(s**2 >= theirs.xmin)
        assert ours.alpha_weighted == pytest.approx(theirs.alpha * np.log10(np.max(s**2)), rel=1e-10)
        assert log_alpha_norm(s, ours.tail.alpha) == pytest.approx(np.log10(np.sum((s**2) ** theirs.alpha)), rel=1e-9)


def test_the_hard_threshold_is_that_of_optht(cases: list[Case]) -> None:
    theirs = oracle("optht")
    for s, shape in cases:
        ours = apply_rule("gavish-donoho", s, shape).rank
        if ours:
            assert ours == theirs.optht(min(shape) / max(shape), s)
        else:  # it takes the largest index of an empty list
            with pytest.raises(ValueError, match="zero-size"):
                theirs.optht(min(shape) / max(shape), s)


def derivative(function: Any, x: Any, dx: float, order: int) -> Any:
    """scipy.misc.derivative as SciPy had it up to 1.11, which scikit-rmt 2.1 still imports."""
    steps = np.arange(order) - order // 2
    weights = np.linalg.solve(np.vander(steps, increasing=True).T.astype(float), np.eye(order)[1])
    return sum(w * function(x + k * dx) for w, k in zip(weights, steps, strict=True)) / dx


def scikit_rmt(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(oracle("scipy.misc"), "derivative", derivative, raising=False)
    return oracle("skrmt.ensemble.spectral_law")


def test_the_law_is_that_of_scikit_rmt(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = scikit_rmt(monkeypatch)
    for s, shape in cases:
        beta = min(shape) / max(shape)
        x = s / np.median(s) * mp.median(beta)
        ours = mp.cdf(x, beta)
        assert ours == pytest.approx(theirs.MarchenkoPasturDistribution(ratio=beta).cdf(x**2), abs=1e-12)


def test_tracy_widom_is_that_of_scikit_rmt_to_the_stated_error(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = scikit_rmt(monkeypatch).TracyWidomDistribution(beta=1)
    levels = np.array([0.01, 0.05, 0.1, 0.5, 0.9, 0.95, 0.99])
    for u, x in zip(levels, theirs.ppf(levels), strict=True):
        assert mp.tracy_widom_quantile(float(u)) == pytest.approx(float(x), abs=0.017)
