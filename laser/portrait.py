"""portrait: what a picture of one spectrum shows, computed once, so that reports only draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from laser.errors import UsageError
from laser.plan import DEFAULT_ESTIMATOR
from laser.spectra import Spectra
from laser.spectral.noise import estimate, fit_noise
from laser.spectral.rules import apply_rule, parse_rule

CURVE = 60  # points of the fitted law's curve


@dataclass(frozen=True)
class Portrait:
    """A matrix's spectrum beside the law of noise that was fitted to it. Levels are in the unit of the weights."""

    model: str
    name: str
    rows: int
    columns: int
    values: NDArray[np.float64]  # (p,), descending
    curve_x: NDArray[np.float64]  # (CURVE,), from the lower edge to the upper
    curve: NDArray[np.float64]  # (CURVE,), values expected per unit of s: its integral is the size of the bulk
    lower_edge: float
    upper_edge: float
    sigma: float
    distance: float  # Kolmogorov-Smirnov, of the bulk from the law
    level: float
    rule: str
    threshold: float | None
    rank: int


def portrait(spectra: Spectra, name: str, rule: str = "mp-edge") -> Portrait:
    """The picture of matrix `name`. Raises UsageError for a matrix that was not scanned, with names that were."""
    if name not in spectra.values:
        near = [n for n in spectra.values if name in n][:3] or list(spectra.values)[:3]
        raise UsageError(f"{name!r} was not scanned in {spectra.source.name}; try one of {', '.join(near)}")
    matrix = next(m for m in spectra.matrices if m.name == name)
    s, shape = spectra.values[name], (matrix.shape[0], matrix.shape[1])
    estimator = parse_rule(rule)[0].estimator or DEFAULT_ESTIMATOR
    fit, noise = fit_noise(s, shape, estimator), estimate(s, shape, estimator)
    cut = apply_rule(rule, s, shape, spectra.nulls.get(name))
    lower, upper = noise.lower_edge(shape), noise.upper_edge(shape)
    # Angles, not equal steps: the law rises like a square root at both edges, and at 0 it need not vanish.
    x = (lower + upper) / 2 - (upper - lower) / 2 * np.cos(np.linspace(0, math.pi, CURVE))
    share = noise.cdf(x, shape) if noise.sigma > 0 else np.zeros(CURVE)
    density = np.gradient(share, x) if upper > lower else np.zeros(CURVE)
    return Portrait(
        model=spectra.source.name,
        name=name,
        rows=shape[0],
        columns=shape[1],
        values=s,
        curve_x=x,
        curve=np.maximum(density, 0.0) * fit.bulk,
        lower_edge=lower,
        upper_edge=upper,
        sigma=fit.sigma,
        distance=fit.distance,
        level=fit.level,
        rule=rule,
        threshold=cut.threshold,
        rank=cut.rank,
    )
