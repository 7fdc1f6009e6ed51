"""Parallel analysis: the largest singular value of a matrix once its structure is destroyed.

Permuting the entries keeps their distribution, heavy tails and all, and destroys everything that rank reduction could
want to keep (Horn 1965, Dobriban 2020). Only the largest singular value is needed, so Lanczos iteration replaces a
factorisation: some forty products with W against p^3.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from laser.errors import NumericalError, UsageError
from laser.spectral.devices import Device, full_precision, on_device_or_host
from laser.spectral.gram import moved, tall, to_host
from laser.spectral.unit import in_unit

Product = Callable[[NDArray[np.float64]], NDArray[np.float64]]
PERMUTATIONS = ("entries", "rows")
SMALL_SIDE = 16  # up to this p a factorisation is cheaper than an iteration, which needs p > 2 anyway
VECTORS = 12  # of Lanczos: as many products as with 20 for a permuted matrix, and 13 for 21 in the data's metric
TOLERANCE = 1e-6  # relative, of the squared value; the null's own spread is p^(-2/3), 4e-3 at p = 4096


def permuted(W: torch.Tensor, seed: int, kind: str = "entries") -> torch.Tensor:
    """W (m, n) with its entries in random order, over the matrix or within each row (`rows`); float32, as float64 W.

    `rows` keeps each row's variance and is the null of noise whose rows differ. The same seed gives the same order.
    Raises UsageError for another kind.
    """
    if kind not in PERMUTATIONS:
        raise UsageError(f"no permutation is called {kind!r}; try one of {', '.join(PERMUTATIONS)}")
    random = np.random.default_rng(seed)
    # NumPy's shuffle: seeded the same on every platform, and in place. float32 holds bf16, fp16 and fp32 exactly.
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    values = np.array(W.detach().cpu().to(wide).numpy(), order="C")
    if kind == "entries":
        random.shuffle(values.reshape(-1))
    else:
        random.permuted(values, axis=1, out=values)
    return torch.from_numpy(values)


def largest_singular_value(W: torch.Tensor, device: Device) -> float:
    """s_1 of W (m, n), to a relative 1e-6 or so (Lanczos on the Gram matrix, never formed; a fixed start vector).

    Raises NumericalError where the iteration does not settle.
    """
    W, u = in_unit(W)
    return on_device_or_host(lambda where: _largest(W, where), device) * u


def _largest(W: torch.Tensor, device: Device) -> float:
    A = moved(tall(W), device.torch_device, torch.float32)  # (q, p)
    p = A.shape[1]
    if not A.any():  # Lanczos would have no direction to start in
        return 0.0
    if p <= SMALL_SIDE:
        small = to_host(A)
        return float(np.sqrt(max(np.linalg.eigvalsh(small.T @ small)[-1], 0.0)))

    def product(x: NDArray[np.float64]) -> NDArray[np.float64]:
        column = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32).reshape(p)).to(A.device)
        with full_precision():
            return to_host(A.T @ (A @ column))

    return float(np.sqrt(max(largest_eigenvalue(product, p), 0.0)))


def largest_eigenvalue(product: Product, side: int) -> float:
    """The largest eigenvalue of the symmetric matrix, not 0, whose `product` with a vector (side,) is given.

    To TOLERANCE, by Lanczos iteration from a fixed start. Raises NumericalError where it does not settle.
    """
    start = np.random.default_rng(0).standard_normal(side)
    operator = LinearOperator((side, side), matvec=product, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    try:  # SciPy's stubs take the default 0 for the type of tol
        value = eigsh(operator, k=1, v0=start, ncv=VECTORS, tol=TOLERANCE, return_eigenvectors=False)  # pyright: ignore
    except ArpackError as error:
        raise NumericalError(f"the largest singular value did not settle ({error}); try --device cpu") from error
    return float(value[0])


def null_largest(W: torch.Tensor, draws: int, device: Device) -> NDArray[np.float64]:
    """(draws,) largest singular values of W (m, n) with its entries permuted, one per seed 0, 1, ..."""
    return np.array([largest_singular_value(permuted(W, seed), device) for seed in range(draws)])
