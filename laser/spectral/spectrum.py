"""Describe a spectrum in numbers.

They say how its energy is spread, how heavy its tail is, how far the entries' tails move the edge of noise, and how
near a singular value lies to the threshold of a rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from laser.spectral import marchenko_pastur as mp
from laser.spectral.devices import HOST, Device, on_device_or_host
from laser.spectral.factorise import IN_FLOAT64, Doubt
from laser.spectral.gram import moved, scalar, to_host
from laser.spectral.noise import Shape, Spectrum
from laser.spectral.permutation import TOLERANCE
from laser.spectral.rules import Cut, apply_rule, by_data, draws_needed, parse_rule
from laser.spectral.unit import in_unit, unit_of

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

    @property
    def alpha_error(self) -> float:
        """Standard error of alpha (Clauset, Shalizi and Newman 2009, equation 3.2)."""
        return (self.alpha - 1) / self.count**0.5


@dataclass(frozen=True)
class Description:
    """One spectrum in numbers. The ranks are numbers of singular values.

    largest: s_1, in the unit of s
    norm: ||W||_F
    stable_rank: ||W||_F^2 / s_1^2, 1 for rank one, p when all values are equal
    effective_rank: exp of the entropy of s / sum(s) (Roy and Vetterli 2007), between 1 and p
    energy_ranks: fewest values that hold each share in ENERGIES of the squared sum
    entropy: WeightWatcher's, of s^2 / sum(s^2) over the log of the numerical rank; None for numerical rank 1
    rank_loss: values that are zero to the precision of float32 weights, as NumPy's matrix_rank counts them
    """

    largest: float
    norm: float
    stable_rank: float
    effective_rank: float
    energy_ranks: tuple[int, ...]
    tail: Tail | None  # None where fewer than FEWEST values are distinct and positive
    entropy: float | None
    rank_loss: int

    @property
    def alpha_weighted(self) -> float | None:
        """alpha log10(s_1^2), in the unit of s (Martin, Peng and Mahoney 2021)."""
        return self.tail and self.tail.alpha * 2 * math.log10(self.largest)


def log_alpha_norm(s: Spectrum, alpha: float) -> float:
    """log10 of the sum of (s^2)^alpha over singular values `s` (p,) in their own unit, the largest taken out of it."""
    powers = np.sum((s / s[0]) ** (2 * alpha))
    return float(2 * alpha * np.log10(s[0]) + np.log10(powers))


def describe_spectrum(s: Spectrum, shape: Shape | None = None) -> Description:
    """The numbers of singular values `s` (p,), descending. A zero matrix has ranks 0 and no tail.

    shape: (m, n) of the matrix, whose longer side the tolerance of `rank_loss` grows with; None: a square one.
    """
    u = unit_of(s)
    s = s / u
    energy = np.cumsum(s**2)
    if len(s) == 0 or energy[-1] == 0:
        return Description(0.0, 0.0, 0.0, 0.0, (0,) * len(ENERGIES), None, None, len(s))
    share, tail = s[s > 0] / s.sum(), fit_tail(s)
    # As in rules.py: not the bare product, or share 1 would miss the last value by rounding.
    ranks = np.searchsorted(energy, np.array(ENERGIES) * energy[-1] * (1 - 1e-15)) + 1
    numerical = int(np.count_nonzero(s > s[0] * max(shape or (len(s),)) * np.finfo(np.float32).eps))
    squares = s[s > 0] ** 2 / energy[-1]
    squares = squares[squares > 0]  # of those that are squares at all
    return Description(
        largest=float(s[0]) * u,
        norm=float(energy[-1] ** 0.5) * u,
        stable_rank=float(energy[-1] / s[0] ** 2),
        effective_rank=float(np.exp(-np.sum(share * np.log(share)))),
        energy_ranks=tuple(int(r) for r in ranks),
        tail=tail and replace(tail, start=tail.start * u * u),
        entropy=float(-np.sum(squares * np.log(squares)) / np.log(numerical)) if numerical > 1 else None,
        rank_loss=len(s) - numerical,
    )


def fit_tail(s: Spectrum) -> Tail | None:
    """The power law of the largest eigenvalues, its start chosen by the smallest Kolmogorov-Smirnov distance.

    Clauset, Shalizi and Newman (2009), equation 3.1, alpha = 1 + n / sum log(x / start), and section 3.3 for the start.
    Agrees with the package `powerlaw`, on which WeightWatcher rests. Like it, takes for the empirical law the share of
    the tail strictly below each value. O(p^2).
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


