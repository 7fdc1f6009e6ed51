"""What is written in the place of a fine-tune's matrix: its base and part of the difference, cut or scaled.

Cutting is as everywhere in laser, of one more matrix: the biwhitened difference, whose noise has sigma = 1. Scaling
needs no spectrum, so it holds for tensors of any shape: W + c (q - W) with W of the base and q of the fine-tune. That
is W at c = 0 and q at c = 1 (Wortsman et al. 2022, WiSE-FT). Both are computed in float64 and rounded once, to the
format of q. An entry that the fine-tune did not move keeps its bits when it is scaled, the sign of a zero too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from laser.differences.difference import as_merged, whitening
from laser.errors import NumericalError
from laser.spectral.certificate import SAFETY, Certificate, Truncation
from laser.spectral.devices import Device, in_float64
from laser.spectral.factorise import Factorised, Values
from laser.spectral.metric import PLAIN, Decide
from laser.spectral.rules import SCALE
from laser.spectral.shrinkage import Gains

ARITHMETIC = 1e-6  # of a difference's root mean square: what two ways to factorise it may differ by


@dataclass(frozen=True)
class OfDifference:
    """The metric of differences from W (m, n), the base's: what is measured and cut is the biwhitened q - W."""

    W: torch.Tensor

    def values(self, q: torch.Tensor, device: Device, method: str = "gram") -> Values:
        return PLAIN.values(
            whitening(as_merged(self.W, q, device), q, device)[1], in_float64(device), exact_method(q, method)
        )

    def visit(self, q: torch.Tensor, decide: Decide, device: Device, method: str = "gram") -> Factorised:
        """The truncation's matrix (m, n) is W and what is left of the difference, in the dtype of q, on the host."""
        found, matrix = self._cut(q, decide, device, method)
        if found.truncation is None or matrix is None:
            return found
        return replace(found, truncation=replace(found.truncation, matrix=matrix.to(q.dtype)))

    def _cut(
        self, q: torch.Tensor, decide: Decide, device: Device, method: str
    ) -> tuple[Factorised, torch.Tensor | None]:
        """The factorisation of the biwhitened difference, and W plus its cut (m, n) in float64, on the host."""
        W = as_merged(self.W, q, device)  # as the spectrum was measured that the gains are of
        scales, D = whitening(W, q, device)
        found = PLAIN.visit(D, decide, in_float64(device), exact_method(q, method))
        if found.truncation is None:
            return found, None
        return found, W.cpu().double() + scales.undo(found.truncation.matrix.to(D.device)).cpu()

    def problems(
        self, name: str, q: torch.Tensor, B: torch.Tensor, half: torch.Tensor, gains: Gains, device: Device
    ) -> list[str]:
        """B (m, n) must be W and the cut difference, entry by entry: a norm would not tell it from q itself, since what
        is cut off an adapter is no more than the rounding that B brings along."""
        _, expected = self._cut(q, lambda _: gains, device, "gram")
        assert expected is not None, "gains were given"
        D = q.double() - self.W.double()
        allowed = half + ARITHMETIC * math.sqrt(float((D * D).mean()))
        off = ~((B.double() - expected).abs() <= allowed)  # not the other way round: NaN is a problem
        if not bool(off.any()):
            return []
        rank = gains.above + gains.below
        return [
            f"{name}: {int(off.sum())} of {B.numel()} entries are off, expected the base's and the difference cut to "
            f"rank {rank}, up to rounding"
        ]


def exact_method(q: torch.Tensor, method: str) -> str:
    """The method for a difference of the tuned q: in float32 an update lies so far over the rounding that squares of
    both do not fit into float64."""
    return "svd" if q.dtype == torch.float32 else method


def between(W: torch.Tensor, q: torch.Tensor, c: float) -> torch.Tensor:
    """W + c (q - W), of any shape, in the dtype of q."""
    base, D = W.double(), q.double() - W.double()
    return torch.where(D == 0, q, (base + c * D).to(q.dtype))


def scaled(W: torch.Tensor, q: torch.Tensor, c: float) -> Truncation:
    """`between`, with the certificate that the distance from q is the part of the difference that was to go.

    Raises NumericalError where it is not, as for NaN or Inf.
    """
    base, D = W.double(), q.double() - W.double()
    size, limit = float(D.norm()), SAFETY * torch.finfo(torch.float64).eps
    distance = float((q.double() - (base + c * D)).norm())
    residual = abs(distance - (1 - c) * size) / size if size else 0.0
    tolerance = limit * max(float(base.norm()) / size, 1.0) if size else 0.0
    if not residual <= tolerance:
        raise NumericalError(f"certificate missed: residual {residual:.2e} (allowed {tolerance:.2e})", residual)
    return Truncation(between(W, q, c), np.empty(0), Certificate(c * c, residual, 0.0, tolerance, SCALE))


def scaling_problems(name: str, W: torch.Tensor, q: torch.Tensor, B: torch.Tensor, c: float) -> list[str]:
    """What is wrong with B as `between` of W and q: every entry has to have the same bits."""
    expected = between(W, q, c)
    off = int(((B != expected) | (B.signbit() != expected.signbit())).sum())
    found = f"{off} of {B.numel()} entries are off, expected the base's and {c:g} of the difference, rounded once"
    return [f"{name}: {found}"] if off else []
