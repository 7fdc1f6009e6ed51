"""What the entries of a matrix say that its spectrum hides: how heavy their tails are, and how far that moves the edge.

The bulk of noise is Marchenko-Pastur's whatever the law of the entries; its edge is so only in the limit. With excess
kurtosis k the edge of an m x n matrix lies higher by the relative amount k / (2 sqrt(m n)), in first order. Derivation:
the fourth cumulant k / q^2 of entries of variance 1 / q adds one term to the self-consistent equations of the two
diagonal blocks of the resolvent of [[0, W], [W^T, 0]] (the same cumulant expansion gives the shift of sparse sample
covariance matrices in Hwang, Lee and Schnelli 2019). With beta = p / q, e = k / q and w the product of the blocks' two
Stieltjes transforms:

    z^2 w = (1 + w + e w^2) (1 + beta w + beta e w^2)

Without e the edge is at w = 1 / sqrt(beta), z = 1 + sqrt(beta); there the term adds e z^2 / sqrt(beta) to z^2, which is
the relative amount k / sqrt(p q) of the squared edge.
"""

from __future__ import annotations

import torch

from laser.spectral import marchenko_pastur as mp
from laser.spectral.devices import HOST, Device, on_device_or_host
from laser.spectral.gram import moved, number
from laser.spectral.noise import Shape
from laser.spectral.unit import in_unit

BLOCK = 1 << 22  # entries that are in float64 at a time: 32 MiB

# A shift by a tenth of a Tracy-Widom unit turns 5 % of false finds into 6; Gaussian entries show 0.005 at 576 x 192 and
# less at larger shapes, Laplace entries 0.2 to 0.7 (LOG.md).
# Signal has heavy tails of its own (a product of two Gaussian vectors has kurtosis 6), so with signal this is a warning
# and no estimate.
HEAVY = 0.1


def excess_kurtosis(W: torch.Tensor, device: Device = HOST) -> float:
    """E x^4 / (E x^2)^2 - 3 over the entries of W, moments about zero, as the noise's law has them; 0 for no noise.

    0 for Gaussian entries, 3 for Laplace's. On the host in float64; on an accelerator, as long as its memory lasts, in
    its own dtype, where the host alone would take longer than the eigenvalues do. Each block is scaled by its largest
    entry, so that no fourth power underflows.
    """
    W, _ = in_unit(W)  # it has no unit itself
    return on_device_or_host(lambda where: _kurtosis(W, where), device)


def _kurtosis(W: torch.Tensor, device: Device) -> float:
    flat = W.detach().reshape(-1)
    second = fourth = 0.0
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        narrow = min(block.dtype, device.dtype, key=lambda dtype: dtype.itemsize)
        block = moved(block, device.torch_device, narrow)
        scale = number(block.abs().max())
        if scale == 0.0:
            continue
        squares = block.to(device.dtype) / scale  # a new tensor, so that what follows may overwrite it
        squares.mul_(squares)
        second += number(torch.sum(squares)) * scale**2
        fourth += number(torch.sum(squares.mul_(squares))) * scale**4
    return fourth * len(flat) / second**2 - 3 if second else 0.0


def edge_shift(kurtosis: float, shape: Shape) -> float:
    """How far entries of this excess kurtosis move the squared edge, in units of the Tracy-Widom law's scale.

    One unit is 0.8 standard deviations of the largest squared singular value of noise (Johnstone 2001, theorem 1.1).
    """
    p, q, _ = mp.aspect(shape)
    centre, scale = mp.tracy_widom_scale(shape)
    return kurtosis / (p * q) ** 0.5 * centre / scale
