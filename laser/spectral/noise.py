"""The noise level sigma from a spectrum, one estimator per published method.

Each takes singular values `s` (descending, float64, shape (p,)) and the matrix's shape (m, n) and returns sigma in
the unit of the weights. Each matches a statistic of the spectrum's bulk to the same statistic of the Marchenko-Pastur
law, so a few large signal values hardly move it. All are homogeneous (scaling W scales sigma), and 0 for a zero matrix.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from laser.spectral import marchenko_pastur as mp


def sigma_median(s: NDArray[np.float64], shape: tuple[int, int]) -> float:
    """median(s) / (m_b * sqrt(q)): Gavish and Donoho (2014), section III.E; breaks down at half signal."""
    _, q, beta = mp.aspect(shape)
    return float(np.median(s)) / (mp.median(beta) * q**0.5)


def sigma_iqr(s: NDArray[np.float64], shape: tuple[int, int]) -> float:
    """IQR(s) / ((q_b(.75) - q_b(.25)) * sqrt(q)): LaserRMT's estimator with the law's own constant."""
    _, q, beta = mp.aspect(shape)
    return _iqr(s) / (mp.interquartile_range(beta) * q**0.5)


def sigma_normal_iqr(s: NDArray[np.float64]) -> float:
    """IQR(s) / 1.349: LaserRMT's own estimate (rmt_laser.py), kept so that its models can be made again.

    1.349 is the interquartile range of a *normal* law, and no sqrt(q) appears, so this is no estimate of the
    entries' deviation: it is in the unit of singular values and biased by an amount that depends on the shape.
    """
    return _iqr(s) / 1.349


def _iqr(s: NDArray[np.float64]) -> float:
    low, high = np.quantile(s, [0.25, 0.75])  # linear interpolation, as in LaserRMT
    return float(high - low)
