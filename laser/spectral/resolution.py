"""How well a rank is determined: whether a singular value lies so near the threshold that another device could count it
on the other side.

The error of a value by the Gram matrix in a precision eps is at most E / (2 s_i) with E = 2 sqrt(p) eps s_1^2 (Weyl's
inequality with a rounding error that grows as sqrt(p), as independent ones do). Measured between float32 and float64 on
noise, on spikes of up to 80 times the median and on trained matrices, p = 64 to 1024: 0.05 to 1.3 sqrt(p) eps s_1^2
(LOG.md). In float64 that is 1e-13 of a value, and next to no value lies so near.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from laser.spectral.noise import Spectrum
from laser.spectral.permutation import TOLERANCE
from laser.spectral.rules import Cut, parse_rule
from laser.spectral.unit import unit_of

GROWTH = 2.0  # times sqrt(p) eps s_1^2, half of it reserve


def precision_of(device: str, method: str) -> float:
    """eps of the arithmetic behind a record's singular values: of its device's label, and of its method."""
    single = device.endswith("float32") and method != "svd"
    return torch.finfo(torch.float32 if single else torch.float64).eps


def squared_error(s: Spectrum, eps: float) -> float:
    """E, the error of any s_i^2, for singular values `s` (p,), falling."""
    return GROWTH * math.sqrt(len(s)) * eps * float(s[0]) ** 2 if len(s) else 0.0


def value_errors(s: Spectrum, eps: float) -> Spectrum:
    """(p,) errors of the values themselves: E / (2 s_i), and sqrt(E) where a value is smaller than that."""
    E = squared_error(s, eps)
    return E / (2 * np.maximum(s, math.sqrt(E) / 2)) if E else np.zeros_like(s)


def at_threshold(spec: str, s: Spectrum, cut: Cut, eps: float) -> str:
    """ "" where the rank that rule `spec` found in `s` (p,) holds in any precision as good as `eps`, or a reason that
    starts with "at the threshold".

    A threshold that was estimated from the spectrum is off too, as much as the median is; one of `parallel` as much as
    its Lanczos iteration. A share of the energy is a sum: independent errors of p squares. Fixed ranks are never near.
    """
    u = unit_of(s)
    s, threshold = s / u, None if cut.threshold is None else cut.threshold / u
    E, p, name = squared_error(s, eps), len(s), spec.partition(":")[0]
    if not E:
        return ""
    if threshold is None:
        if name != "energy" or not 0 < cut.rank <= p:
            return ""
        energy, error = np.cumsum(s**2), math.sqrt(p) * E
        goal = parse_rule(spec)[1] * energy[-1]
        near = [r for r in (cut.rank - 1, cut.rank) if 0 < r < p and abs(energy[r - 1] - goal) <= error]
        share = error / energy[-1]
        return f"at the threshold: rank {near[0]} has the energy, give or take {share:.1e} of it" if near else ""
    errors, middle = value_errors(s, eps), float(np.median(s))
    relative = (
        2 * TOLERANCE if name == "parallel" else E / (2 * max(middle, math.sqrt(E) / 2) * max(middle, math.sqrt(E)))
    )
    reach = errors + relative * threshold
    close = np.flatnonzero(np.abs(s - threshold) <= reach)
    if not len(close):
        return ""
    values = "1 value lies" if len(close) == 1 else f"{len(close)} values lie"
    return f"at the threshold: {values} within its error, {float(reach[close[0]]) * u:.1e}"
