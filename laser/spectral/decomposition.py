"""Singular values and truncations of one matrix, each with a certificate. The only caller of torch.linalg.

Two methods. `gram` (default): with A the tall one of W and W^T, G = A^T A is p x p and G = V diag(s^2) V^T, so s comes
from eigenvalues alone, and W_r = (A V_r) V_r^T, or A - (A V_c) V_c^T where the complement is the smaller. Shrinkage and
two-sided cuts are A V diag(g) V^T with other gains than 0 and 1 in a row (shrinkage.py), by the same products. `svd`:
plain `torch.linalg.svd` in float64 on the host, slow and independent: the reference, and the last rung of the ladder.

A Gram matrix squares the spectrum, so a value below sqrt(p * eps) * s_1 (1e-6 s_1 in float64 at p = 4096) is lost in
rounding: it is reported as 0 in float64. Thresholds of trained matrices lie far above that.

Memory: A is read in blocks of rows and only one block at a time is in float64; besides it there are G and V, p x p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from laser.errors import NumericalError, UsageError
from laser.spectral.devices import Device, full_precision, host_threads
from laser.spectral.shrinkage import Gains

T = TypeVar("T")

METHODS = ("gram", "svd")
# Rows per block: large enough for the product to run at full speed, 64 MiB in float64 at n = 4096. On MPS an inner
# dimension of 32767 or more is summed wrongly (pytorch issue 193487); this is far below.
BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Certificate:
    """What was measured of a truncation W_r of W; all dimensionless. g_i is 1 for a value kept and 0 for one removed.

    energy_kept: sum (g_i s_i)^2 / sum s_i^2
    residual: | ||W - W_r||_F - sqrt(sum ((1 - g_i) s_i)^2) | / ||W||_F, before W_r is rounded to its storage dtype
    orthogonality: max |V_r^T V_r - I| over the basis that was used
    tolerance: the largest residual that passes; derived from p and the dtype's eps
    """

    energy_kept: float
    residual: float
    orthogonality: float
    tolerance: float
    method: str


@dataclass(frozen=True)
class Truncation:
    matrix: torch.Tensor  # (m, n), in the dtype and on the device of the source matrix
    singular_values: NDArray[np.float64]  # (p,), of the source matrix
    certificate: Certificate


def check_storage(dtype: torch.dtype) -> None:
    """Raises UsageError unless the dtype is bf16, fp16, fp32 or fp64: eight-bit floats need their scales."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise UsageError(
            f"a matrix stored as {dtype} cannot be reduced: found no scales for it, and without them its values are "
            "not the weights; try the bf16 release of the model, or --exclude these matrices"
        )


def singular_values(W: torch.Tensor, device: Device, method: str = "gram") -> tuple[NDArray[np.float64], str]:
    """Singular values (p,) of W (m, n), float64, descending, and the method that gave them.

    Raises NumericalError for a NaN or Inf in W or when every rung of the ladder fails.
    """
    return _ladder(W, device, method, lambda step: _VALUES[step](W, device))


def truncate(W: torch.Tensor, rank: int | Gains, device: Device, method: str = "gram") -> Truncation:
    """The best approximation of W (m, n) of rank `rank` in Frobenius norm, certified (Eckart and Young 1936).

    With Gains instead of a rank, W with its singular values multiplied by them. Raises UsageError for a rank outside
    [0, p], NumericalError when no method meets the tolerance.
    """
    gains = Gains(rank) if isinstance(rank, int) else rank
    p = min(W.shape)
    if not (0 <= gains.above and 0 <= gains.below and gains.above + gains.below <= p):
        raise UsageError(f"rank {gains.above + gains.below} does not fit shape {tuple(W.shape)}; try 0 to {p}")
    return _ladder(W, device, method, lambda step: _certified(_TRUNCATE[step](W, gains, device)))[0]


def _ladder(W: torch.Tensor, device: Device, method: str, attempt: Callable[[str], T]) -> tuple[T, str]:
    """`method`, then the plain SVD where the factorisation fails or its certificate does."""
    check_storage(W.dtype)
    failures = []
    for step in dict.fromkeys((method, "svd")):
        pool = host_threads(min(W.shape)) if device.host_blas and step == "gram" else nullcontext()
        try:
            with full_precision(), pool:
                if not torch.isfinite(W).all():
                    raise NumericalError("the matrix holds NaN or Inf; nothing can be said of its spectrum")
                return attempt(step), step
        except (LinAlgError, np.linalg.LinAlgError, NumericalError) as error:
            failures.append((step, error))
    told = "; ".join(f"{step}: {error}" for step, error in failures)
    residual = next((e.residual for _, e in failures if isinstance(e, NumericalError)), None)
    raise NumericalError(f"no method gave a certified result ({told}); try --exclude this matrix", residual)


# --- gram -----------------------------------------------------------------------------------------------------------


