"""The method `gram`: eigenvalues and eigenvectors of the Gram matrix of the smaller side.

With A (q, p) the tall one of W and W^T, G = A^T A = V diag(s^2) V^T: s comes from eigenvalues alone, and
W_r = (A V_r) V_r^T, or A - (A V_c) V_c^T where the complement is the smaller. Shrinkage and two-sided cuts are
A V diag(g) V^T with other gains than 0 and 1 in a row (shrinkage.py), by the same products.

A Gram matrix squares the spectrum, so a value below sqrt(p * eps) * s_1 (1e-6 s_1 in float64 at p = 4096) is lost in
rounding: it is reported as 0 in float64. Thresholds of trained matrices lie far above that.

Memory: A is read in blocks of rows and only one block at a time is in float64; besides it there are G and V, p x p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from laser.errors import NumericalError
from laser.spectral.certificate import SAFETY, Factors, Raw
from laser.spectral.devices import Device, products_in_float32, sent
from laser.spectral.shrinkage import Gains

# Rows per block: large enough for the product to run at full speed, 64 MiB in float64 at n = 4096. On MPS an inner
# dimension of 32767 or more is summed wrongly (pytorch issue 193487); this is far below.
BLOCK_ROWS = 2048
# On tensor cores sums are cut off, not rounded, after every 16 products, and that adds up: over 512 rows to 1e-6 of the
# squares. From p = 1024 on that is little beside the error that is stated of eigenvalues in float32 (spectrum.py).
TENSOR_ROWS, TENSOR_SIDE = 512, 1024


def values_by_gram(W: torch.Tensor, device: Device) -> NDArray[np.float64]:
    return spectrum_of(gram(W, device), device)


def factors_by_gram(W: torch.Tensor, device: Device, values: NDArray[np.float64] | None = None) -> Factors:
    """values: as the projector takes them, and of no use here."""
    G = gram(W, device)
    trace = trace_of(G)
    eigenvalues, V = eigenvectors(G, device)  # ascending
    s = to_singular_values(eigenvalues, device.dtype, trace)
    return Factors(s, lambda wanted: _cut_by_gram(W, V, s, wanted, device))


def _cut_by_gram(W: torch.Tensor, V: torch.Tensor, s: NDArray[np.float64], wanted: Gains, device: Device) -> Raw:
    gains = wanted.of(s, (W.shape[0], W.shape[1]))
    kept, cut = np.flatnonzero(gains), np.flatnonzero(gains != 1)
    keep = len(kept) <= len(cut)  # else the complement is the smaller: W minus what goes
    basis, weights = _columns(V, kept, gains) if keep else _columns(V, cut, 1 - gains)
    orthogonality = _deviation_from_orthogonal(basis, device)
    out = torch.empty_like(W)
    out_tall, squared = tall(out), 0.0
    for start, block in blocks(W, device):
        part = _project(block, basis, weights, device)
        result, removed = (part, block - part) if keep else (block - part, part)
        squared += scalar(torch.sum(removed * removed))
        out_tall[start : start + BLOCK_ROWS] = moved(result, W.device, W.dtype)
    return Raw(out, s, gains, math.sqrt(squared), orthogonality, device.dtype)


# --- between device and host: the only places where numbers leave the device ------------------------------------------


def moved(x: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """x on `device` and in `dtype`. The narrower of the two dtypes is what is copied: there is less of it, and float64
    never reaches a device that has none."""
    return sent(x.to(dtype), device) if x.dtype.itemsize > dtype.itemsize else sent(x, device).to(dtype)


def scalar(scalar: torch.Tensor) -> float:
    """The value of a tensor with one element."""
    return float(scalar)


def to_host(vector: torch.Tensor) -> NDArray[np.float64]:
    """The vector in float64 on the host, and converted there: not every device has float64."""
    return vector.cpu().numpy().astype(np.float64)


# --- products ---------------------------------------------------------------------------------------------------------


def tall(W: torch.Tensor) -> torch.Tensor:
    return W if W.shape[0] >= W.shape[1] else W.T


def blocks(
    W: torch.Tensor, device: Device, dtype: torch.dtype | None = None, rows: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """First row and rows (up to `rows`, p) of the tall A, on the device and in `dtype`; by default up to BLOCK_ROWS, in
    the device's."""
    A, wide = tall(W), W.shape[0] < W.shape[1]
    dtype, rows = dtype or device.dtype, rows or BLOCK_ROWS
    for start in range(0, A.shape[0], rows):
        stop = start + rows
        if wide and not device.host_blas:
            # Sent as it lies in memory and turned on the device: the other way round the host would turn it.
            yield start, moved(W[:, start:stop], device.torch_device, dtype).T
        else:
            yield start, moved(A[start:stop], device.torch_device, dtype)


