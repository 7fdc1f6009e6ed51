"""Numbers that describe a spectrum: how its energy is spread, how heavy its tail is. None of them knows a threshold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from laser.spectral.noise import Spectrum
from laser.spectral.unit import unit_of

ENERGIES = (0.5, 0.9, 0.95, 0.99)  # points of the energy curve
FEWEST = 3  # distinct values that a tail must have


@dataclass(frozen=True)
class Tail:
    """A power law density ~ x^-alpha fitted to the eigenvalues x = s^2 from `start` on.

    alpha: exponent, WeightWatcher's alpha; distance: Kolmogorov-Smirnov; count: eigenvalues in the tail
    """

    alpha: float
    distance: float
    start: float  # in squared units of s
    count: int


@dataclass(frozen=True)
class Description:
    """largest: s_1, in the unit of s;  norm: ||W||_F;  the ranks are numbers of singular values.

    stable_rank: ||W||_F^2 / s_1^2, 1 for rank one, p when all values are equal
    effective_rank: exp of the entropy of s / sum(s) (Roy and Vetterli 2007), between 1 and p
    energy_ranks: fewest values that hold each share in ENERGIES of the squared sum
    """

    largest: float
    norm: float
    stable_rank: float
    effective_rank: float
    energy_ranks: tuple[int, ...]
    tail: Tail | None  # None where fewer than FEWEST values are distinct and positive


def describe_spectrum(s: Spectrum) -> Description:
    """The numbers of singular values `s` (p,), descending. A zero matrix has ranks 0 and no tail."""
    u = unit_of(s)
    s = s / u
    energy = np.cumsum(s**2)
    if len(s) == 0 or energy[-1] == 0:
        return Description(0.0, 0.0, 0.0, 0.0, (0,) * len(ENERGIES), None)
    share, tail = s[s > 0] / s.sum(), fit_tail(s)
    # As in rules.py: not the bare product, or share 1 would miss the last value by rounding.
    ranks = np.searchsorted(energy, np.array(ENERGIES) * energy[-1] * (1 - 1e-15)) + 1
    return Description(
        largest=float(s[0]) * u,
        norm=float(energy[-1] ** 0.5) * u,
        stable_rank=float(energy[-1] / s[0] ** 2),
        effective_rank=float(np.exp(-np.sum(share * np.log(share)))),
        energy_ranks=tuple(int(r) for r in ranks),
        tail=tail and replace(tail, start=tail.start * u * u),
    )


def fit_tail(s: Spectrum) -> Tail | None:
    """The power law of the largest eigenvalues, its start chosen by the smallest Kolmogorov-Smirnov distance.

    Clauset, Shalizi and Newman (2009), equation 3.1, alpha = 1 + n / sum log(x / start), and section 3.3 for the start;
    agrees with the package `powerlaw`, on which WeightWatcher rests, and like it takes for the empirical law the share
    of the tail strictly below each value. O(p^2).
    """
    logs: NDArray[np.float64] = 2 * np.log(s[s > 0][::-1])  # rising, of the eigenvalues
    best = None
    sums = np.cumsum(logs[::-1])[::-1]  # sum of the logs from i on
    n = len(logs)
    for i in range(n - FEWEST + 1):
        if i and logs[i] == logs[i - 1]:
            continue
        count = n - i
        excess = sums[i] - count * logs[i]
        if excess <= 0:  # all that is left is one value, repeated
            break
        alpha = 1 + count / excess
        law = -np.expm1((1 - alpha) * (logs[i:] - logs[i]))
        distance = float(np.max(np.abs(law - np.arange(count) / count)))
        if best is None or distance < best.distance:
            best = Tail(float(alpha), distance, float(np.exp(logs[i])), count)
    return best