def _tall(W: torch.Tensor) -> torch.Tensor:
    return W if W.shape[0] >= W.shape[1] else W.T


def _blocks(A: torch.Tensor, device: Device) -> Iterator[torch.Tensor]:
    for start in range(0, A.shape[0], BLOCK_ROWS):
        yield A[start : start + BLOCK_ROWS].to(device.torch_device).to(device.dtype)


def _gram(A: torch.Tensor, device: Device) -> torch.Tensor:
    """A^T A for tall A (q, p) -> (p, p); on the host only the lower triangle, which is all that LAPACK reads.

    The host uses SciPy's BLAS for everything: torch, NumPy and SciPy each bring a pool of threads that spin while they
    wait, and two of them on the same cores cost more than the arithmetic (LOG.md).
    """
    total = torch.zeros(A.shape[1], A.shape[1], dtype=device.dtype, device=device.torch_device)
    if device.host_blas:
        G = total.numpy().T  # Fortran order, without a copy
        (syrk,) = scipy.linalg.get_blas_funcs(("syrk",), (G,))
        for block in _blocks(A, device):
            G = syrk(1.0, block.numpy().T, beta=1.0, c=G, lower=True, overwrite_c=True)
        return torch.from_numpy(G)
    for block in _blocks(A, device):
        total.addmm_(block.T, block)
    return total


def _eigenvalues(G: torch.Tensor, device: Device) -> NDArray[np.float64]:
    """Ascending. SciPy's driver on the host: the same LAPACK call as torch's, 1.1 to 2 times as fast."""
    if device.host_eigensolver:
        values = scipy.linalg.eigh(
            G.cpu().numpy(), eigvals_only=True, driver="evd", overwrite_a=True, check_finite=False
        )
        return np.asarray(values, dtype=np.float64)
    return torch.linalg.eigvalsh(G).double().cpu().numpy()


def _eigenvectors(G: torch.Tensor, device: Device) -> tuple[NDArray[np.float64], torch.Tensor]:
    if device.host_eigensolver:
        values, vectors = scipy.linalg.eigh(G.cpu().numpy(), driver="evd", overwrite_a=True, check_finite=False)
        return np.asarray(values, dtype=np.float64), torch.from_numpy(vectors).to(device.torch_device)
    values, vectors = torch.linalg.eigh(G)
    return values.double().cpu().numpy(), vectors


def _to_singular_values(eigenvalues: NDArray[np.float64], dtype: torch.dtype) -> NDArray[np.float64]:
    if not np.isfinite(eigenvalues).all():
        raise NumericalError("the eigensolver returned NaN or Inf")
    descending = np.maximum(eigenvalues[::-1], 0.0)
    if dtype == torch.float64:  # below this it is rounding; in float32 the floor is too high to be a zero
        descending[descending <= len(descending) * np.finfo(np.float64).eps * descending[0]] = 0.0
    return np.sqrt(descending)


def _values_by_gram(W: torch.Tensor, device: Device) -> NDArray[np.float64]:
    return _to_singular_values(_eigenvalues(_gram(_tall(W), device), device), device.dtype)


@dataclass(frozen=True)
class _Raw:
    matrix: torch.Tensor  # (m, n), storage dtype of W
    singular_values: NDArray[np.float64]
    gains: NDArray[np.float64]  # (p,), in the order of the singular values
    distance: float  # ||W - W_r||_F before rounding
    orthogonality: float
    dtype: torch.dtype
    method: str


def _truncate_by_gram(W: torch.Tensor, wanted: Gains, device: Device) -> _Raw:
    A = _tall(W)
    eigenvalues, V = _eigenvectors(_gram(A, device), device)  # ascending
    s = _to_singular_values(eigenvalues, device.dtype)
    gains = wanted.of(s, (W.shape[0], W.shape[1]))
    kept, cut = np.flatnonzero(gains), np.flatnonzero(gains != 1)
    keep = len(kept) <= len(cut)  # else the complement is the smaller: W minus what goes
    basis, weights = _columns(V, kept, gains) if keep else _columns(V, cut, 1 - gains)
    orthogonality = _deviation_from_orthogonal(basis, device)
    out = torch.empty_like(W)
    out_tall, squared = _tall(out), 0.0
    for start, block in zip(range(0, A.shape[0], BLOCK_ROWS), _blocks(A, device), strict=True):
        part = _project(block, basis, weights, device)
        result, removed = (part, block - part) if keep else (block - part, part)
        squared += float(torch.sum(removed * removed))
        out_tall[start : start + BLOCK_ROWS] = result.to(W.dtype).to(W.device)
    return _Raw(out, s, gains, math.sqrt(squared), float(orthogonality), device.dtype, "gram")


