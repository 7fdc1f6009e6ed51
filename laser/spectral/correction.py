"""The best correction of low rank for a copy of a matrix, by the data.

Q stands for W (m, n): quantised, pruned or reduced. With D = W - Q, x the inputs of W and C = E[x x^T],

    E ||(D - B A) x||^2 = ||(D - B A) C^(1/2)||_F^2

is least over all B (m, r) and A (r, n) for B = U and A = U^T D. U (m, r) are the leading left singular vectors of D
C^(1/2), and what is left is the tail of the squared singular values (EoRA, arXiv 2410.21271, whose C^(-1/2) cancels;
see data_metric.py). With C = I this is the truncated SVD of D. The first r columns of B, with the first r rows of A,
are the best of rank r, so that one factorisation serves every rank up to its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from laser.errors import NumericalError, UsageError
from laser.spectral.certificate import SAFETY
from laser.spectral.data_metric import (
    ByData,
    computed,
    gram_in_metric,
    inputs_in_metric,
    mean_square,
    orthonormal,
    threads,
    to_values,
)
from laser.spectral.devices import Device
from laser.spectral.factorise import check_storage
from laser.spectral.gram import eigenvectors, moved
from laser.spectral.unit import in_unit

FACTOR_DTYPE = torch.bfloat16  # of B and A: 16 bits, and a range that no update leaves


@dataclass(frozen=True)
class Correction:
    """B (m, k) and A (k, n), as they are stored, on the host. Errors are relative to E||W x||^2.

    outputs: E||W x||^2 / m, the mean square of an output
    predicted, measured: (k + 1,) E||(D - B_r A_r) x||^2 for r = 0 to k: by the spectrum, and by the factors as stored
    residual: the largest difference of the two before the factors were rounded; tolerance: what passes
    """

    B: torch.Tensor
    A: torch.Tensor
    outputs: float
    predicted: NDArray[np.float64]
    measured: NDArray[np.float64]
    residual: float
    orthogonality: float
    tolerance: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class MovedScales:
    """By what a copy's outputs, rows (m,) and never 0, and its inputs (n,) are multiplied, against those of W."""

    rows: torch.Tensor
    inputs: torch.Tensor


def inputs_alike(n: int) -> ByData:
    """The metric of inputs that are alike in all directions: the plain Frobenius norm."""
    return ByData("diagonal", torch.ones(n, dtype=torch.float64), n)


def correct(
    W: torch.Tensor, Q: torch.Tensor, rank: int, metric: ByData, device: Device, scales: MovedScales | None = None
) -> Correction:
    """The best correction of Q (m, n) towards W (m, n) of rank up to `rank`, certified.

    scales: of Q, and so of B and A; errors are those of W's own outputs.
    It is of lower rank where the difference shows fewer directions. Raises UsageError where the moments are of the
    outputs of W, which say nothing of those of a difference; NumericalError for NaN or Inf, or a missed certificate.
    """
    for X in (W, Q):
        check_storage(X.dtype)
    metric.check(W)
    if metric.form == "outputs":
        raise UsageError("its moments are of its outputs, and a correction needs those of its inputs; try --text")
    Q = Q.double()
    if scales is not None:
        Q = Q / scales.rows[:, None] * scales.inputs
    D, u = in_unit(W.double() - Q)
    W, w = in_unit(W)

    def solve(at: Device) -> Correction:
        difference, wide = (moved(X, at.torch_device, torch.float64) for X in (D, W))
        outputs = mean_square(wide, metric, at)
        G, half, factor = _gram(difference, metric, at)
        with threads(at, len(G)):
            squares, vectors = eigenvectors(G, at)
        s = to_values(squares, metric)
        p, k = len(s), min(rank, int(np.count_nonzero(s)))
        U = vectors(np.arange(p - k, p)).flip(1)  # the leading one first
        if half is not None:
            U = orthonormal((half @ U) / torch.from_numpy(s[:k].copy()).to(U.device), at)
        eye = torch.eye(k, dtype=U.dtype, device=U.device)
        orthogonality = float((U.T @ U - eye).abs().max()) if k else 0.0
        whole = float(torch.trace(G))
        predicted = whole - np.concatenate(([0.0], np.cumsum(s[:k] ** 2)))

        def left(B: torch.Tensor, A: torch.Tensor) -> NDArray[np.float64]:
            """||(D - B_r A_r) C^(1/2)||_F^2 for every r, by leading blocks of B^T B and A C A^T."""
            AC = A * metric.moment.to(A.device) if metric.form == "diagonal" else _times(A, factor, metric, at)
            cross = ((B.T @ difference) * AC).sum(1).cumsum(0)
            own = ((B.T @ B) * (A @ AC.T)).cumsum(0).cumsum(1).diagonal()
            return whole + np.concatenate(([0.0], (own - 2 * cross).cpu().numpy()))

        A = U.T @ difference
        exact = left(U, A)
        scale = max(whole, np.finfo(np.float64).tiny)
        residual, tolerance = float(np.abs(exact - predicted).max()) / scale, SAFETY * p * np.finfo(np.float64).eps
        if not (residual <= tolerance and orthogonality <= tolerance):
            raise NumericalError(
                f"certificate of the correction missed: residual {residual:.2e}, orthogonality {orthogonality:.2e}, "
                f"allowed {tolerance:.2e}; try --device cpu",
                residual,
            )
        rows, inputs = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        if scales is not None:
            rows, inputs = scales.rows[:, None], scales.inputs
        rows, inputs = rows.to(U.device), inputs.to(U.device)
        B, A = U * rows, torch.where(inputs == 0, 0.0, A / inputs)
        # Powers of two make the norms of a column of B and a row of A alike, so that 16 bits of any kind hold both.
        balance = torch.exp2(torch.round(torch.log2((A.norm(dim=1) / B.norm(dim=0)).clamp_min(1e-300)) / 2))
        B, A = (B * balance).to(FACTOR_DTYPE), (A / balance[:, None]).to(FACTOR_DTYPE)
        measured = left(B.double() / rows, A.double() * inputs)
        total = outputs * (w / u) ** 2 if outputs > 0 else 1.0  # in D's unit
        relative = [np.maximum(x, 0.0) / total for x in (predicted, measured)]
        return Correction(
            (B * u).cpu(),
            A.cpu(),
            outputs * w * w / len(W),
            relative[0],
            relative[1],
            residual,
            orthogonality,
            tolerance,
        )

    return computed(solve, W, metric, device)


def _gram(D: torch.Tensor, metric: ByData, at: Device) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(p, p) with the squared singular values of D C^(1/2) as eigenvalues; where D is tall also D F, and F (n, n).

    Any F with F F^T = C has the same left singular vectors. Cholesky's takes a tenth of the time of the symmetric root,
    which is left for a C without full rank.
    """
    m, n = D.shape
    if metric.form != "full" or m <= n:
        return gram_in_metric(D, metric, at)
    F, failed = torch.linalg.cholesky_ex(inputs_in_metric(D, metric, at))
    if int(failed):
        return gram_in_metric(D, metric, at)
    half = D @ F
    G = half.T @ half
    return (G + G.T) / 2, half, F


def _times(A: torch.Tensor, factor: torch.Tensor | None, metric: ByData, at: Device) -> torch.Tensor:
    """A C (r, n), by the factor that the Gram matrix was made with, where there is one."""
    return (A @ factor) @ factor.T if factor is not None else A @ inputs_in_metric(A, metric, at)
