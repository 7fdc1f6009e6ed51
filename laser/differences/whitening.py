"""Biwhitening: rows and columns scaled so that noise of known, unequal variances has a known edge.

Landa, Zhang and Kluger (2022): let E[N_ij] = 0 and E[N_ij^2] = V_ij, and let positive r (m,), c (n,) make every row and
column of r_i^2 V_ij c_j^2 have mean 1. Then the singular values of diag(r) N diag(c) follow the Marchenko-Pastur law
with sigma = 1. So the largest lies near sqrt(m) + sqrt(n), and nothing has to be estimated. r and c come from
Sinkhorn's iteration.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SWEEPS = 60  # of Sinkhorn's iteration at the most; variances of real matrices take 5 to 20
EVEN_ENOUGH = 1e-6  # of a mean to 1: the edge then is off by half of that


class Scales(NamedTuple):
    """Positive factors of rows, (m, 1), and columns, (1, n), float64."""

    rows: torch.Tensor
    columns: torch.Tensor

    def of(self, D: torch.Tensor) -> torch.Tensor:
        """D (m, n) with its rows and columns scaled."""
        return self.rows * D * self.columns

    def undo(self, D: torch.Tensor) -> torch.Tensor:
        return D / self.rows / self.columns


def biwhiten(V: torch.Tensor) -> Scales:
    """The scales that give the positive variances V (m, n), float64, means of 1 in all rows and columns."""
    mean = V.mean()
    V = V / mean  # variances of float32's subnormals are near the end of float64's range
    x, y = torch.ones(len(V), dtype=V.dtype, device=V.device), torch.ones(V.shape[1], dtype=V.dtype, device=V.device)
    for _ in range(SWEEPS):
        x = V.shape[1] / (V @ y)
        columns = (V.T @ x) / len(V)
        y_next = 1 / columns
        done = float((columns * y - 1).abs().max()) < EVEN_ENOUGH
        y = y_next
        if done:
            break
    unit = mean**-0.25  # to both sides alike
    return Scales(unit * x.sqrt()[:, None], unit * y.sqrt()[None])