def gram(W: torch.Tensor, device: Device) -> torch.Tensor:
    """A^T A for the tall A (q, p) of W -> (p, p).

    The host uses NumPy's BLAS and LAPACK for everything. torch, NumPy and SciPy each bring a pool of threads that spin
    while they wait, and two of them on the same cores cost more than the arithmetic. Of NumPy and SciPy only NumPy lets
    go of Python's lock meanwhile, without which two workers are as slow as one (LOG.md).
    """
    p = min(W.shape)
    total = torch.zeros(p, p, dtype=device.dtype, device=device.torch_device)
    if device.host_blas:
        G, part = total.numpy(), np.empty((p, p), dtype=total.numpy().dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # `trace_of` says so better
            for _, block in blocks(W, device):
                A = block.numpy()
                G += np.matmul(A.T, A, out=part)  # NumPy sees that both are one, and does half the work
        return total
    if p >= TENSOR_SIDE and products_in_float32(device, W.dtype):  # and nothing is converted
        for _, block in blocks(W, device, W.dtype, TENSOR_ROWS):
            total += torch.mm(block.T, block, out_dtype=torch.float32)
        return total
    for _, block in blocks(W, device):
        total.addmm_(block.T, block)
    return total


# --- eigenproblem -----------------------------------------------------------------------------------------------------


def trace_of(G: torch.Tensor) -> float:
    """The trace of a Gram matrix. Raises NumericalError where it is not finite.

    Then a weight is not finite, or its square leaves the precision, and LAPACK need not come back from such a matrix.
    """
    trace = float(np.sum(to_host(torch.diagonal(G))))
    if not np.isfinite(trace):
        raise NumericalError("the Gram matrix is not finite")
    return trace


def spectrum_of(G: torch.Tensor, device: Device) -> NDArray[np.float64]:
    """Singular values (p,), float64, descending, from a Gram matrix."""
    trace = trace_of(G)
    return to_singular_values(eigenvalues(G, device), device.dtype, trace)


def eigenvalues(G: torch.Tensor, device: Device) -> NDArray[np.float64]:
    """Eigenvalues, ascending. By NumPy on the host: the same LAPACK call as torch's, 1.1 to 2 times as fast."""
    if device.host_eigensolver:
        return np.linalg.eigvalsh(G.cpu().numpy()).astype(np.float64)
    return to_host(torch.linalg.eigvalsh(G))


def eigenvectors(G: torch.Tensor, device: Device) -> tuple[NDArray[np.float64], torch.Tensor]:
    if device.host_eigensolver:
        values, vectors = np.linalg.eigh(G.cpu().numpy())
        return values.astype(np.float64), torch.from_numpy(vectors).to(device.torch_device)
    values, vectors = torch.linalg.eigh(G)
    return to_host(values), vectors


def to_singular_values(eigenvalues: NDArray[np.float64], dtype: torch.dtype, trace: float) -> NDArray[np.float64]:
    """Singular values (p,), descending: roots of ascending eigenvalues (p,) of a Gram matrix of this trace.

    Raises NumericalError where they are not finite or do not add up to the trace, the one law of all eigenvalues that
    costs nothing to check.
    """
    if not np.isfinite(eigenvalues).all():
        raise NumericalError("the eigensolver returned NaN or Inf")
    p, missing = len(eigenvalues), abs(float(np.sum(eigenvalues)) - trace)
    if missing > SAFETY * p * torch.finfo(dtype).eps * trace:
        raise NumericalError(f"the eigenvalues miss the trace of the Gram matrix by {missing / trace:.2e} of it")
    descending = np.maximum(eigenvalues[::-1], 0.0)
    if dtype == torch.float64:  # below this it is rounding; in float32 the floor is too high to be a zero
        descending[descending <= p * np.finfo(np.float64).eps * descending[0]] = 0.0
    return np.sqrt(descending)


# --- cutting ----------------------------------------------------------------------------------------------------------


def _columns(
    V: torch.Tensor, which: NDArray[np.intp], gains: NDArray[np.float64]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Eigenvectors (p, k) number `which` (descending; V is ascending) and their gains (k,), None if all are 1."""
    p, k = V.shape[0], len(which)
    if k and which[-1] - which[0] == k - 1:  # neighbours, as in every plain cut: a slice, without an index's copy
        basis, order = V[:, p - 1 - which[-1] : p - which[0]], which[::-1]
    else:
        basis, order = torch.index_select(V, 1, torch.from_numpy(p - 1 - which).to(V.device)), which
    weights = gains[order].astype(np.float64 if V.dtype == torch.float64 else np.float32)
    return basis, None if np.all(weights == 1) else torch.from_numpy(weights).to(V.device)


def _project(block: torch.Tensor, basis: torch.Tensor, weights: torch.Tensor | None, device: Device) -> torch.Tensor:
    """(block @ basis) * weights @ basis^T for block (rows, p), basis (p, k) and weights (k,), None for ones."""
    if basis.shape[1] == 0:
        return torch.zeros_like(block)
    if device.host_blas:
        V = basis.numpy()
        inner = block.numpy() @ V  # (rows, k)
        if weights is not None:
            inner *= weights.numpy()
        return torch.from_numpy(inner @ V.T)
    inner = block @ basis
    return (inner if weights is None else inner * weights) @ basis.T


def _deviation_from_orthogonal(basis: torch.Tensor, device: Device) -> float:
    """max |V^T V - I| of basis V (p, k)."""
    k = basis.shape[1]
    if k == 0:
        return 0.0
    if device.host_blas:
        return float(np.abs(basis.numpy().T @ basis.numpy() - np.eye(k)).max())
    return scalar((basis.T @ basis - torch.eye(k, dtype=basis.dtype, device=basis.device)).abs().max())
