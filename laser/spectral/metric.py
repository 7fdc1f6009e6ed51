"""In what a matrix is measured and cut: plainly, by the Frobenius norm, or by what its outputs lose.

A metric answers three questions. Another one, as differences from a base model, is one more class here or beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from laser.errors import UsageError
from laser.spectral.data_metric import projection_problems
from laser.spectral.devices import Device
from laser.spectral.factorise import (
    Doubt,
    Factorised,
    Spectrum,
    Values,
    factorise,
    measure,
    singular_values,
    to_device_if_it_fits,
)
from laser.spectral.shrinkage import Gains
from laser.spectral.unit import in_unit, largest_entry

Decide = Callable[[Spectrum], Gains | None]


class Metric(Protocol):
    """What a scan, a reduction and `verify` ask."""

    def values(self, W: torch.Tensor, device: Device, method: str = "gram") -> Values:
        """Singular values (p,) of W (m, n). Raises NumericalError, UsageError."""
        ...

    def visit(self, W: torch.Tensor, decide: Decide, device: Device, method: str = "gram") -> Factorised:
        """One factorisation of W (m, n), and what `decide` makes of its values (p,). Raises NumericalError."""
        ...

    def problems(
        self, name: str, W: torch.Tensor, B: torch.Tensor, half: torch.Tensor, gains: Gains, device: Device
    ) -> list[str]:
        """What is wrong with B (m, n) as W with these gains, where B was rounded by up to `half` (m, n)."""
        ...


class Plain:
    """The Frobenius norm: ||W - B||_F^2, the error of outputs whose inputs are alike in all directions."""

    def values(self, W: torch.Tensor, device: Device, method: str = "gram", doubt: Doubt | None = None) -> Values:
        return measure(W, device, method, doubt)

    def visit(
        self, W: torch.Tensor, decide: Decide, device: Device, method: str = "gram", doubt: Doubt | None = None
    ) -> Factorised:
        return factorise(to_device_if_it_fits(W, device), decide, device, method, doubt=doubt)

    def problems(
        self, name: str, W: torch.Tensor, B: torch.Tensor, half: torch.Tensor, gains: Gains, device: Device
    ) -> list[str]:
        """B's singular values must be W's times their gains, and ||W - B||_F the norm of what was removed."""
        if not math.isfinite(largest_entry(B)):
            return [f"{name}: found NaN or Inf, expected finite weights"]
        W, u = in_unit(W)  # and all that follows in the same: squares of it stay in range
        s, after = singular_values(W, device)[0], singular_values(B, device)[0] / u
        total = float(np.linalg.norm(s))
        if total == 0:
            return [] if not after.any() else [f"{name}: found values, expected zero, as the source's matrix is"]
        g = gains.in_unit(u).of(s, (W.shape[0], W.shape[1]))
        tail = float(np.linalg.norm((1 - g) * s)) / total
        distance, rounded = 0.0, 0.0
        for start in range(0, W.shape[0], 1024):
            w, b, h = (x[start : start + 1024].double() for x in (W, B, half))
            distance += float(torch.sum((w - b / u) ** 2))
            rounded += float(torch.sum((h / u) ** 2))
        # ||B - W_r||_F is at most `rounded` (plus a little for the arithmetic), and that bounds both quantities.
        slack = math.sqrt(rounded) / total + 1e-5
        found = math.sqrt(distance) / total
        problems, rank = [], gains.above + gains.below
        if not abs(found - tail) <= slack:  # not the other way round: NaN is a problem
            problems.append(f"{name}: ||W - B||/||W|| is {found:.3e}, expected {tail:.3e} for rank {rank}")
        # Mirsky (1960): the singular values of B and of W_r differ, as vectors, by no more than B and W_r do.
        left = float(np.linalg.norm(after - np.sort(g * s)[::-1])) / total
        if not left <= slack:
            problems.append(
                f"{name}: {left:.3e} of the norm lies off or beyond rank {rank}, expected {slack:.1e} at most"
            )
        return problems


NOT_GIVEN = "the inputs are not known; try --moments with the file of laser calibrate"


class UnknownData:
    """By inputs that nobody gave: all that can be checked is whether B is some projection of W."""

    def values(self, W: torch.Tensor, device: Device, method: str = "gram") -> Values:
        raise UsageError(NOT_GIVEN)

    def visit(self, W: torch.Tensor, decide: Decide, device: Device, method: str = "gram") -> Factorised:
        raise UsageError(NOT_GIVEN)

    def problems(
        self, name: str, W: torch.Tensor, B: torch.Tensor, half: torch.Tensor, gains: Gains, device: Device
    ) -> list[str]:
        return projection_problems(name, W, B, half, gains.above, device)


PLAIN = Plain()
UNKNOWN_DATA: Metric = UnknownData()
