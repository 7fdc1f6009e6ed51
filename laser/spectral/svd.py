"""The method `svd`: plain `torch.linalg.svd` in float64 on the host. Slow and independent of every other method, so it
is the reference, and the last step of the ladder."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from laser.spectral.certificate import Factors, Raw
from laser.spectral.devices import Device
from laser.spectral.shrinkage import Gains


def values_by_svd(W: torch.Tensor, device: Device) -> NDArray[np.float64]:
    return torch.linalg.svdvals(W.double()).numpy()


def factors_by_svd(W: torch.Tensor, device: Device) -> Factors:
    full = W.double()
    U, s, Vh = torch.linalg.svd(full, full_matrices=False)

    def cut(wanted: Gains) -> Raw:
        gains = wanted.of(s.numpy(), (W.shape[0], W.shape[1]))
        result = (U * (s * torch.from_numpy(gains))) @ Vh
        basis = Vh[torch.from_numpy(gains > 0)]
        eye = torch.eye(len(basis), dtype=torch.float64)
        orthogonality = float((basis @ basis.T - eye).abs().max()) if len(basis) else 0.0
        distance = float(torch.linalg.vector_norm(full - result))
        return Raw(result.to(W.dtype), s.numpy(), gains, distance, orthogonality, torch.float64)

    return Factors(s.numpy(), cut)
