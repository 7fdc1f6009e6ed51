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
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from laser.errors import NumericalError
from laser.spectral import eigen
from laser.spectral.certificate import SAFETY, Factors, Raw
from laser.spectral.devices import Device, products_in_float32, sent
from laser.spectral.openblas import find_openblas
from laser.spectral.shrinkage import Gains

# Rows per block: large enough for the product to run at full speed, 64 MiB in float64 at n = 4096. On MPS an inner
# dimension of 32767 or more is summed wrongly (pytorch issue 193487); this is far below.
BLOCK_ROWS = 2048
# On tensor cores sums are cut off, not rounded, after every 16 products, and that adds up: over 512 rows to 1e-6 of the
# squares. From p = 1024 on that is little beside the error that is stated of eigenvalues in float32 (spectrum.py).
TENSOR_ROWS, TENSOR_SIDE = 512, 1024
MIRRORED = 512  # columns of a triangle that are turned at a time, so that both sides lie in the cache
# Numbers (k,) in ascending order of eigenvalues -> those eigenvectors (p, k), on the device.
EigenvectorsOf = Callable[[NDArray[np.intp]], torch.Tensor]


def values_by_gram(W: torch.Tensor, device: Device) -> NDArray[np.float64]:
    return spectrum_of(gram(W, device), device)


def factors_by_gram(W: torch.Tensor, device: Device, values: NDArray[np.float64] | None = None) -> Factors:
    """values: as the projector takes them, and of no use here."""
    G = gram(W, device)
    trace = trace_of(G)
    eigenvalues, vectors = eigenvectors(G, device)  # ascending
    s = to_singular_values(eigenvalues, device.dtype, trace)
    return Factors(s, lambda wanted: _cut_by_gram(W, vectors, s, wanted, device))


def _cut_by_gram(
    W: torch.Tensor, vectors: EigenvectorsOf, s: NDArray[np.float64], wanted: Gains, device: Device
) -> Raw:
    gains = wanted.of(s, (W.shape[0], W.shape[1]))
    kept, cut = np.flatnonzero(gains), np.flatnonzero(gains != 1)
    keep = len(kept) <= len(cut)  # else the complement is the smaller: W minus what goes
    which, factor = (kept, gains) if keep else (cut, 1 - gains)
    basis = vectors(len(s) - 1 - which[::-1])
    weights = _gain_weights(factor[which[::-1]], basis)
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
    """A^T A for the tall A (q, p) of W -> (p, p), in the device's precision.

    In float64 also for weights of 16 bits, whose products float32 holds exactly: it does not hold their sums, and the
    stated error of float64 would be off by seven digits (docs/log).
    """
    p = min(W.shape)
    total = torch.zeros(p, p, dtype=device.dtype, device=device.torch_device)
    if device.host_blas:
        _gram_on_host(W, device, total.numpy())
        return total
    if p >= TENSOR_SIDE and products_in_float32(device, W.dtype):  # and nothing is converted
        for _, block in blocks(W, device, W.dtype, TENSOR_ROWS):
            total += torch.mm(block.T, block, out_dtype=torch.float32)
        return total
    for _, block in blocks(W, device):
        total.addmm_(block.T, block)
    return total


def _gram_on_host(W: torch.Tensor, device: Device, G: NDArray[Any]) -> None:
    """G = A^T A, in the place of zeros (p, p), by the BLAS that NumPy computes with.

    torch, NumPy and SciPy each bring a pool of threads that spin while they wait, and two of them on the same cores
    cost more than the arithmetic. Of NumPy and SciPy only NumPy lets go of Python's lock meanwhile, without which two
    workers are as slow as one (docs/log). OpenBLAS itself adds to G, where NumPy needs a third square and a pass.
    """
    p = len(G)
    library = find_openblas() if p >= eigen.SMALLEST_SIDE else None
    part = None if library else np.empty_like(G)
    with np.errstate(over="ignore", invalid="ignore"):  # `trace_of` says so better
        for _, block in blocks(W, device):
            A = block.numpy()
            if library:
                library.add_gram(A, G)
            else:
                G += np.matmul(A.T, A, out=part)  # NumPy sees that both are one, and does half the work
    for start in range(0, p, MIRRORED) if library else ():
        stop = start + MIRRORED
        square = G[start:stop, start:stop]
        square += np.triu(square, 1).T
        G[stop:, start:stop] = G[start:stop, stop:].T


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
    """Eigenvalues (p,), float64, ascending. On the host by the device's route (eigen.py)."""
    if device.host_eigensolver:
        return eigen.values_route(len(G), device.routes)(G.cpu().numpy())
    return to_host(torch.linalg.eigvalsh(G))


def eigenvectors(G: torch.Tensor, device: Device) -> tuple[NDArray[np.float64], EigenvectorsOf]:
    """Eigenvalues as above, and what gives the eigenvectors with given numbers, on the device."""
    if device.host_eigensolver:
        found = eigen.vectors_route(len(G), device.routes)(G.cpu().numpy())
        return found.values, lambda which: torch.from_numpy(found.vectors(which)).to(device.torch_device)
    values, V = torch.linalg.eigh(G)
    return to_host(values), lambda which: _columns(V, which)


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


def _columns(V: torch.Tensor, which: NDArray[np.intp]) -> torch.Tensor:
    """As eigen.columns, on the device."""
    if eigen.neighbours(which):
        return V[:, which[0] : which[-1] + 1]
    return torch.index_select(V, 1, torch.from_numpy(which).to(V.device))


def _gain_weights(gains: NDArray[np.float64], basis: torch.Tensor) -> torch.Tensor | None:
    """The gains (k,) of the columns of `basis` (p, k), in its precision and where it lies; None if all are 1."""
    if np.all(gains == 1):
        return None
    return torch.from_numpy(gains.astype(np.float64 if basis.dtype == torch.float64 else np.float32)).to(basis.device)


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
