"""Singular values and truncations of one matrix, each with a certificate: the door to this package's factorisations.

Methods: `gram` (gram.py, the default), `projector` (projector.py, products alone, for devices without LAPACK) and `svd`
(svd.py, the reference). Where one fails, the ladder (ladder.py) goes on to the next and the record says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from laser.errors import NumericalError, UsageError
from laser.spectral.certificate import Certificate, Factors, Truncation, certified
from laser.spectral.devices import Device
from laser.spectral.gram import BLOCK_ROWS, factors_by_gram, values_by_gram
from laser.spectral.ladder import Step, climb, steps
from laser.spectral.projector import factors_by_projector
from laser.spectral.shrinkage import Gains
from laser.spectral.svd import factors_by_svd, values_by_svd
from laser.spectral.unit import in_unit, largest_entry

__all__ = [
    "BLOCK_ROWS",
    "METHODS",
    "Certificate",
    "Truncation",
    "Values",
    "Visit",
    "check_storage",
    "measure",
    "singular_values",
    "truncate",
    "visit",
]

Spectrum = NDArray[np.float64]

_VALUES: dict[str, Callable[[torch.Tensor, Device], Spectrum]] = {"gram": values_by_gram, "svd": values_by_svd}
_FACTORS: dict[str, Callable[[torch.Tensor, Device, Spectrum | None], Factors]] = {
    "gram": lambda W, device, _: factors_by_gram(W, device),
    "projector": factors_by_projector,
    "svd": lambda W, device, _: factors_by_svd(W, device),
}
METHODS = tuple(_FACTORS)


@dataclass(frozen=True)
class Values:
    """Singular values (p,), float64, descending; the step of the ladder that gave them; the steps that failed."""

    singular_values: Spectrum
    method: str
    note: str = ""

    @property
    def told(self) -> str:
        """For a record: nothing where the first step held."""
        return f"by {self.method}, as {self.note}" if self.note else ""


@dataclass(frozen=True)
class Visit:
    """One factorisation of a matrix, and what was made with it: None where the decision was to leave it alone."""

    values: Values
    truncation: Truncation | None


def check_storage(dtype: torch.dtype) -> None:
    """Raises UsageError unless the dtype is bf16, fp16, fp32 or fp64: eight-bit floats need their scales."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise UsageError(
            f"a matrix stored as {dtype} cannot be reduced: found no scales for it, and without them its values are "
            "not the weights; try the bf16 release of the model, or --exclude these matrices"
        )


def measure(W: torch.Tensor, device: Device, method: str = "gram") -> Values:
    """Singular values of W (m, n). The projector has none of its own: its values are those of the Gram matrix.

    Raises NumericalError for a NaN or Inf in W or when every step of the ladder fails.
    """
    check_storage(W.dtype)
    W, u = in_unit(W)
    ladder = steps("gram" if method == "projector" else method, device)
    found, step, note = climb(W, ladder, lambda step, W: _VALUES[step.method](W, step.device))
    return Values(_scaled(found, u), step, note)


def singular_values(W: torch.Tensor, device: Device, method: str = "gram") -> tuple[Spectrum, str]:
    """Singular values (p,) of W (m, n), float64, descending, and the method that gave them. Raises as `measure`."""
    found = measure(W, device, method)
    return found.singular_values, found.method


def truncate(
    W: torch.Tensor, rank: int | Gains, device: Device, method: str = "gram", values: Spectrum | None = None
) -> Truncation:
    """The best approximation of W (m, n) of rank `rank` in Frobenius norm, certified (Eckart and Young 1936).

    With Gains instead of a rank, W with its singular values multiplied by them. `values`: W's singular values (p,)
    where they are known, which spares the projector its eigenvalues; the other methods find them on their way. Raises
    UsageError for a rank outside [0, p], NumericalError when no method meets the tolerance.
    """
    gains = Gains(rank) if isinstance(rank, int) else rank
    _check(W, gains)
    found = visit(W, lambda _: gains, device, method, values).truncation
    assert found is not None
    return found


def visit(
    W: torch.Tensor,
    decide: Callable[[Spectrum], Gains | None],
    device: Device,
    method: str = "gram",
    values: Spectrum | None = None,
) -> Visit:
    """Factorise W (m, n) once: `decide` gets its singular values (p,) and answers with gains, or None to leave it.

    What a scan and a reduction need together, for one pair of eigenvalues and eigenvectors instead of two. `decide` is
    asked again by each step of the ladder. Raises as `truncate`.
    """
    check_storage(W.dtype)
    storage = W.dtype
    W, u = in_unit(W)

    def attempt(step: Step, W: torch.Tensor) -> tuple[Spectrum, Truncation | None]:
        factors = _FACTORS[step.method](W, step.device, None if values is None else values / u)
        s = _scaled(factors.singular_values, u)
        gains = decide(s)
        if gains is None:
            return s, None
        _check(W, gains)
        return s, certified(factors.cut(gains.in_unit(u)), step.name)

    (s, found), step, note = climb(W, steps(method, device), attempt)
    if found:
        result = found.matrix if u == 1.0 else (found.matrix * u).to(storage)
        if not math.isfinite(largest_entry(result)):
            raise NumericalError(f"the result leaves the range of {storage}; try --exclude this matrix")
        found = Truncation(result, s, replace(found.certificate, note=note))
    return Visit(Values(s, step, note), found)


def _scaled(s: Spectrum, u: float) -> Spectrum:
    """s * u. Raises NumericalError where that is no number."""
    with np.errstate(over="ignore"):
        s = s * u
    if not np.isfinite(s).all():
        raise NumericalError("the largest singular value leaves the range of float64; try --exclude this matrix")
    return s


def _check(W: torch.Tensor, gains: Gains) -> None:
    p = min(W.shape)
    if not (0 <= gains.above and 0 <= gains.below and gains.above + gains.below <= p):
        raise UsageError(f"rank {gains.above + gains.below} does not fit shape {tuple(W.shape)}; try 0 to {p}")