# --- entries ----------------------------------------------------------------------------------------------------------
#
# What the entries of a matrix say that its spectrum hides: how heavy their tails are, and how far that moves the
# edge.
#
# The bulk of noise is Marchenko-Pastur's whatever the law of the entries; its edge is so only in the limit. With
# excess kurtosis k the edge of an m x n matrix lies higher by the relative amount k / (2 sqrt(m n)), in first order.
# Derivation: the fourth cumulant k / q^2 of entries of variance 1 / q adds one term to the self-consistent equations
# of the two diagonal blocks of the resolvent of [[0, W], [W^T, 0]]. The same cumulant expansion gives the shift of
# sparse sample covariance matrices in Hwang, Lee and Schnelli (2019). Let beta = p / q, e = k / q, and w the product
# of the blocks' two Stieltjes transforms. Then:
#
#     z^2 w = (1 + w + e w^2) (1 + beta w + beta e w^2)
#
# Without e the edge is at w = 1 / sqrt(beta), z = 1 + sqrt(beta). There the term adds e z^2 / sqrt(beta) to z^2,
# which is the relative amount k / sqrt(p q) of the squared edge.

ENTRIES_AT_A_TIME = 1 << 22  # on an accelerator, in its precision
CACHED = 1 << 16  # entries at a time on the host: what is made of them stays in the cache
ROW = 256  # entries that are summed in float32

# A shift by a tenth of a Tracy-Widom unit turns 5 % of false finds into 6; Gaussian entries show 0.005 at 576 x 192 and
# less at larger shapes, Laplace entries 0.2 to 0.7 (docs/log).
# Signal has heavy tails of its own (a product of two Gaussian vectors has kurtosis 6), so with signal this is a warning
# and no estimate.
HEAVY = 0.1


def excess_kurtosis(W: torch.Tensor, device: Device = HOST) -> float:
    """E x^4 / (E x^2)^2 - 3 over the entries of W, moments about zero, as the noise's law has them; 0 for no noise.

    0 for Gaussian entries, 3 for Laplace's. On an accelerator in its own dtype, as long as its memory lasts: the host
    alone would take longer there than the eigenvalues do. Entries are scaled, so that no fourth power underflows.
    """
    W, _ = in_unit(W)  # it has no unit itself
    return on_device_or_host(
        lambda where: _kurtosis_on_host(W.cpu()) if where.host_blas else _kurtosis_on_device(W, where), device
    )


def _kurtosis_on_device(W: torch.Tensor, device: Device) -> float:
    """On an accelerator, which is waited for once.

    In its unit W's largest entry lies within 2^-20 and 2^20: its fourth power is a float32, and so is the sum of all.
    An entry whose fourth power is none is too small to count.
    """
    flat, sums = W.detach().reshape(-1), []
    for start in range(0, len(flat), ENTRIES_AT_A_TIME):
        block = flat[start : start + ENTRIES_AT_A_TIME]
        squares = moved(block, device.torch_device, device.dtype)
        squares = squares * squares
        sums += [torch.sum(squares), torch.sum(squares.mul_(squares))]
    totals = to_host(torch.stack(sums)) if sums else np.zeros(2)
    second, fourth = float(np.sum(totals[::2])), float(np.sum(totals[1::2]))
    return fourth * len(flat) / second**2 - 3 if second else 0.0


