"""What rounding to a storage format does to a number: the cell that rounds to it, and the variance of its error.

IEEE 754, round to nearest, ties to even, as torch rounds. A stored number q stands for a cell of real numbers. Above
|q| it reaches half a step; below |q| half a step too, but half as far where |q| is a power of two, since the steps of
the binade under it are half as long. Subnormals and zeros have the format's least step. A cell contains its ends where
the last bit of q is 0. Zeros have signs, and each sign its own half of the cell.

An error that is uniform on a cell [-a, b] has mean square (a^3 + b^3) / (3 (a + b)), which is step^2 / 12 for
a = b = step / 2 and step^2 / 16 at a power of two. Everything here is exact in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from laser.errors import UsageError


@dataclass(frozen=True)
class Float:
    """A binary floating-point format. digits: of the significand, with the hidden one; lowest: exponent of the least
    normal number; wide: what a sum is computed in before it is rounded to this one."""

    dtype: torch.dtype
    digits: int
    lowest: int
    bits: torch.dtype
    wide: torch.dtype

    def spacing(self, x: torch.Tensor) -> torch.Tensor:
        """The step of the format in the binade of x (float64), any shape: from |x| up, for |x| in range."""
        return power_of_two(exponent(x).clamp(min=self.lowest) - (self.digits - 1))

    def outer_inner(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the cell of the stored q reaches away from 0 and towards it, float64, in the shape of q."""
        x = q.double()
        outer = self.spacing(x) / 2
        edge = (x.abs() == power_of_two(exponent(x))) & (exponent(x) > self.lowest)
        return outer, torch.where(edge, outer / 2, outer)

    def variance(self, q: torch.Tensor) -> torch.Tensor:
        """Mean square of the rounding error behind each stored q, float64, in the shape of q."""
        a, b = self.outer_inner(q)
        return (a**3 + b**3) / (3 * (a + b))

    def even(self, q: torch.Tensor) -> torch.Tensor:
        """Whether the cell of the stored q contains its ends."""
        return (q.view(self.bits) & 1) == 0

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """The largest number of the format that is not above x (float64), in float64."""
        step = self.spacing(x)
        return torch.floor(x / step) * step

    def up(self, x: torch.Tensor) -> torch.Tensor:
        """The least number of the format that is not under x (float64), in float64."""
        return -self.down(-x)


class Cell(NamedTuple):
    """All real numbers from `low` to `high` (float64); `closed` says whether the ends belong to it."""

    low: torch.Tensor
    high: torch.Tensor
    closed: torch.Tensor


STORED_FLOATS = {
    "BF16": Float(torch.bfloat16, 8, -126, torch.int16, torch.float32),
    "F16": Float(torch.float16, 11, -14, torch.int16, torch.float32),
    "F32": Float(torch.float32, 24, -126, torch.int32, torch.float64),
}
_BY_DTYPE = {found.dtype: found for found in STORED_FLOATS.values()}


def format_of(dtype: torch.dtype) -> Float:
    """The format of a dtype. Raises UsageError for one whose rounding is not known here."""
    if dtype not in _BY_DTYPE:
        known = ", ".join(str(each).removeprefix("torch.") for each in _BY_DTYPE)
        raise UsageError(f"nothing is known of the rounding to {dtype}, expected one of {known}; try --exclude")
    return _BY_DTYPE[dtype]


def cell_of(q: torch.Tensor) -> Cell:
    """The real numbers that round to each stored q, in its shape. Raises UsageError as `format_of`.

    The largest number's cell ends where rounding gives infinity. Of a zero it is the half on its sign's side.
    """
    known = format_of(q.dtype)
    x, (outer, inner) = q.double(), known.outer_inner(q)
    negative = torch.signbit(q)
    low = x - torch.where(negative, outer, inner)
    high = x + torch.where(negative, inner, outer)
    zero = torch.zeros((), dtype=torch.float64, device=q.device)
    low = torch.where((x == 0) & ~negative, zero, low)
    high = torch.where((x == 0) & negative, zero, high)
    return Cell(low, high, known.even(q))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one format and shape hold the same bits: 0 and -0 differ."""
    bits = format_of(a.dtype).bits
    return a.contiguous().view(bits) == b.contiguous().view(bits)


def exponent(x: torch.Tensor) -> torch.Tensor:
    """floor(log2 |x|) of float64 x as integers; -1023 for 0 and for what float64 itself has as subnormal."""
    return ((x.contiguous().view(torch.int64) >> 52) & 0x7FF) - 1023


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2^k in float64 for integers k of -1022 to 1023, exact on every device."""
    return ((exponents + 1023) << 52).view(torch.float64)
