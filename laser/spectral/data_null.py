"""The null in the metric of the data: W with its entries permuted meets the same inputs.

Only its largest value is asked for. Where inputs are so wide that C is not known whole, it is B B^T + diag(rest).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from laser.spectral.data_metric import Metric, check_matrix, shrinkage_in_metric
from laser.spectral.devices import Device, full_precision, on_device_or_host
from laser.spectral.gram import to_host
from laser.spectral.permutation import DENSE, Product, largest_eigenvalue, permuted


def null_in_metric(W: torch.Tensor, metric: Metric, draws: int, device: Device) -> NDArray[np.float64]:
    """(draws,) largest singular values of permuted W (m, n) times C^(1/2), one per seed 0, 1, ...: what noise of this
    size would do to these inputs. Lanczos iteration on W C W^T, which is never formed."""
    check_matrix(W, metric)
    return on_device_or_host(lambda where: _null(W, metric, draws, where), device)


def _null(W: torch.Tensor, metric: Metric, draws: int, device: Device) -> NDArray[np.float64]:
    tops = np.zeros(draws)
    C = {"full": metric.moment, "diagonal": metric.moment, "outputs": None}[metric.form]
    C, B, rest = (None if x is None else x.float().to(device.torch_device) for x in (C, metric.sketch, metric.rest))
    keep, add = shrinkage_in_metric(W, metric, device)  # as the matrix itself is measured
    for seed in range(draws):
        P = permuted(W, seed).to(device.torch_device)

        def product(x: NDArray[np.float64], P: torch.Tensor = P) -> NDArray[np.float64]:
            column = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32).reshape(-1)).to(P.device)
            with full_precision():
                z = P.T @ column  # (n,)
                if C is not None:
                    answer = C @ z if C.ndim == 2 else C * z
                else:
                    assert B is not None and rest is not None  # the form "outputs"
                    answer = B @ (B.T @ z) + rest * z
                return to_host(P @ (keep * answer + add * z))

        tops[seed] = _largest(product, W.shape[0])
    return np.sqrt(np.maximum(tops, 0.0))


def _largest(product: Product, side: int) -> float:
    """As `largest_eigenvalue`, for zero and for tiny matrices as well, which an iteration cannot do."""
    if side <= DENSE:
        dense = np.stack([product(row) for row in np.eye(side)])
        return float(np.linalg.eigvalsh((dense + dense.T) / 2)[-1])
    return largest_eigenvalue(product, side) if np.any(product(np.ones(side))) else 0.0