def _kurtosis_on_host(W: torch.Tensor) -> float:
    """One pass: rows of ROW entries in float32, their sums in float64; off by 2e-8, and by 2e-7 with an outlier.

    Weights in float64 stay in it. `in_unit` leaves the largest entry within 2^-20 and 2^20, so that its fourth power is
    a float32; an entry whose fourth power is none is too small to count.
    """
    flat = W.detach().reshape(-1)
    single = torch.float64 if W.dtype == torch.float64 else torch.float32
    second = fourth = 0.0
    for start in range(0, len(flat), CACHED):
        squares = flat[start : start + CACHED].to(single, copy=True)
        squares.mul_(squares)
        if missing := -len(squares) % ROW:  # of the last ones
            squares = torch.nn.functional.pad(squares, (0, missing))
        rows = squares.view(-1, ROW)
        second += scalar(torch.sum(torch.sum(rows, dim=1), dtype=torch.float64))
        fourth += scalar(torch.sum(torch.linalg.vecdot(rows, rows), dtype=torch.float64))
    return fourth * len(flat) / second**2 - 3 if second else 0.0


def edge_shift(kurtosis: float, shape: Shape) -> float:
    """How far entries of this excess kurtosis move the squared edge, in units of the Tracy-Widom law's scale.

    One unit is 0.8 standard deviations of the largest squared singular value of noise (Johnstone 2001, theorem 1.1).
    """
    p, q, _ = mp.aspect(shape)
    centre, scale = mp.tracy_widom_scale(shape)
    return kurtosis / (p * q) ** 0.5 * centre / scale


# --- how well a rank is determined ------------------------------------------------------------------------------------
#
# How well a rank is determined: whether a singular value lies so near the threshold that another device could count
# it on the other side.
#
# The error of a value by the Gram matrix in a precision eps is at most E / (2 s_i) with E = 2 sqrt(p) eps s_1^2
# (Weyl's inequality with a rounding error that grows as sqrt(p), as independent ones do). Measured between float32
# and float64 on noise, on spikes of up to 80 times the median and on trained matrices, p = 64 to 1024: 0.05 to 1.3
# sqrt(p) eps s_1^2 (docs/log). In float64 that is 1e-13 of a value, and next to no value lies so near.

GROWTH = 2.0  # times sqrt(p) eps s_1^2, half of it reserve


def precision_of(device: str, method: str, step: str = "") -> float:
    """eps of the arithmetic behind a record's singular values: of its device's label and method, and of the step of the
    ladder that gave them, if that was another."""
    double = method == "svd" or step in IN_FLOAT64
    single = device.split()[1:2] == ["float32"] and not double
    return torch.finfo(torch.float32 if single else torch.float64).eps


def squared_error(s: Spectrum, eps: float) -> float:
    """E, the error of any s_i^2, for singular values `s` (p,), falling."""
    return GROWTH * math.sqrt(len(s)) * eps * float(s[0]) ** 2 if len(s) else 0.0


def value_errors(s: Spectrum, eps: float) -> Spectrum:
    """(p,) errors of the values themselves: E / (2 s_i), and sqrt(E) where a value is smaller than that."""
    E = squared_error(s, eps)
    return E / (2 * np.maximum(s, math.sqrt(E) / 2)) if E else np.zeros_like(s)


def doubt_by(rules: Sequence[str], shape: Shape, null: Spectrum) -> Doubt:
    """What tells whether the ranks that `rules` find in a spectrum are sure in its precision.

    shape: (m, n) of the matrix; null: as `apply_rule` takes it. A rule in the metric of the data, or one that asks for
    more permutations than there are, has no say.
    """
    asked = [rule for rule in rules if not by_data(rule) and draws_needed(rule) <= len(null)]

    def doubt(s: Spectrum, eps: float) -> str:
        found = (at_threshold(rule, s, apply_rule(rule, s, shape, null), eps) for rule in asked)
        return next(filter(None, found), "")

    return doubt


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
