"""Merges as the tests of laser/differences make them: weights, adapters, and what stands for a full fine-tune."""

from __future__ import annotations

import torch

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def weights(m: int, n: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Rows and columns of different sizes, as trained matrices have them."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator)
    W *= torch.exp(0.5 * torch.randn(m, 1, generator=generator)) * torch.exp(
        0.3 * torch.randn(1, n, generator=generator)
    )
    return (0.05 * W).to(dtype)


def update(W: torch.Tensor, rank: int, share: float, seed: int = 1, decay: float = 1.0) -> torch.Tensor:
    """B A of this rank in float32, of `share` of the norm of W; each direction `decay` times the one before."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(W.shape[0], rank, generator=generator)
    A = torch.randn(rank, W.shape[1], generator=generator) * decay ** torch.arange(rank)[:, None]
    X = B @ A
    return X * (share * W.float().norm() / X.norm())


def full(W: torch.Tensor, share: float, power: float = 0.5, seed: int = 2) -> torch.Tensor:
    """A change in all directions, whose singular values fall with a power, as those of full fine-tunes do."""
    generator = torch.Generator().manual_seed(seed)
    U, s, Vh = torch.linalg.svd(torch.randn(W.shape, generator=generator), full_matrices=False)
    X = (U * torch.arange(1, len(s) + 1) ** -power) @ Vh
    return X * (share * W.float().norm() / X.norm())


def merged(
    W: torch.Tensor, X: torch.Tensor, how: str = "once", dtype: torch.dtype = BF16, s: float = 1.0
) -> torch.Tensor:
    """The references: what the tools do, in torch's own types. X is the product, s the scale."""
    if how == "once":
        return (W.float() + s * X).to(dtype)
    if how == "delta-first":
        return W.to(dtype) + (s * X).to(dtype)
    assert how == "scaled-after"
    return W.to(dtype) + X.to(dtype) * s
