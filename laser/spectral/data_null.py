"""The null in the metric of the data: W with its entries permuted meets the same inputs.

Only its largest value is asked for. Where inputs are so wide that C is not known whole, it is B B^T + diag(rest).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from laser.spectral.data_metric import Metric, check_matrix, shrinkage_in_metric
from laser.spectral.devices import Device, full_precision, on_device_or_host
from laser.spectral.gram import to_host
from laser.spectral.permutation import (
    DENSE,
    Product,
    largest_eigenvalue,
    largest_singular_value,
    permuted,
)
from laser.spectral.unit import in_unit


def null_in_metric(W: torch.Tensor, metric: Metric, draws: int, device: Device) -> NDArray[np.float64]:
    """(draws,) largest singular values of permuted W (m, n) times C^(1/2), one per seed 0, 1, ...: what noise of this
    size would do to these inputs."""
    W, metric, u = check_matrix(W, metric)

    def tops(where: Device) -> NDArray[np.float64]:
        top = _top(W, metric, where)
        return u * np.array([top(permuted(W, seed)) for seed in range(draws)])

    return on_device_or_host(tops, device)


def both_nulls(
    W: torch.Tensor, metric: Metric, draws: int, device: Device
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`null_largest` and `null_in_metric` of the same permutations, whose shuffling takes longer than either."""
    W, metric, u = check_matrix(W, metric)

    def tops(where: Device) -> NDArray[np.float64]:
        top, found = _top(W, metric, where), np.empty((2, draws))
        for seed in range(draws):
            P = permuted(W, seed)
            found[:, seed] = largest_singular_value(P, where), top(P)
        return u * found

    plain, data = on_device_or_host(tops, device)
    return plain, data


def _top(W: torch.Tensor, metric: Metric, device: Device) -> Callable[[torch.Tensor], float]:
    """The largest singular value of P C^(1/2), for permutations P (m, n) of W, by Lanczos iteration on P C P^T, which
    is never formed."""
    C, c = (None, 1.0) if metric.form == "outputs" else in_unit(metric.moment)  # and so are the inputs' squares
    C, B, rest = (None if x is None else x.float().to(device.torch_device) for x in (C, metric.sketch, metric.rest))
    keep, add = shrinkage_in_metric(W, metric, device)  # as the matrix itself is measured
    add /= c

    def answer(z: torch.Tensor) -> torch.Tensor:
        """C z."""
        if C is not None:
            return C @ z if C.ndim == 2 else C * z
        assert B is not None and rest is not None  # the form "outputs"
        return B @ (B.T @ z) + rest * z

    def top(P: torch.Tensor) -> float:
        P = P.float().to(device.torch_device)

        def product(x: NDArray[np.float64]) -> NDArray[np.float64]:
            column = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32).reshape(-1)).to(P.device)
            with full_precision():
                z = P.T @ column  # (n,)
                return to_host(P @ (keep * answer(z) + add * z))

        return float(np.sqrt(max(_largest(product, W.shape[0]), 0.0) * c))

    return top


def _largest(product: Product, side: int) -> float:
    """As `largest_eigenvalue`, for zero and for tiny matrices as well, which an iteration cannot do."""
    if side <= DENSE:
        dense = np.stack([product(row) for row in np.eye(side)])
        return float(np.linalg.eigvalsh((dense + dense.T) / 2)[-1])
    return largest_eigenvalue(product, side) if np.any(product(np.ones(side))) else 0.0
