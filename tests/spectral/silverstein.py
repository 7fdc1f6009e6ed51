"""The Marchenko-Pastur law for noise on inputs of any second moment C: Silverstein's equation.

Let W (m, n) have i.i.d. entries of mean 0 and standard deviation 1, and let t_1..t_n be the eigenvalues of C. As m and
n grow, the eigenvalues of W C W^T / n spread by a law whose Stieltjes transform v(z), Im z > 0, solves (Silverstein
1995, equation 1.4, with m in the place of the companion's dimension)

    z = -1 / v + (1 / n) sum_j t_j / (1 + (m / n) t_j v),

Im v > 0; the density at x is Im v(x + i0) / pi. For C = I it is the law of marchenko_pastur.py. Here x is a singular
value of W C^(1/2) in the unit sigma * sqrt(n), so an eigenvalue is x^2. The singular values in the data's
metric are checked against it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from laser.errors import NumericalError

Array = NDArray[np.float64]

NEWTON = 60  # steps at most; from a neighbour some five are enough
SETTLED = 1e-7  # relative step; at an edge of the law two roots meet, and half of the digits is all there is
CLOSE = 1e-6  # Im z / Re z: the law is smoothed by a millionth of itself


def stieltjes(z: NDArray[np.complex128], population: Array, ratio: float) -> NDArray[np.complex128]:
    """v(z) for each z (k,), Im z > 0. population: (n,) eigenvalues of C; ratio: m / n.

    From far above the real line, where v = -1 / z, down to z by halving Im z, with Newton's method at each height: the
    branch with Im v > 0 is followed and never guessed. Raises NumericalError where it is lost.
    """
    t = population[None, :]
    height = max(float(population.max(initial=0.0)) * (1 + ratio) * 4, float(np.abs(z).max())) * 4 + 1e-300
    v: NDArray[np.complex128] = np.asarray(-1 / (z.real + 1j * height), dtype=np.complex128)
    while True:
        now = z.real + 1j * np.maximum(z.imag, height)
        v = _newton(v, now, t, ratio)
        if np.all(height <= z.imag):
            return v
        height /= 2


def _newton(v: NDArray[np.complex128], z: NDArray[np.complex128], t: Array, ratio: float) -> NDArray[np.complex128]:
    step = v
    for _ in range(NEWTON):
        denominator = 1 + ratio * t * v[:, None]
        residual = -1 / v + np.mean(t / denominator, axis=1) - z
        slope = 1 / v**2 - ratio * np.mean((t / denominator) ** 2, axis=1)
        step = residual / slope
        # A step may not leave the upper half plane, or it would find the other branch.
        factor = np.ones(len(v))
        for _ in range(40):
            out = (v - factor * step).imag <= 0
            if not out.any():
                break
            factor = np.where(out, factor / 2, factor)
        v = v - factor * step
        if np.all(np.abs(step) <= SETTLED * np.abs(v)):
            return v
    raise NumericalError(
        f"Silverstein's equation was not solved in {NEWTON} steps at {z[np.argmax(np.abs(step))]:.3g}; try a "
        "population without its largest eigenvalues"
    )


def cdf(x: Array, population: Array, ratio: float, points: int = 1000) -> Array:
    """Share of the min(m, n) nonzero singular values of noise at or below x (k,), in the unit sigma * sqrt(n).

    The density is integrated over `points` levels, evenly spaced in the logarithm from a tenth of the least x to over
    the largest value that noise can reach. Under the lowest it falls as 1 / sqrt(eigenvalue), as it does at m = n.
    """
    top = (float(population.max()) * ratio) ** 0.5 + float(population.mean()) ** 0.5 * 4 + float(np.max(x))
    eigenvalues = np.geomspace(max(float(np.min(x)), 1e-6 * top) / 10, top * 1.5, points) ** 2
    density = stieltjes(eigenvalues * (1 + 1j * CLOSE), population, ratio).imag / np.pi
    mass = np.cumsum(np.diff(eigenvalues) * (density[1:] + density[:-1]) / 2)
    mass = np.concatenate([[0.0], mass]) + 2 * eigenvalues[0] * density[0]
    return np.interp(x, np.sqrt(eigenvalues), mass / mass[-1])


def distance(s: Array, population: Array, ratio: float, points: int = 1000) -> float:
    """Kolmogorov-Smirnov distance of singular values s (p,), in the unit sigma * sqrt(n), from the law."""
    ordered = np.sort(s)
    law, steps = cdf(ordered, population, ratio, points), np.arange(len(s) + 1) / len(s)
    return float(max(np.abs(law - steps[1:]).max(), np.abs(law - steps[:-1]).max()))
