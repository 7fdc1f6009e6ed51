"""Second moments from little: from fewer inputs than dimensions (shrinkage), or from a few directions (a sketch)."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

NOISE = 1e-6  # of a sketch's largest value: below it float32 products of the inputs are rounding


def shrinkage(S: torch.Tensor, fourth: float, tokens: int, target: torch.Tensor) -> tuple[float, float]:
    """(1 - a, a mu) of (1 - a) S + a mu T: Ledoit and Wolf (2004), section 3.2, for a second moment S and T (k, k).

    mu = <S, T> / <T, T>; a = min(1, b / d) with b = (E||z||^4 - ||S||^2) / tokens, the variance of S, and
    d = ||S - mu T||^2, its distance from the target. T = I is theirs; for outputs y = W x, T = W W^T is what inputs
    without any structure would give. A zero S stays as it is.
    """
    mu = float((S * target).sum() / (target * target).sum().clamp_min(1e-300))
    distance = float(((S - mu * target) ** 2).sum())
    variance = max(fourth - float((S * S).sum()), 0.0) / max(tokens, 1)
    a = min(1.0, variance / distance) if distance > 0 else 0.0
    return 1 - a, a * mu


def own_directions(x: torch.Tensor) -> torch.Tensor:
    """(n, k) orthonormal: what some inputs x (k, n), float64, span, each counted the same however loud it is.

    As test matrix of `nystrom` inputs find what is loud among them, as a step of a power iteration would: on real
    moments the largest value comes out within 0.1 % where random directions lost 7 (LOG.md).
    """
    loud = x.norm(dim=1, keepdim=True)
    return torch.from_numpy(np.linalg.qr((x / torch.where(loud > 0, loud, 1.0)).T.numpy())[0])


def nystrom(image: torch.Tensor, test: torch.Tensor, diagonal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C as B B^T + diag(rest) from its `image` C Omega (n, k), the `test` matrix Omega (n, k) and its diagonal (n,).

    B (n, k) is Nystrom's approximation (Halko, Martinsson and Tropp 2011, algorithm 5.5), which is never over C; `rest`
    is what it leaves of the diagonal. The largest values of C, on which noise's largest answer rests, are in B.
    """
    core = test.T @ image
    values, found = scipy.linalg.eigh(((core + core.T) / 2).numpy(), driver="evd", check_finite=False)
    keep = values > NOISE * max(values[-1], 0.0)
    B = image @ torch.from_numpy(found[:, keep] / np.sqrt(values[keep]))
    return B, (diagonal - B.square().sum(1)).clamp_min(0.0)
