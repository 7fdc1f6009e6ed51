"""The method `projector`: a truncation by matrix products alone. It is for devices without LAPACK (Apple MPS).

With A (q, p) the tall one of W and W^T, G = A^T A and tau between s_r and s_{r+1}, let B = G - tau^2 I:

    sign B = V diag(+-1) V^T,  P = (I + sign B) / 2 projects on the r leading right singular vectors,  W_r = A P.

The sign comes from a composition of odd polynomials of degree five, three products for each. Each is the best one for
the interval that the one before it left over (Polar Express: Amsel, Persson, Musco and Gower 2025, arXiv 2505.16932,
algorithm 1).

Certificate: X approximates the sign, so p - ||X||_F^2 = sum (1 - x_i^2) counts what has not come to +-1 and is 0 for a
projector. The trace of P would not do: +0.35 and -0.35 cancel in it. An eigenvalue of B closer to 0 than about
eps * ||B|| is not resolved in the precision of the product; it is seen, and the ladder goes on to eigenvectors.

Memory: G, X and two intermediate results, all p x p, on the device; no basis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from laser.errors import NumericalError
from laser.spectral.certificate import Factors, Raw
from laser.spectral.devices import Device
from laser.spectral.gram import BLOCK_ROWS, blocks, gram, moved, scalar, spectrum_of, tall, to_host
from laser.spectral.shrinkage import Gains

Quintic = tuple[float, float, float]  # a, b, c of a x + b x^3 + c x^5

NEWTON_SCHULZ: Quintic = (15 / 8, -10 / 8, 3 / 8)  # the limit of the sequence; cubic convergence near +-1
POLISH = 2  # Newton-Schulz steps at the end: from 1e-2 to 1e-6 to the precision of the product
# Polar Express, section 4.4: the argument is divided by this, so that rounding cannot leave [-1, 1].
POLAR_SAFETY = 1.01
CUSHION = 0.02407327424182761  # ditto: no interval is taken wider than this, or the polynomial would swing too far
SETTLED = 1e-2  # the sequence ends when the interval is [1 - this, 1 + this]
UNRESOLVED = 0.05  # alarm on p - ||X||_F^2: one pair off by 0.013 each; measured 1e-4 where all is resolved (docs/log)


@dataclass(frozen=True)
class Sign:
    """X (p, p), approximately sign(G - tau^2 I).

    unresolved: p - ||X||_F^2, about 0 if every eigenvalue is +-1
    positive: trace of (I + X) / 2, the number of eigenvalues above tau^2 if all are resolved
    products: how many p x p x p products it took
    """

    X: torch.Tensor
    unresolved: float
    positive: float
    products: int


def best_quintic(low: float, high: float) -> Quintic:
    """The odd polynomial of degree 5 that is nearest to 1 on [low, high] in the largest error (Remez exchange).

    Four unknowns, a, b, c and the error E, equal up to sign at low, q, r and high; q < r are where the derivative
    vanishes and the next guess of where the error is largest.
    """
    if low / high >= 1 - 5e-6:  # the equations become singular; their limit is Newton-Schulz
        a, b, c = NEWTON_SCHULZ
        return a / high, b / high**3, c / high**5
    q, r, last = (3 * low + high) / 4, (low + 3 * high) / 4, math.inf
    a, b, c = NEWTON_SCHULZ
    for _ in range(100):
        points = np.array([low, q, r, high])
        rows = np.column_stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]])
        a, b, c, error = np.linalg.solve(rows, np.ones(4))
        if abs(last - error) <= 1e-15:
            break
        last = error
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return float(a), float(b), float(c)


@lru_cache(maxsize=64)
def sign_steps(low: float, safety: float = POLAR_SAFETY, cushion: float = CUSHION) -> tuple[Quintic, ...]:
    """Quintics whose composition takes [low, 1] to [1 - SETTLED, 1 + SETTLED], the last ones Newton-Schulz.

    Not the plain greedy sequence: `safety` keeps rounding from leaving the interval and `cushion` keeps the polynomial
    tame where the interval is wide, at the price of a recentring factor. The interval that a step leaves over is
    [l, 2 - l]; its upper end is taken from the polynomial without the safety factor, and is therefore a bound.
    """
    u, found = 1.0, []
    l_now = low
    while not found or 1 - l_now > SETTLED:
        inner = max(l_now, cushion * u)
        a, b, c = best_quintic(inner, u)
        if inner > l_now:  # recentre: the true interval is wider than the one that was optimised

            def value(x: float, a: float = a, b: float = b, c: float = c) -> float:
                return a * x + b * x**3 + c * x**5

            scale = 2 / (value(l_now) + value(u))
            a, b, c = scale * a, scale * b, scale * c
        if 1 - (a * l_now + b * l_now**3 + c * l_now**5) > SETTLED:  # the last one goes without
            a, b, c = a / safety, b / safety**3, c / safety**5
        found.append((a, b, c))
        l_now = a * l_now + b * l_now**3 + c * l_now**5
        u = 2 - l_now
    return tuple(found) + (NEWTON_SCHULZ,) * POLISH


def matrix_sign(G: torch.Tensor, tau: float, gap: float | None = None) -> Sign:
    """sign(G - tau^2 I) of a symmetric G (p, p), in its dtype and on its device, by products alone.

    gap: lower bound on the distance of tau^2 from the nearest eigenvalue, in the unit of G; None for the finest one
    that the dtype can resolve (`finest`). A smaller gap than that is seen in `unresolved`.
    """
    p = G.shape[0]
    B = (G + G.T) / 2
    B.diagonal().sub_(tau * tau)
    size = scalar(B.abs().max())
    if not 0 < size < math.inf:  # not `<=`, or NaN would pass
        raise NumericalError(f"the shifted Gram matrix has the largest entry {size}; no projector can be made of it")
    B = B / size  # else its powers may leave float32
    # A bound from above, not an estimate: ||B||_2 <= ||B^4||_F^(1/4). Power iteration, from below, let 7 of 48 runs
    # diverge (docs/log); the 1-norm is free and loose by about sqrt(p).
    square = B @ B
    scale = scalar(torch.linalg.vector_norm(square @ square)) ** 0.25
    X, products = B / scale, 2
    del B, square
    low = finest(p, G.dtype)
    if gap is not None:
        low = min(max(gap / (size * scale), low), 0.5)
    for a, b, c in sign_steps(_coarse(low)):
        Y = X @ X
        Z = torch.addmm(Y, Y, Y, beta=b, alpha=c)
        del Y
        X = torch.addmm(X, X, Z, beta=a)
        del Z
        X = (X + X.T) / 2  # rounding is not symmetric, and what is not symmetric grows
        products += 3
    # Row sums on the device, their sum in float64 on the host: p is subtracted from it.
    rows = to_host(torch.sum(X * X, dim=1))
    unresolved = p - float(np.sum(rows))
    return Sign(X, unresolved, (p + float(np.sum(to_host(torch.diagonal(X))))) / 2, products)


def finest(p: int, dtype: torch.dtype) -> float:
    """The smallest gap around tau^2 that can be resolved, relative to ||G - tau^2 I||.

    Rounding moves an eigenvalue by about 0.4 * eps / sqrt(p) of the norm, as it averages over an eigenvector (measured,
    docs/log). The interval starts 40 times above that, or noise would itself be driven to +-1 and look resolved; for a
    large matrix at eps, since eigenvalues are not known better.
    """
    return torch.finfo(dtype).eps * max(1.0, 16 / math.sqrt(p))


def _coarse(low: float) -> float:
    """Rounded down to a power of two, so that a handful of sequences serves all matrices."""
    return 2.0 ** math.floor(math.log2(low))


def factors_by_projector(W: torch.Tensor, device: Device, values: NDArray[np.float64] | None = None) -> Factors:
    """As factors_by_gram, but no eigenvectors: `cut` takes a plain rank. `values`: singular values (p,) of W where they
    are known; else eigenvalues are taken, on the host where the device has no LAPACK."""
    G = gram(W, device)
    if values is None:
        values = spectrum_of(G, device)
    s = values
    return Factors(s, lambda wanted: _cut_by_projector(W, G, s, wanted, device))


def _cut_by_projector(W: torch.Tensor, G: torch.Tensor, s: NDArray[np.float64], wanted: Gains, device: Device) -> Raw:
    if not wanted.plain:
        raise NumericalError("shrinkage and two-sided cuts need eigenvectors")
    p, rank = len(s), wanted.above
    gains = wanted.of(s, (W.shape[0], W.shape[1]))
    out = torch.empty_like(W)
    out_tall, squared, off = tall(out), 0.0, 0.0
    X = None
    if 0 < rank < p:
        sign = resolved_sign(G, s, rank)
        X, off = sign.X, abs(sign.unresolved) / 4  # sum of |y^2 - y| over the eigenvalues y = (1 + x) / 2 of P
    for start, block in blocks(W, device):
        if X is None:  # nothing or everything: no direction has to be found
            result = block if rank else torch.zeros_like(block)
        else:
            result = torch.addmm(block, block, X, beta=0.5, alpha=0.5)  # A P = (A + A X) / 2
        removed = block - result
        squared += scalar(torch.sum(removed * removed))
        out_tall[start : start + BLOCK_ROWS] = moved(result, W.device, W.dtype)
    return Raw(out, s, gains, math.sqrt(squared), off, device.dtype, limit=UNRESOLVED / 4)


def resolved_sign(G: torch.Tensor, s: NDArray[np.float64], rank: int) -> Sign:
    """The sign with `rank` eigenvalues at +1. Raises NumericalError where G's precision cannot resolve that."""
    above, below = float(s[rank - 1]) ** 2, float(s[rank]) ** 2
    tau, gap = math.sqrt((above + below) / 2), (above - below) / 2
    if not gap > finest(len(s), G.dtype) * max(float(s[0]) ** 2 - tau * tau, tau * tau):
        raise NumericalError(
            f"unresolved: s_r and s_r+1 differ by {gap / max(tau, 1e-300):.1e}, too little to tell apart"
        )
    sign = matrix_sign(G, tau, gap)
    if not abs(sign.unresolved) <= UNRESOLVED:
        raise NumericalError(f"unresolved: p - ||X||^2 is {sign.unresolved:.2e} (allowed {UNRESOLVED:g})")
    if not abs(sign.positive - rank) <= UNRESOLVED:
        raise NumericalError(f"the projector has trace {sign.positive:.3f}, expected {rank}")
    return sign