def _columns(
    V: torch.Tensor, which: NDArray[np.intp], gains: NDArray[np.float64]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Eigenvectors (p, k) number `which` (descending; V is ascending) and their gains (k,), None if all are 1."""
    p, k = V.shape[0], len(which)
    if k and which[-1] - which[0] == k - 1:  # neighbours, as in every plain cut: a slice, without an index's copy
        basis, order = V[:, p - 1 - which[-1] : p - which[0]], which[::-1]
    else:  # transposed twice to keep Fortran order, which BLAS takes without a copy
        basis, order = V.T[torch.from_numpy(p - 1 - which).to(V.device)].T, which
    weights = gains[order]
    return basis, None if np.all(weights == 1) else torch.from_numpy(weights.copy()).to(V)


def _project(block: torch.Tensor, basis: torch.Tensor, weights: torch.Tensor | None, device: Device) -> torch.Tensor:
    """(block @ basis) * weights @ basis^T for block (rows, p), basis (p, k) and weights (k,), None for ones."""
    if basis.shape[1] == 0:
        return torch.zeros_like(block)
    if device.host_blas:
        B, V = block.numpy().T, basis.numpy()  # both in Fortran order, so BLAS copies nothing
        (gemm,) = scipy.linalg.get_blas_funcs(("gemm",), (B, V))
        inner = gemm(1.0, V, B, trans_a=True)  # (k, rows)
        if weights is not None:
            inner *= weights.numpy()[:, None]
        return torch.from_numpy(gemm(1.0, V, inner).T)
    inner = block @ basis
    return (inner if weights is None else inner * weights) @ basis.T


def _deviation_from_orthogonal(basis: torch.Tensor, device: Device) -> float:
    """max |V^T V - I| of basis V (p, k)."""
    k = basis.shape[1]
    if k == 0:
        return 0.0
    if device.host_blas:
        (syrk,) = scipy.linalg.get_blas_funcs(("syrk",), (basis.numpy(),))
        return float(np.abs(np.tril(syrk(1.0, basis.numpy(), trans=True, lower=True)) - np.eye(k)).max())
    return float((basis.T @ basis - torch.eye(k, dtype=basis.dtype, device=basis.device)).abs().max())


# --- plain SVD: the reference -----------------------------------------------------------------------------------------


def _values_by_svd(W: torch.Tensor, device: Device) -> NDArray[np.float64]:
    return torch.linalg.svdvals(W.cpu().double()).numpy()


def _truncate_by_svd(W: torch.Tensor, wanted: Gains, device: Device) -> _Raw:
    full = W.cpu().double()
    U, s, Vh = torch.linalg.svd(full, full_matrices=False)
    gains = wanted.of(s.numpy(), (W.shape[0], W.shape[1]))
    result = (U * (s * torch.from_numpy(gains))) @ Vh
    basis = Vh[torch.from_numpy(gains > 0)]
    eye = torch.eye(len(basis), dtype=torch.float64)
    orthogonality = float((basis @ basis.T - eye).abs().max()) if len(basis) else 0.0
    distance = float(torch.linalg.vector_norm(full - result))
    out = result.to(W.dtype).to(W.device)
    return _Raw(out, s.numpy(), gains, distance, orthogonality, torch.float64, "svd")


_VALUES = {"gram": _values_by_gram, "svd": _values_by_svd}
_TRUNCATE = {"gram": _truncate_by_gram, "svd": _truncate_by_svd}


def _certified(raw: _Raw) -> Truncation:
    """Compare what was removed with what the spectrum says should have been.

    By Weyl's inequality each computed eigenvalue of G is off by about eps * s_1^2, so the tail's sum of squares is off
    by at most delta = 8 * p * eps of ||W||_F^2, and its root by min(sqrt(delta), delta / (2 * tail)). The factor 8
    covers LAPACK's own modest constant. Gains between 0 and 1 only make the sum's terms smaller.
    """
    s, gains = raw.singular_values, raw.gains
    p, eps = len(s), torch.finfo(raw.dtype).eps
    total = float(np.sum(s**2))
    if total == 0.0:
        return Truncation(raw.matrix, s, Certificate(1.0, 0.0, raw.orthogonality, 0.0, raw.method))
    tail = math.sqrt(float(np.sum(((1 - gains) * s) ** 2)) / total)
    residual = abs(raw.distance / math.sqrt(total) - tail)
    delta = 8 * p * eps
    tolerance = min(math.sqrt(delta), delta / (2 * tail) if tail > 0 else math.inf)
    if not (residual <= tolerance and raw.orthogonality <= delta):
        raise NumericalError(
            f"certificate missed: residual {residual:.2e} (allowed {tolerance:.2e}), "
            f"orthogonality {raw.orthogonality:.2e} (allowed {delta:.2e})",
            residual,
        )
    energy = float(np.sum((gains * s) ** 2)) / total
    return Truncation(raw.matrix, s, Certificate(energy, residual, raw.orthogonality, tolerance, raw.method))
